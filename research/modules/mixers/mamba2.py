"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 7 and figure 6): heads with one decay each, maps from the block's
input."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.modules import elastic
from research.modules.axes import Init, Kind
from research.modules.layers import ones
from research.modules.mixers.base import Call, Spec, State, fused, register
from research.modules.norms import RMSNorm
from research.modules.ssm import ShortConv, dt_bias_init, short_convs, short_convs_step, torch_linear
from research.ops import depthwise_1d, linear_attention
from research.ops.precision import wide
from research.ops.ssd import ssd, ssd_step


@register
@dataclass(frozen=True)
class Mamba2(Spec):
    """`num_heads` 0: expand * dim / head_dim; `ngroups` groups of heads share B and C; `dt_limit` (low, high) bounds
    step sizes,
    empty: no bounds.

    `norm_eps`: of the gated norm.
    """

    d_state: int = 128
    head_dim: int = 64
    num_heads: int = 0
    ngroups: int = 1
    expand: float = 2.0
    d_conv: int = 4
    dt_limit: tuple[float, ...] = ()
    norm_eps: float = 1e-5

    renamed: ClassVar[dict[str, str]] = {
        "state": "d_state",
        "heads": "num_heads",
        "groups": "ngroups",
        "taps": "d_conv",
    }
    kind: ClassVar[str] = "mamba2"
    paper: ClassVar[str] = "arXiv 2405.21060"
    alone: ClassVar[bool] = True
    small: ClassVar[dict[str, Any]] = {"d_state": 64, "head_dim": 32}
    tiny: ClassVar[dict[str, Any]] = {"d_state": 8, "head_dim": 8}
    ops: ClassVar[dict[str, tuple[str, ...]]] = {
        depthwise_1d.OP: depthwise_1d.IMPLEMENTATIONS,
        linear_attention.OP: linear_attention.IMPLEMENTATIONS,
    }

    def resolve(self, dim: int) -> Self:
        low, high = self.dt_limit or (0.0, math.inf)
        self.require(
            0 <= low < high, f"dt_limit={self.dt_limit}; valid: (low, high) with 0 <= low < high, or () for none"
        )
        return replace(self, num_heads=count_heads(self, dim))

    def shrink(self, width, heads, state) -> "Mamba2":
        heads = elastic.depth_count(float(width) if heads is None else heads, self.num_heads, self.ngroups, "heads")
        return replace(self, num_heads=heads, d_state=elastic.count(state, self.d_state, "state"))

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "Mamba2Mixer":
        return Mamba2Mixer(self, dim, scope, init, implementation)


def count_heads(spec: Any, dim: int) -> int:
    """Returns how many heads of `spec.head_dim` the block has: `spec.num_heads`, or what makes expand * dim channels.

    Raises:
      UserError: expand * dim is no multiple of head_dim, or the groups do not divide the heads.
    """
    inner = round(spec.expand * dim)
    spec.require(
        spec.head_dim >= 1 and inner >= 1,
        f"head_dim={spec.head_dim}, expand={spec.expand}; valid: whole numbers from 1, above 0",
    )
    whole = spec.num_heads or not inner % spec.head_dim
    spec.require(whole, f"head_dim={spec.head_dim} does not divide {inner} inner channels ({spec.expand} * {dim})")
    heads = spec.num_heads or inner // spec.head_dim
    valid = [n for n in range(1, heads + 1) if heads % n == 0]
    spec.require(spec.ngroups in valid, f"ngroups={spec.ngroups} does not divide {heads} heads; valid: {valid}")
    return heads


def log_of_1_to_16(key: Array, shape: Sequence[int], dtype: Any) -> Array:
    """log U(1, 16): decay rates of the released code."""
    return jnp.log(jax.random.uniform(key, tuple(shape), jnp.float32, 1.0, 16.0)).astype(dtype)


