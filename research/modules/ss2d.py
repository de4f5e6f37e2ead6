"""The two-dimensional selective scan of VMamba (Liu et al. 2024, arXiv 2401.10166, section 4.2), "SS2D v05_noz" of the
released code.

A map is read in four walks, each with step sizes, maps and decays of its own, and the four outputs are added up where
they belong.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.modules.axes import Init, Kind
from research.modules.layers import normal_02, ones
from research.modules.norms import LayerNorm
from research.modules.ssm import a_log_init, dt_bias_init, torch_linear
from research.ops.cross_scan import DIRECTIONS, cross_merge, cross_scan
from research.ops.depthwise import depthwise_conv2d
from research.ops.precision import matmul, wide
from research.ops.selective_scan import selective_scan

WINDOW = 3


class SS2D(nnx.Module):
    """out(LN(merge(scan(walks of silu(depthwise 3x3(x W_x)))))), without a gate or biases.

    Parameters: 2 D E + 11 E, and for each of the four directions E (R + 2 N) + R E + E N + 2 E, on an axis
      `directions`.

    Args:
      dim, inner, state, rank: D, E, N and R.
      embed: name of the channels' axis.
      scope: scope of the axes that belong to this layer alone.
      implementation: of `depthwise_conv2d` and `selective_scan`.
    """

    def __init__(
        self,
        dim: int,
        inner: int,
        state: int,
        rank: int,
        embed: str,
        scope: str,
        init: Init,
        *,
        implementation: str = "auto",
    ):
        self.implementation = implementation
        axis, states, ranks = f"{scope}/inner", f"{scope}/state", f"{scope}/rank"
        self.x = init.param("x", (dim, inner), (embed, axis), normal_02, Kind.MATRIX)
        self.window = init.param(
            "window", (WINDOW, WINDOW, inner), ("kernel_h", "kernel_w", axis), torch_linear(WINDOW**2), Kind.DEPTHWISE
        )
        each = init.stacked(DIRECTIONS, f"{scope}/directions")
        self.dt_down = each.param("dt_down", (inner, rank), (axis, ranks), torch_linear(inner), Kind.MATRIX)
        self.b = each.param("b", (inner, state), (axis, states), torch_linear(inner), Kind.MATRIX)
        self.c = each.param("c", (inner, state), (axis, states), torch_linear(inner), Kind.MATRIX)
        self.dt_up = each.param("dt_up", (rank, inner), (ranks, axis), torch_linear(rank), Kind.MATRIX)
        self.dt_bias = each.param("dt_bias", (inner,), (axis,), dt_bias_init, Kind.BIAS, precise=True)
        self.a_log = each.param("a_log", (inner, state), (axis, states), a_log_init, Kind.CONSTANT, precise=True)
        self.skip = each.param("skip", (inner,), (axis,), ones, Kind.CONSTANT, precise=True)
        self.norm = LayerNorm(inner, axis, init.child("norm"), eps=1e-5)
        self.out = init.param("out", (inner, dim), (axis, embed), normal_02, Kind.MATRIX)

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        x = jax.nn.silu(depthwise_conv2d(x @ self.x[...], self.window[...], implementation=self.implementation))
        own = [p[...] for p in (self.dt_down, self.b, self.c, self.dt_up, self.dt_bias, self.a_log, self.skip)]
        y = jax.vmap(self._walk)(cross_scan(x), *own)
        return self.norm(cross_merge(y, *x.shape[1:3])) @ self.out[...]

    def _walk(self, u: Float[Array, "B T E"], dt_down, b, c, dt_up, dt_bias, a_log, skip) -> Float[Array, "B T E"]:
        """The selective state space of one direction over its sequence."""
        rank, state = dt_up.shape[0], b.shape[-1]
        dt, b, c = jnp.split(u @ jnp.concatenate([dt_down, b, c], -1), (rank, rank + state), -1)
        delta = jax.nn.softplus(wide(matmul(dt, dt_up)) + dt_bias)
        return selective_scan(u, delta, -jnp.exp(a_log), b, c, skip, implementation=self.implementation)[0]
