"""What decays do inside a chunk: to inner products of its tokens, to what enters it and to what leaves it.

Axes: ... batch-like, c (or i, j) tokens of a chunk, K key channels. With s(i, j) the sum of log decays over j < t <= i,
token i sees token j under e^s(i,j), what entered the chunk under e^s(i,-1), and hands itself on under e^s(last,i). A
start of a segment between two of them makes the factor zero. Exponents are always sums over a segment, never
differences that cancel, and at most 0. Source of the sub-blocks for vector decays: Yang et al. 2023 (arXiv 2312.06635,
section 4.3), here in blocks that halve down to one token.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from research.ops import segment_sums
from research.ops.spread import spread
from research.ops.unit_lower import lower_left_of_pairs


class ChunkDecay(NamedTuple):
    """Factors of one chunk; None stands for ones."""

    scores: Callable[[Array, Array], Array]  # x, y [..., c, K] to [..., i, j]: sum_K x_i y_j e^s(i,j), zero for j > i
    enter: Array | None  # [..., c, 1 or K]
    leave: Array | None  # [..., c, 1 or K]
    total: Array | None  # [..., 1 or K]


def make(log_decay: Array | None, starts: Array | None, size: int, *, vector: bool) -> ChunkDecay:
    """The factors of chunks of `size` tokens.

    Args:
      log_decay: [..., c] (scalar decays), [..., c, K] (vector decays) or None.
      starts: True where a token starts a segment, broadcastable to [..., c]; None where none does.
      size: c.
      vector: which of the two log_decay is.
    """
    segment = None if starts is None else jnp.cumsum(starts.astype(jnp.int32), -1)
    causal = np.tril(np.ones((size, size), bool))
    allowed = causal if segment is None else causal & (segment[..., :, None] == segment[..., None, :])
    if log_decay is None:
        scores = lambda x, y: jnp.where(allowed, _inner(x, y), 0)
        return ChunkDecay(scores, *_cut(segment, None, None, None))
    if vector:
        parts = segment_sums.running_sums(log_decay, -2)
        enter = jnp.exp(sum(parts))
        leave = jnp.exp(sum(x[..., -1:, :] - x for x in parts))
        scores = lambda x, y: jnp.where(allowed, _vector_scores(x, y, parts), 0)
        return ChunkDecay(scores, *_cut(segment, enter, leave, enter[..., -1, :]))
    parts = segment_sums.running_sums(log_decay)
    enter = jnp.exp(sum(parts))[..., None]
    leave = jnp.exp(sum(x[..., -1:] - x for x in parts))[..., None]
    between = sum(spread(x[..., :, None], -1, size) - spread(x[..., None, :], -2, size) for x in parts)
    factors = jnp.exp(jnp.where(allowed, between, -jnp.inf))
    heads = factors.shape[-3]
    return ChunkDecay(
        lambda x, y: spread(_inner(x, y), -3, heads) * factors, *_cut(segment, enter, leave, enter[..., -1, :])
    )


def _cut(segment, enter, leave, total):
    """Zeros for what a segment's start keeps apart."""
    if segment is None:
        return enter, leave, total
    first, last = segment == 0, segment == segment[..., -1:]
    cut = lambda keep, factor: keep.astype(jnp.float32) if factor is None else jnp.where(keep, factor, 0)
    return cut(first[..., None], enter), cut(last[..., None], leave), cut(first[..., -1:], total)


def _inner(x, y):
    return jnp.einsum("...ik,...jk->...ij", x, y, precision=lax.Precision.HIGHEST)


def _vector_scores(x, y, parts):
    """Inner products under a decay per channel.

    Blocks of 1, 2, 4, ... tokens meet their neighbour at the border between them: what the second one reads decays from
    the border, what the first one writes decays to it, and both exponents are at most 0. Each pair of tokens meets at
    one such border.
    """
    size, width = x.shape[-2:]
    itself = jnp.matmul(x * y, jnp.ones((width, 1), x.dtype), precision=lax.Precision.HIGHEST)
    scores = np.eye(size, dtype=x.dtype) * spread(itself, -1, size)
    half = 1
    while half < size:
        factor = jnp.exp(_distance_to_border(parts, half))
        scores = scores + lower_left_of_pairs(size, half) * _inner(x * factor, y * factor)
        half *= 2
    return scores


def _distance_to_border(parts, half):
    """Sums of log decays [..., c, K] from the border of a token's pair of blocks to the token, or from the token to the
    border."""
    *lead, size, width = parts[0].shape
    pairs = [part.reshape(*lead, size // (2 * half), 2 * half, width) for part in parts]
    after = sum(pair - spread(pair[..., half - 1 : half, :], -2, 2 * half) for pair in pairs)
    sign = np.where(np.arange(2 * half) < half, -1, 1).astype(after.dtype)[:, None]
    return (after * sign).reshape(*lead, size, width)