class Mamba2Mixer(nnx.Module):
    """out(RMSNorm(SSD(silu(conv(x, B, C)), dt) * silu(z))): gate first, then a norm over the channels of each group.

    Parameters: d (2 E + 2 G N + H) + (d_conv + 1) (E + 2 G N) + 3 H + E + E d with E = H P inner channels. State:
    `conv` [B, d_conv - 1, E + 2 G N], the latest inputs of the convolution, and `ssm` [B, H, P, N], float32. Head h is
    entry (h // (H / G), h % (H / G)) of the axes (groups, heads).
    """

    def __init__(self, spec: Mamba2, dim: int, scope: str, init: Init, implementation: str):
        self.spec, self.implementation = spec, implementation
        self.inner = (spec.ngroups, spec.num_heads // spec.ngroups, spec.head_dim)
        self.maps = (spec.ngroups, spec.d_state)
        inner = (f"{scope}/groups", f"{scope}/heads", f"{scope}/head_dim")
        maps = (f"{scope}/groups", f"{scope}/state")
        heads, linear = self.inner[:2], torch_linear(dim)
        self.z = init.param("z", (dim, *self.inner), ("embed", *inner), linear, Kind.MATRIX)
        self.x = init.param("x", (dim, *self.inner), ("embed", *inner), linear, Kind.MATRIX)
        self.b = init.param("b", (dim, *self.maps), ("embed", *maps), linear, Kind.MATRIX)
        self.c = init.param("c", (dim, *self.maps), ("embed", *maps), linear, Kind.MATRIX)
        self.dt = init.param("dt", (dim, *heads), ("embed", *inner[:2]), linear, Kind.MATRIX)
        self.conv_x = ShortConv(self.inner, inner, init.child("conv_x"), kernel_size=spec.d_conv)
        self.conv_b = ShortConv(self.maps, maps, init.child("conv_b"), kernel_size=spec.d_conv)
        self.conv_c = ShortConv(self.maps, maps, init.child("conv_c"), kernel_size=spec.d_conv)
        self.dt_bias = init.param("dt_bias", heads, inner[:2], dt_bias_init, Kind.BIAS, precise=True)
        self.a_log = init.param("a_log", heads, inner[:2], log_of_1_to_16, Kind.CONSTANT, precise=True)
        self.skip = init.param("skip", heads, inner[:2], ones, Kind.CONSTANT, precise=True)
        self.norm = RMSNorm(self.inner, inner, init.child("norm"), eps=spec.norm_eps, over=2)
        fan_in = spec.num_heads * spec.head_dim * init.branches
        self.out = init.param("out", (*self.inner, dim), (*inner, "embed"), torch_linear(fan_in), Kind.MATRIX)

    @property
    def _convs(self) -> tuple[ShortConv, ShortConv, ShortConv]:
        return self.conv_x, self.conv_b, self.conv_c

    def _project(self, x: Float[Array, "*B D"]) -> tuple[Array, tuple[Array, Array, Array], Array]:
        """Returns (z, (x, B, C) before the convolutions, dt before its bias)."""
        z, x, b, c, dt = fused(
            x, self.z, self.x, self.b, self.c, self.dt, implementation=self.implementation, exact=(self.dt,)
        )
        return z, (x, b, c), dt

    def _operands(self, xbc: Sequence[Float[Array, "*B _"]], dt: Float[Array, "*B H"]) -> tuple[Array, ...]:
        """Arguments of `ssd` from the convolutions' outputs."""
        spec, lead = self.spec, dt.shape[:-1]
        x, b, c = xbc
        delta = jax.nn.softplus(wide(dt) + self.dt_bias[...].reshape(-1))
        if spec.dt_limit:
            delta = jnp.clip(delta, *spec.dt_limit)
        a, skip = -jnp.exp(self.a_log[...].reshape(-1)), self.skip[...].reshape(-1)
        return (
            x.reshape(*lead, spec.num_heads, spec.head_dim),
            delta,
            a,
            b.reshape(*lead, *self.maps),
            c.reshape(*lead, *self.maps),
            skip,
        )

    def _gated_out(self, y: Float[Array, "*B H P"], z: Float[Array, "*B E"]) -> Float[Array, "*B D"]:
        lead = z.shape[:-1]
        gated = wide(y).reshape(*lead, *self.inner) * jax.nn.silu(wide(z)).reshape(*lead, *self.inner)
        return self.norm(gated).astype(z.dtype).reshape(*lead, -1) @ self.out[...].reshape(-1, self.out.shape[-1])

    def __call__(
        self, x: Float[Array, "B T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        state = state or {}
        z, xbc, dt = self._project(x)
        convolved, conv = short_convs(
            xbc, self._convs, call.segment_ids, state.get("conv"), implementation=self.implementation
        )
        y, ssm = ssd(
            *self._operands(convolved, dt),
            initial_state=state.get("ssm"),
            segment_ids=call.segment_ids,
            implementation=self.implementation,
        )
        return self._gated_out(y, z), {"conv": conv, "ssm": ssm}

    def step(self, x: Float[Array, "B D"], call: Call, state: State) -> tuple[Float[Array, "B D"], State]:
        z, xbc, dt = self._project(x)
        convolved, conv = short_convs_step(xbc, self._convs, state["conv"])
        y, ssm = ssd_step(*self._operands(convolved, dt), state=state["ssm"])
        return self._gated_out(y, z), {"conv": conv, "ssm": ssm}

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> State:
        spec = self.spec
        channels = spec.num_heads * spec.head_dim + 2 * spec.ngroups * spec.d_state
        return {
            "conv": jnp.zeros((batch, spec.d_conv - 1, channels), dtype),
            "ssm": jnp.zeros((batch, spec.num_heads, spec.head_dim, spec.d_state), jnp.float32),
        }
