"""Attention to a window of positions, in time and memory linear in the length, and step by step from the last keys.

Patterns: a sliding window (Beltagy et al. 2020, Longformer, arXiv 2004.05150, section 3.1) and the local heads of the
Routing Transformer (Roy et al. 2021, arXiv 2003.05997, section 4): a block and the one before it. On a CPU a loop over
blocks of queries (`attention_blocks.attend`), elsewhere all blocks at once.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.ops import attention_blocks, checks, dispatch
from research.ops.attention import softmax_attention
from research.ops.attention_blocks import Blocks, Operands, Pattern

OP = "sliding_window_attention"
IMPLEMENTATIONS = ("naive", "parallel", "chunked")
NOTHING = -1
"""Segment of the places of a state that hold no token yet; segments of tokens are 0 or more."""


class WindowState(NamedTuple):
    """The last window - 1 keys and values, oldest first."""

    key: Float[Array, "*B W G K"]
    value: Float[Array, "*B W G V"]
    segment_ids: Int[Array, "*B W"]


def window_state(key: Float[Array, "*B S G K"], value: Float[Array, "*B S G V"], window: int) -> WindowState:
    """The state before the first token, for keys and values like these."""

    def empty(x):
        return jnp.zeros((*x.shape[:-3], window - 1, *x.shape[-2:]), x.dtype)

    return WindowState(empty(key), empty(value), jnp.full((*key.shape[:-3], window - 1), NOTHING, jnp.int32))


def sliding_window_attention(
    query: Float[Array, "*B T H K"],
    key: Float[Array, "*B T G K"],
    value: Float[Array, "*B T G V"],
    *,
    window: int,
    causal: bool = True,
    segment_ids: Int[Array, "*B T"] | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Float[Array, "*B T H V"]:
    """Softmax attention of each token to itself and the window - 1 before it, and as many after it if not causal.

    Args:
      query: H heads, a multiple of G; head h reads key head h // (H / G).
      key: keys.
      value: values.
      window: number of tokens seen, the token itself included; with causal=False, on each side.
      causal: False: the window reaches ahead as far as back.
      segment_ids: sequences packed on one axis see only themselves.
      scale: factor of the logits; K^-0.5 by default.
      implementation: see `dispatch.resolve`; the reference implementation is a masked full attention.

    Returns:
      Output in the dtype of the value.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    checks.require(window >= 1, OP, "window", window, "at least 1")
    checks.shapes(
        OP,
        query=(query, "*B T H K"),
        key=(key, "*B T G K"),
        value=(value, "*B T G V"),
        segment_ids=(segment_ids, "*B T"),
    )
    pattern = Pattern(before=window - 1, after=0 if causal else window - 1)
    return _attend(OP, query, key, value, pattern, segment_ids, segment_ids, scale, implementation)


