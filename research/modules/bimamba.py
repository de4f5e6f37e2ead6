"""The bidirectional mixer of Vision Mamba (Zhu et al. 2024, arXiv 2401.09417, algorithm 1), "bimamba v2" of the
released code.

Both directions share the projections in and out; each has a convolution and a selective state space of its own. They
run one after the other: as one scan over stacked rows they take about a third longer on a CPU.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.modules.axes import Init, Initializer, Kind
from research.modules.mixers.base import fused
from research.modules.ssm import SelectiveSSM, torch_linear


class BiMamba(nnx.Module):
    """out((forward(x W_x) + flip(backward(flip(x W_x)))) / 2 * silu(x W_z)), without biases; flips are of time.

    3 D E parameters beside the two of `SelectiveSSM`. The released "div2" models halve the sum; the gate of the flipped
    z, flipped back, is that of z.

    Args:
      dim, inner, state, rank: D, E, and N and R of each direction.
      embed: name of the channels' axis.
      scope: scope of the axes that belong to this layer alone.
      d_conv: kernel size of the convolutions.
      out_init: initialiser of the projection out; None for PyTorch's default.
      implementation: of `depthwise_conv1d` and `selective_scan`.
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
        d_conv: int = 4,
        out_init: Initializer | None = None,
        implementation: str = "auto",
    ):
        self.implementation = implementation
        axis = f"{scope}/inner"
        self.x = init.param("x", (dim, inner), (embed, axis), torch_linear(dim), Kind.MATRIX)
        self.z = init.param("z", (dim, inner), (embed, axis), torch_linear(dim), Kind.MATRIX)
        direction = lambda name: SelectiveSSM(
            inner, state, rank, axis, f"{scope}/{name}", init.child(name), d_conv=d_conv, implementation=implementation
        )
        self.forward, self.backward = direction("forward"), direction("backward")
        self.out = init.param("out", (inner, dim), (axis, embed), out_init or torch_linear(inner), Kind.MATRIX)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x, z = fused(x, self.x, self.z, implementation=self.implementation)
        ahead, _ = self.forward(x)
        behind, _ = self.backward(jnp.flip(x, 1))
        return ((ahead + jnp.flip(behind, 1)) / 2 * jax.nn.silu(z)) @ self.out[...]
