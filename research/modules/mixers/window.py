"""Softmax attention to the last tokens only (Beltagy et al. 2020, Longformer, arXiv 2004.05150, section 3.1), its
causal half.

The state holds window - 1 tokens, whatever the length; `layers * (window - 1)` tokens reach an output of a deep model.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from jaxtyping import Array, Float

from research.modules.axes import Init
from research.modules.mixers.attention import NOTHING, Attention, AttentionMixer, documents
from research.modules.mixers.base import Call, State, register
from research.ops import sliding_window
from research.ops.sliding_window import WindowState, sliding_window_attention, sliding_window_extend


@register
@dataclass(frozen=True)
class Window(Attention):
    """As `Attention`; `window`: tokens that a token sees, itself included."""

    window: int = 512

    kind: ClassVar[str] = "window"
    paper: ClassVar[str] = "arXiv 2004.05150"
    small: ClassVar[dict[str, Any]] = {"num_heads": 6, "window": 64}
    tiny: ClassVar[dict[str, Any]] = {"num_heads": 2, "head_dim": 8, "window": 5}
    bounded: ClassVar[bool] = False
    ops: ClassVar[dict[str, tuple[str, ...]]] = {sliding_window.OP: sliding_window.IMPLEMENTATIONS}

    def resolve(self, dim: int) -> Self:
        self.require(self.window >= 1, f"window={self.window}; valid: whole numbers from 1")
        self.require(self.causal, "causal=False; valid: True, the window ends at the token itself")
        return super().resolve(dim)

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "WindowMixer":
        return WindowMixer(self, dim, scope, init, implementation)


class WindowMixer(AttentionMixer):
    """Parameters as in `AttentionMixer`; state: `k`, `v` [B, window - 1, G, K], keys after RoPE, and `ids` [B, window -
    1]."""

    spec: Window

    def __call__(
        self, x: Float[Array, "B T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        query, key, value = self.project(x, call.position + jnp.arange(x.shape[1]))
        y, state = window_attention(query, key, value, call.segment_ids, state, self.spec.window, self.implementation)
        return self.merge(y), state

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> State:
        return init_window(batch, self.spec.window, self.key.shape[-2], self.spec.head_dim, dtype)


def init_window(batch: int, window: int, heads: int, head_dim: int, dtype: Any) -> State:
    """The state before the first token."""
    shape = (batch, window - 1, heads, head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype), "ids": jnp.full(shape[:2], NOTHING, jnp.int32)}


def window_attention(
    query, key, value, segment_ids, state: State | None, window: int, implementation: str
) -> tuple[Array, State]:
    """Sliding-window attention from the start (`state` None) or from a state, and the state after it; arrays [B, T, H,
    K]."""
    if state is None:
        y = sliding_window_attention(
            query, key, value, window=window, segment_ids=segment_ids, implementation=implementation
        )
        new = {"k": key, "v": value, "ids": documents(segment_ids, None, 0, key.shape[:2])}
        start = init_window(key.shape[0], window, key.shape[2], key.shape[3], key.dtype)
        return y, {name: jnp.concatenate([start[name], new[name]], 1)[:, key.shape[1] :] for name in start}
    if segment_ids is None and window > 1:
        # Tokens without ids continue in the document of the last token.
        segment_ids = jnp.broadcast_to(jnp.maximum(state["ids"][:, -1:], 0), key.shape[:2])
    before = WindowState(state["k"].astype(key.dtype), state["v"].astype(key.dtype), state["ids"])
    y, after = sliding_window_extend(query, key, value, before, segment_ids=segment_ids, implementation=implementation)
    return y, {
        "k": after.key.astype(state["k"].dtype),
        "v": after.value.astype(state["v"].dtype),
        "ids": after.segment_ids,
    }
