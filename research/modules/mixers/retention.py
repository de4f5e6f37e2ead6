"""Retention (RetNet, Sun et al. 2023, arXiv 2307.08621, section 2): rotary keys, one fixed decay a head, a gate behind
a norm."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.modules.axes import Init
from research.modules.mixers.base import Call, State, register
from research.modules.mixers.linear import HeadSpec, attend, empty, head_kernel, join, out_kernel, project
from research.modules.mixers.rotary import rotary
from research.modules.norms import RMSNorm
from research.ops import linear_attention


@register
@dataclass(frozen=True)
class Retention(HeadSpec):
    """Keys are whole in every sub-network: their features turn in pairs, at rates that depend on how many there
    are."""

    expand_v: float = 2.0

    kind: ClassVar[str] = "retention"
    paper: ClassVar[str] = "arXiv 2307.08621"
    tiny: ClassVar[dict[str, Any]] = {"num_heads": 2}
    ops: ClassVar[dict[str, tuple[str, ...]]] = {linear_attention.OP: linear_attention.IMPLEMENTATIONS}

    def resolve(self, dim: int) -> Self:
        spec = super().resolve(dim)
        spec.require(
            spec.d_state % 2 == 0, f"d_state={spec.d_state}; valid: even numbers, since features turn in pairs"
        )
        return spec

    def shrink(self, width, heads, state) -> "Retention":
        return replace(super().shrink(width, heads, state), d_state=self.d_state)

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "RetentionMixer":
        return RetentionMixer(self, dim, scope, init, implementation)


def log_decays(heads: int) -> Float[Array, " H"]:
    """Returns log(1 - 2^(-5 - h)) for h = 0, 1, ...: a leading slice of heads keeps its decays."""
    return jnp.log1p(-(2.0 ** (-5 - jnp.arange(heads, dtype=jnp.float32))))


class RetentionMixer(nnx.Module):
    """out(rms(attend(rotary(q), rotary(k), v, decays)) * silu(x W_g)), q scaled by d_state^-0.5; 2DK + 3DV + V/H
    parameters.

    K and V are those of all heads; state: `memory` [B, num_heads, d_state, head_dim], float32. Positions are absolute:
    `call.position` on.
    """

    def __init__(self, spec: Retention, dim: int, scope: str, init: Init, implementation: str):
        self.spec, self.implementation = spec, implementation
        keys, values = (f"{scope}/heads", f"{scope}/qk/head_dim"), (f"{scope}/heads", f"{scope}/v/head_dim")
        self.q = head_kernel("q", dim, spec.num_heads, spec.d_state, keys, init)
        self.k = head_kernel("k", dim, spec.num_heads, spec.d_state, keys, init)
        self.v = head_kernel("v", dim, spec.num_heads, spec.head_dim, values, init)
        self.gate = head_kernel("gate", dim, spec.num_heads, spec.head_dim, values, init)
        self.norm = RMSNorm(spec.head_dim, values[1], init.child("norm"))
        self.out = out_kernel(dim, spec.num_heads, spec.head_dim, values, init)

    def __call__(
        self, x: Float[Array, "B *T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B *T D"], State]:
        q, k, v, gate = project(x, self.q, self.k, self.v, self.gate, implementation=self.implementation)
        positions = call.position + jnp.arange(x.shape[1]) if x.ndim == 3 else jnp.asarray(call.position)
        log_decay = jnp.broadcast_to(log_decays(self.spec.num_heads), v.shape[:-1])
        memory = None if state is None else state["memory"]
        y, memory = attend(
            rotary(q, positions), rotary(k, positions), v, memory, call, self.implementation, log_decay=log_decay
        )
        return join(self.norm(y) * jax.nn.silu(gate), self.out), {"memory": memory}

    def step(self, x: Float[Array, "B D"], call: Call, state: State) -> tuple[Float[Array, "B D"], State]:
        return self(x, call, state)

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> State:
        return empty(batch, self.spec.num_heads, self.spec.d_state, self.spec.head_dim)
