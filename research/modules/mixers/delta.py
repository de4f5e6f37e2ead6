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

OPS = {depthwise_1d.OP: depthwise_1d.IMPLEMENTATIONS, linear_attention.OP: linear_attention.IMPLEMENTATIONS}


@register
@dataclass(frozen=True)
class DeltaNet(HeadSpec):
    """`use_gate`: silu(x W_g) behind the norm; `allow_neg_eigval`: beta up to 2, so that a memory's eigenvalues reach
    -1 (arXiv 2411.12537)."""

    d_conv: int = 4
    use_gate: bool = False
    allow_neg_eigval: bool = False

    renamed: ClassVar[dict[str, str]] = {
        "taps": "d_conv",
        "gate": "use_gate",
        "negative": "allow_neg_eigval",
    }
    kind: ClassVar[str] = "deltanet"
    paper: ClassVar[str] = "arXiv 2406.06484"
    tiny: ClassVar[dict[str, Any]] = {"num_heads": 2}
    ops: ClassVar[dict[str, tuple[str, ...]]] = OPS

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "DeltaMixer":
        return DeltaMixer(self, dim, scope, init, implementation, gate=self.use_gate, decay=False)


@register
@dataclass(frozen=True)
class GatedDeltaNet(HeadSpec):
    """`d_state` 0: expand_k * dim / num_heads features of a key; `head_dim` 0: expand_v times as many of a value;
    `allow_neg_eigval` as in `DeltaNet`."""

    expand_k: float = 0.75
    expand_v: float = 2.0
    d_conv: int = 4
    allow_neg_eigval: bool = False

    renamed: ClassVar[dict[str, str]] = {"taps": "d_conv", "negative": "allow_neg_eigval"}
    kind: ClassVar[str] = "gated_deltanet"
    paper: ClassVar[str] = "arXiv 2412.06464"
    tiny: ClassVar[dict[str, Any]] = {"num_heads": 2}
    ops: ClassVar[dict[str, tuple[str, ...]]] = OPS

    def resolve(self, dim: int) -> Self:
        state = self.d_state or int(self.expand_k * dim) // max(self.num_heads, 1)
        return super(
            GatedDeltaNet, replace(self, d_state=state, head_dim=self.head_dim or int(self.expand_v * state))
        ).resolve(dim)

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "DeltaMixer":
        return DeltaMixer(self, dim, scope, init, implementation, gate=True, decay=True)


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
    d_state^-0.5. With K and V those of all heads: 2DK + 2DV + DH + d_conv(2K + V) + V/H parameters, DV more for the
    gate, DH + 2H more for the decays.
    State: `memory` [B, num_heads, d_state, head_dim], float32, and `conv` [B, d_conv - 1, 2K + V].
    """

    def __init__(
        self,
        spec: DeltaNet | GatedDeltaNet,
        dim: int,
        scope: str,
        init: Init,
        implementation: str,
        *,
        gate: bool,
        decay: bool,
    ):
        self.spec, self.implementation = spec, implementation
        heads = f"{scope}/heads"
        keys, values = (heads, f"{scope}/state"), (heads, f"{scope}/v/head_dim")
        self.q = head_kernel("q", dim, spec.num_heads, spec.d_state, keys, init)
        self.k = head_kernel("k", dim, spec.num_heads, spec.d_state, keys, init)
        self.v = head_kernel("v", dim, spec.num_heads, spec.head_dim, values, init)
        conv = lambda tag, size, axes: ShortConv(
            (spec.num_heads, size),
            axes,
            init.child(tag),
            kernel_size=spec.d_conv,
            bias=False,
            implementation=implementation,
        )
        self.q_conv, self.k_conv = conv("q_conv", spec.d_state, keys), conv("k_conv", spec.d_state, keys)
        self.v_conv = conv("v_conv", spec.head_dim, values)
        self.beta = init.param("beta", (dim, spec.num_heads), ("embed", heads), normal_02, Kind.MATRIX)
        self.gate = head_kernel("gate", dim, spec.num_heads, spec.head_dim, values, init) if gate else None
        self.decay = (
            init.param("decay", (dim, spec.num_heads), ("embed", heads), normal_02, Kind.MATRIX) if decay else None
        )
        self.a_log = (
            init.param("a_log", (spec.num_heads,), (heads,), a_log_init, Kind.CONSTANT, precise=True) if decay else None
        )
        self.dt_bias = (
            init.param("dt_bias", (spec.num_heads,), (heads,), dt_bias_init, Kind.BIAS, precise=True) if decay else None
        )
        self.norm = RMSNorm(spec.head_dim, values[1], init.child("norm"))
        self.out = out_kernel(dim, spec.num_heads, spec.head_dim, values, init)

    def __call__(
        self, x: Float[Array, "B *T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B *T D"], State]:
        state = state or {}
        kernels = [
            kernel for kernel in (self.q, self.k, self.v, self.beta, self.gate, self.decay) if kernel is not None
        ]
        q, k, v, beta, *rest = project(x, *kernels, implementation=self.implementation, exact=(self.beta, self.decay))
        (q, k, v), conv = convolve((q, k, v), (self.q_conv, self.k_conv, self.v_conv), state.get("conv"), call)
        beta = jax.nn.sigmoid(wide(beta)) * (2 if self.spec.allow_neg_eigval else 1)
        log_decay = None
        if self.a_log is not None and self.dt_bias is not None:
            log_decay = -jnp.exp(self.a_log[...]) * jax.nn.softplus(wide(rest[-1]) + self.dt_bias[...])
        y, memory = attend(
            unit(q), unit(k), v, state.get("memory"), call, self.implementation, beta=beta, log_decay=log_decay
        )
        y = self.norm(y) if self.gate is None else self.norm(y) * jax.nn.silu(rest[0])
        return join(y, self.out), {"conv": conv, "memory": memory}

    def step(self, x: Float[Array, "B D"], call: Call, state: State) -> tuple[Float[Array, "B D"], State]:
        return self(x, call, state)

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> State:
        spec = self.spec
        channels = spec.num_heads * (2 * spec.d_state + spec.head_dim)
        conv = jnp.zeros((batch, spec.d_conv - 1, channels), dtype)
        return {"conv": conv, **empty(batch, spec.num_heads, spec.d_state, spec.head_dim)}
