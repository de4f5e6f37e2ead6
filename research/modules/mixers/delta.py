"""DeltaNet (Yang et al. 2024, arXiv 2406.06484, section 3) and Gated DeltaNet (arXiv 2412.06464, section 3), as in the
fla layers.

A head's memory is corrected rather than added to: what a key recalls is replaced, by the share beta, by the new value.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.modules.axes import Init, Kind
from research.modules.layers import normal_02
from research.modules.mixers.base import Call, State, register
from research.modules.mixers.linear import HeadSpec, attend, convolve, empty, head_kernel, join, out_kernel, project
from research.modules.norms import RMSNorm
from research.modules.ssm import ShortConv, dt_bias_init
from research.ops import depthwise_1d, linear_attention
from research.ops.precision import wide

OPS = {depthwise_1d.OP: depthwise_1d.FORMS, linear_attention.OP: linear_attention.FORMS}


@register
@dataclass(frozen=True)
class DeltaNet(HeadSpec):
    """`gate`: silu(x W_g) behind the norm; `negative`: beta up to 2, so that a memory's eigenvalues reach -1 (arXiv
    2411.12537)."""

    taps: int = 4
    gate: bool = False
    negative: bool = False

    kind: ClassVar[str] = "deltanet"
    paper: ClassVar[str] = "arXiv 2406.06484"
    tiny: ClassVar[dict[str, Any]] = {"heads": 2}
    ops: ClassVar[dict[str, tuple[str, ...]]] = OPS

    def build(self, dim: int, length: int, scope: str, init: Init, form: str) -> "DeltaMixer":
        return DeltaMixer(self, dim, scope, init, form, gate=self.gate, decay=False)


@register
@dataclass(frozen=True)
class GatedDeltaNet(HeadSpec):
    """`state` 0: expand_k * dim / heads features of a key; `head_dim` 0: expand_v times as many of a value; `negative`
    as in `DeltaNet`."""

    expand_k: float = 0.75
    expand_v: float = 2.0
    taps: int = 4
    negative: bool = False

    kind: ClassVar[str] = "gated_deltanet"
    paper: ClassVar[str] = "arXiv 2412.06464"
    tiny: ClassVar[dict[str, Any]] = {"heads": 2}
    ops: ClassVar[dict[str, tuple[str, ...]]] = OPS

    def resolve(self, dim: int) -> Self:
        state = self.state or int(self.expand_k * dim) // max(self.heads, 1)
        return super(
            GatedDeltaNet, replace(self, state=state, head_dim=self.head_dim or int(self.expand_v * state))
        ).resolve(dim)

    def build(self, dim: int, length: int, scope: str, init: Init, form: str) -> "DeltaMixer":
        return DeltaMixer(self, dim, scope, init, form, gate=True, decay=True)


def unit(x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """x / sqrt(|x|^2 + 1e-6), in float32 at least."""
    x = wide(x)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


def a_log_init(key: Array, shape, dtype) -> Array:
    """log of U(0.01, 16): rates of decay."""
    return jnp.log(jax.random.uniform(key, tuple(shape), jnp.float32, 0.01, 16.0)).astype(dtype)


class DeltaMixer(nnx.Module):
    """out(rms(delta rule(unit(q), unit(k), v, beta, decays)) [* silu(x W_g)]), with short convolutions and SiLU on q, k
    and v.

    beta = sigmoid(x W_beta), log decays -exp(A_log) softplus(x W_a + dt_bias), both one a head; q is scaled by
    state^-0.5. With K and V those of all heads: 2DK + 2DV + DH + taps(2K + V) + V/H parameters, DV more for the gate,
    DH + 2H more for the decays.
    State: `memory` [B, heads, state, head_dim], float32, and `conv` [B, taps - 1, 2K + V].
    """

    def __init__(
        self, spec: DeltaNet | GatedDeltaNet, dim: int, scope: str, init: Init, form: str, *, gate: bool, decay: bool
    ):
        self.spec, self.form = spec, form
        heads = f"{scope}/heads"
        keys, values = (heads, f"{scope}/state"), (heads, f"{scope}/v/head_dim")
        self.q = head_kernel("q", dim, spec.heads, spec.state, keys, init)
        self.k = head_kernel("k", dim, spec.heads, spec.state, keys, init)
        self.v = head_kernel("v", dim, spec.heads, spec.head_dim, values, init)
        conv = lambda tag, size, axes: ShortConv(
            (spec.heads, size), axes, init.child(tag), taps=spec.taps, bias=False, form=form
        )
        self.q_conv, self.k_conv = conv("q_conv", spec.state, keys), conv("k_conv", spec.state, keys)
        self.v_conv = conv("v_conv", spec.head_dim, values)
        self.beta = init.param("beta", (dim, spec.heads), ("embed", heads), normal_02, Kind.MATRIX)
        self.gate = head_kernel("gate", dim, spec.heads, spec.head_dim, values, init) if gate else None
        self.decay = init.param("decay", (dim, spec.heads), ("embed", heads), normal_02, Kind.MATRIX) if decay else None
        self.a_log = (
            init.param("a_log", (spec.heads,), (heads,), a_log_init, Kind.CONSTANT, precise=True) if decay else None
        )
        self.dt_bias = (
            init.param("dt_bias", (spec.heads,), (heads,), dt_bias_init, Kind.BIAS, precise=True) if decay else None
        )
        self.norm = RMSNorm(spec.head_dim, values[1], init.child("norm"))
        self.out = out_kernel(dim, spec.heads, spec.head_dim, values, init)

    def __call__(
        self, x: Float[Array, "B *T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B *T D"], State]:
        state = state or {}
        kernels = [
            kernel for kernel in (self.q, self.k, self.v, self.beta, self.gate, self.decay) if kernel is not None
        ]
        q, k, v, beta, *rest = project(x, *kernels, form=self.form, exact=(self.beta, self.decay))
        (q, k, v), conv = convolve((q, k, v), (self.q_conv, self.k_conv, self.v_conv), state.get("conv"), call)
        beta = jax.nn.sigmoid(wide(beta)) * (2 if self.spec.negative else 1)
        log_decay = None
        if self.a_log is not None and self.dt_bias is not None:
            log_decay = -jnp.exp(self.a_log[...]) * jax.nn.softplus(wide(rest[-1]) + self.dt_bias[...])
        y, memory = attend(unit(q), unit(k), v, state.get("memory"), call, self.form, beta=beta, log_decay=log_decay)
        y = self.norm(y) if self.gate is None else self.norm(y) * jax.nn.silu(rest[0])
        return join(y, self.out), {"conv": conv, "memory": memory}

    def step(self, x: Float[Array, "B D"], call: Call, state: State) -> tuple[Float[Array, "B D"], State]:
        return self(x, call, state)

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> State:
        spec = self.spec
        channels = spec.heads * (2 * spec.state + spec.head_dim)
        conv = jnp.zeros((batch, spec.taps - 1, channels), dtype)
        return {"conv": conv, **empty(batch, spec.heads, spec.state, spec.head_dim)}
