"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635, section 4.4 and the fla layer): a decay for every feature
of a key."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.modules.axes import Init, Kind
from research.modules.layers import normal_02, zeros
from research.modules.mixers.base import Call, State, register
from research.modules.mixers.linear import HeadSpec, attend, empty, head_kernel, join, out_kernel, project
from research.modules.norms import RMSNorm
from research.ops import linear_attention
from research.ops.precision import wide


@register
@dataclass(frozen=True)
class GatedLinearAttention(HeadSpec):
    """Log decays are logsigmoid(W_up W_down x + b) / `gate_logit_normalizer` through `gate_low_rank_dim` features: they
    start small."""

    expand_k: float = 0.5
    gate_low_rank_dim: int = 16
    gate_logit_normalizer: float = 16.0

    renamed: ClassVar[dict[str, str]] = {
        "rank": "gate_low_rank_dim",
        "divisor": "gate_logit_normalizer",
    }
    kind: ClassVar[str] = "gla"
    paper: ClassVar[str] = "arXiv 2312.06635"
    small: ClassVar[dict[str, Any]] = {"expand_k": 1.0}
    tiny: ClassVar[dict[str, Any]] = {"num_heads": 2}
    ops: ClassVar[dict[str, tuple[str, ...]]] = {linear_attention.OP: linear_attention.IMPLEMENTATIONS}

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "GatedLinearAttentionMixer":
        return GatedLinearAttentionMixer(self, dim, scope, init, implementation)


class GatedLinearAttentionMixer(nnx.Module):
    """out(rms(attend(q, k, v, decays)) * silu(x W_g)), q scaled by d_state^-0.5; 2DK + 2DV + (D + K)R + K + VD + V/H
    parameters.

    K and V are those of all heads, R the rank of the gate; state: `memory` [B, num_heads, d_state, head_dim], float32.
    """

    def __init__(self, spec: GatedLinearAttention, dim: int, scope: str, init: Init, implementation: str):
        self.spec, self.implementation = spec, implementation
        heads, rank = f"{scope}/heads", f"{scope}/rank"
        keys, values = (heads, f"{scope}/state"), (heads, f"{scope}/v/head_dim")
        self.q = head_kernel("q", dim, spec.num_heads, spec.d_state, keys, init)
        self.k = head_kernel("k", dim, spec.num_heads, spec.d_state, keys, init)
        self.v = head_kernel("v", dim, spec.num_heads, spec.head_dim, values, init)
        self.gate = head_kernel("gate", dim, spec.num_heads, spec.head_dim, values, init)
        self.decay_down = init.param(
            "decay_down", (dim, spec.gate_low_rank_dim), ("embed", rank), normal_02, Kind.MATRIX
        )
        self.decay_up = init.param(
            "decay_up", (spec.gate_low_rank_dim, spec.num_heads, spec.d_state), (rank, *keys), normal_02, Kind.MATRIX
        )
        self.decay_bias = init.param("decay_bias", (spec.num_heads, spec.d_state), keys, zeros, Kind.BIAS)
        self.norm = RMSNorm(spec.head_dim, values[1], init.child("norm"))
        self.out = out_kernel(dim, spec.num_heads, spec.head_dim, values, init)

    def __call__(
        self, x: Float[Array, "B *T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B *T D"], State]:
        q, k, v, gate, low = project(
            x,
            self.q,
            self.k,
            self.v,
            self.gate,
            self.decay_down,
            implementation=self.implementation,
            exact=(self.decay_down,),
        )
        (decay,) = project(low, self.decay_up, implementation=self.implementation, exact=(self.decay_up,))
        log_decay = jax.nn.log_sigmoid(wide(decay) + self.decay_bias[...]) / self.spec.gate_logit_normalizer
        y, memory = attend(
            q, k, v, None if state is None else state["memory"], call, self.implementation, log_decay=log_decay
        )
        return join(self.norm(y) * jax.nn.silu(gate), self.out), {"memory": memory}

    def step(self, x: Float[Array, "B D"], call: Call, state: State) -> tuple[Float[Array, "B D"], State]:
        return self(x, call, state)

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> State:
        return empty(batch, self.spec.num_heads, self.spec.d_state, self.spec.head_dim)
