"""What decays do inside a chunk: to inner products of its tokens, to what enters it and to what leaves it.

Axes: ... batch-like, c (or i, j) tokens of a chunk, K key channels. With s(i, j) the sum of log decays over j < t <= i, token i sees
token j under e^s(i,j), what entered the chunk under e^s(i,-1), and hands itself on under e^s(last,i). A start of a segment between two of
them makes the factor zero. Exponents are always sums over a segment, never differences that cancel, and at most 0.
Source of the sub-blocks for vector decays: Yang et al. 2023 (arXiv 2312.06635, section 4.3), here in blocks that halve down to one token.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from research.ops import segment_sums


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
    between = sum(x[..., :, None] - x[..., None, :] for x in parts)
    factors = jnp.exp(jnp.where(allowed, between, -jnp.inf))
    return ChunkDecay(lambda x, y: _inner(x, y) * factors, *_cut(segment, enter, leave, enter[..., -1, :]))


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
    """Inner products under a decay per channel: pairs of neighbouring blocks meet at their border, where both exponents are at most 0."""
    size, width = x.shape[-2:]
    lead = x.shape[:-2]
    x, y, *parts = (a.reshape(-1, size, width) for a in (x, y, *parts))
    # A product with ones: as a reduction it would draw all the blocks below into one slow kernel on a CPU.
    itself = jnp.matmul(x * y, jnp.ones((width, 1), x.dtype), precision=lax.Precision.HIGHEST)
    scores = jnp.eye(size, dtype=x.dtype) * itself
    half = 1
    while half < size:
        scores = scores + _pairs(x, y, parts, half)
        half *= 2
    return scores.reshape(*lead, size, size)


def _pairs(x, y, parts, half):
    """For all pairs of blocks of `half` tokens: the second block's x against the first one's y, at their places in [c, c]."""
    count, size, width = x.shape
    pairs = size // (2 * half)
    split = lambda a: a.reshape(count, pairs, 2, half, width)
    blocks = [split(part) for part in parts]
    border = [b[:, :, 0, -1:] for b in blocks]
    from_border = jnp.exp(sum(b[:, :, 1] - edge for b, edge in zip(blocks, border)))
    to_border = jnp.exp(sum(edge - b[:, :, 0] for b, edge in zip(blocks, border)))
    product = _inner(split(x)[:, :, 1] * from_border, split(y)[:, :, 0] * to_border)  # [count, pairs, half, half]
    place = jnp.pad(product, [(0, 0), (0, 0), (half, 0), (0, half)])
    return (jnp.eye(pairs, dtype=x.dtype)[:, None, :, None] * place[:, :, :, None, :]).reshape(count, size, size)