def block_local_attention(
    query: Float[Array, "*B T H K"],
    key: Float[Array, "*B T G K"],
    value: Float[Array, "*B T G V"],
    *,
    block: int,
    segment_ids: Int[Array, "*B T"] | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Float[Array, "*B T H V"]:
    """Causal softmax attention of each token to the tokens of its own block and of the block before it.

    Args:
      query, key, value, segment_ids, scale, implementation: as in `sliding_window_attention`.
      block: tokens in a block; the last one may be shorter.

    Returns:
      Output in the dtype of the value.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    op = "block_local_attention"
    checks.require(block >= 1, op, "block", block, "at least 1")
    checks.shapes(
        op,
        query=(query, "*B T H K"),
        key=(key, "*B T G K"),
        value=(value, "*B T G V"),
        segment_ids=(segment_ids, "*B T"),
    )
    return _attend(
        op, query, key, value, Pattern(after=0, local=block), segment_ids, segment_ids, scale, implementation
    )


def sliding_window_extend(
    query: Float[Array, "*B T H K"],
    key: Float[Array, "*B T G K"],
    value: Float[Array, "*B T G V"],
    state: WindowState,
    *,
    segment_ids: Int[Array, "*B T"] | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "*B T H V"], WindowState]:
    """Continues from a state: `sliding_window_attention` of the whole sequence, a piece (or one token, T = 1) at a
    time.

    Args:
      query, key, value, segment_ids, scale, implementation: the new tokens, as in `sliding_window_attention`; without
        segment_ids all are 0.
      state: what the pieces before left, at first `window_state(key, value, window)`; its length gives the window.

    Returns:
      The new tokens' output, and the state after them.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    op = "sliding_window_extend"
    checks.shapes(
        op,
        query=(query, "*B T H K"),
        key=(key, "*B T G K"),
        value=(value, "*B T G V"),
        segment_ids=(segment_ids, "*B T"),
    )
    named = {
        "state.key": (state.key, "*B W G K"),
        "state.value": (state.value, "*B W G V"),
        "state.segment_ids": (state.segment_ids, "*B W"),
    }
    checks.shapes(op, key=(key, "*B T G K"), value=(value, "*B T G V"), **named)
    if segment_ids is None:
        segment_ids = jnp.zeros(key.shape[:-2], jnp.int32)
    before = state.key.shape[-3]
    all_keys = jnp.concatenate([state.key, key.astype(state.key.dtype)], -3)
    all_values = jnp.concatenate([state.value, value.astype(state.value.dtype)], -3)
    all_segments = jnp.concatenate([state.segment_ids, segment_ids.astype(jnp.int32)], -1)
    pattern = Pattern(before=before, after=0, offset=before)
    if query.shape[-3] == 1 and implementation in ("auto", "cpu"):
        implementation = "naive"  # one row of logits: there is nothing to leave out
    out = _attend(op, query, all_keys, all_values, pattern, segment_ids, all_segments, scale, implementation)
    tokens = key.shape[-3]
    return out, WindowState(all_keys[..., tokens:, :, :], all_values[..., tokens:, :, :], all_segments[..., tokens:])


def _attend(op, query, key, value, pattern, query_segments, key_segments, scale, implementation):
    implementation = dispatch.resolve(implementation, OP, IMPLEMENTATIONS)
    batch, (heads, size), groups = query.shape[:-3], query.shape[-2:], key.shape[-2]
    checks.require(
        heads % groups == 0, op, "query", f"of {heads} heads", f"a multiple of the {groups} heads of key and value"
    )
    scale = size**-0.5 if scale is None else scale
    if implementation == "naive":
        mask = pattern.visible(pattern.offset + jnp.arange(query.shape[-3]), jnp.arange(key.shape[-3]))
        if query_segments is not None:
            mask = (mask & (query_segments[..., :, None] == key_segments[..., None, :]))[..., None, :, :]
        return softmax_attention(query, key, value, mask=mask, scale=scale, implementation="naive")
    query = query.reshape(-1, query.shape[-3], groups, heads // groups, size)
    key, value = (x.reshape(-1, *x.shape[len(batch) :]) for x in (key, value))
    query_segments, key_segments = (
        None if s is None else s.reshape(-1, s.shape[-1]) for s in (query_segments, key_segments)
    )
    operands = Operands(
        jnp.moveaxis(query, 1, 3), jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2), query_segments, key_segments
    )
    chunked = functools.partial(_chunked, pattern=pattern, scale=scale)
    # The weights of all blocks are the largest arrays here: the gradient computes them again.
    parallel = jax.checkpoint(functools.partial(_parallel, pattern=pattern, scale=scale))
    if implementation in ("auto", "cpu"):
        out = dispatch.per_platform(implementation, chunked, parallel, operands)
    else:
        out = chunked(operands) if implementation == "chunked" else parallel(operands)
    return jnp.moveaxis(out, 3, 1).reshape(*batch, -1, heads, value.shape[-1])


def _reach(pattern):
    return pattern.local if pattern.local is not None else pattern.before + 1


def _chunked(operands, *, pattern, scale):
    size = _block_size(_reach(pattern), operands.query.shape[3])
    return attention_blocks.attend(operands, Blocks(size, size, pattern, scale))


def _parallel(operands, *, pattern, scale):
    size = pattern.local or _block_size(_reach(pattern), operands.query.shape[3])
    return attention_blocks.attend_parallel(operands, Blocks(size, size, pattern, scale))


def _block_size(reach, length):
    """A quarter of the reach bounds the work that is masked away at a fifth; blocks smaller than 64 make poor
    products."""
    return min(max(_power_of_two(reach) // 4, 64), 256, _power_of_two(length))


def _power_of_two(length):
    return 1 << math.ceil(math.log2(max(length, 1)))
