"""Softmax attention over blocks of queries and keys, in memory linear in the length, forwards and backwards.

A loop over blocks of queries holds a loop over those blocks of keys that a pattern of positions lets them see, with a
running maximum and sum. Kept for the gradient: inputs, output and the logarithm of the sum of each row; weights are
computed again. The order of work is FlashAttention-2's (Dao 2023, arXiv 2307.08691, algorithms 1 and 2); blocks outside
the pattern cost nothing.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from research.ops import precision

Bound = Int[Array, ""] | int
"""A position among the queries or keys."""


class Pattern(NamedTuple):
    """Which positions may see which; static.

    Args:
      before: keys that lie further back are not seen; None: no bound.
      after: keys that lie further ahead are not seen, 0 for causal attention; None: no bound.
      local: size of a block; keys before the block that precedes the query's own are not seen. None: no bound.
      offset: position of the first query among the keys.
    """

    before: int | None = None
    after: int | None = None
    local: int | None = None
    offset: int = 0

    def visible(self, query_at: Int[Array, " T"], key_at: Int[Array, " S"]) -> Bool[Array, "T S"]:
        """True where a query at one position sees a key at the other; positions count from the first key."""
        distance = query_at[:, None] - key_at
        seen = jnp.ones(distance.shape, bool)
        if self.before is not None:
            seen &= distance <= self.before
        if self.after is not None:
            seen &= distance >= -self.after
        if self.local is not None:
            seen &= key_at // self.local >= query_at[:, None] // self.local - 1
        return seen

    def span(self, first: Bound, last: Bound, keys: int) -> tuple[Bound, Bound]:
        """The first and the last key that queries at `first` to `last` can see, as a range that holds all of them."""
        low: Bound = 0
        high: Bound = keys - 1
        if self.before is not None:
            low = jnp.maximum(first - self.before, low)
        if self.local is not None:
            low = jnp.maximum((first // self.local - 1) * self.local, low)
        if self.after is not None:
            high = jnp.minimum(last + self.after, high)
        return low, high


class Operands(NamedTuple):
    """Arrays of `attend`: query heads are grouped under the key head that they read.

    Masks broadcast over their axes of size 1; the gradient is with respect to query, key and value.
    """

    query: Float[Array, "B G R T K"]
    key: Float[Array, "B G S K"]
    value: Float[Array, "B G S V"]
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    mask: Bool[Array, "#B #G #R #T #S"] | None = None


class Blocks(NamedTuple):
    """Sizes of the blocks, and what is static of a call beside them."""

    rows: int
    columns: int
    pattern: Pattern
    scale: float


def attend(operands: Operands, blocks: Blocks) -> Float[Array, "B G R T V"]:
    """softmax(scale q k^T) v over the visible keys; rows that see no key give zeros.

    Args:
      operands: arrays; query, key and value of one dtype.
      blocks: sizes of the blocks, pattern and scale.

    Returns:
      Output in the dtype of the value; sums are taken in float32 at least. Differentiable once, in reverse.
    """
    return _attend(blocks, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks, *operands):
    return _forward(blocks, *operands)[0]


def _low(dtype):
    """A logit that no real one comes near; finite, so that differences of two stay numbers."""
    return 0.7 * float(jnp.finfo(dtype).min)


def _padded(x, axis, multiple):
    missing = -x.shape[axis] % multiple
    return x if not missing else jnp.pad(x, [(0, missing if a == axis % x.ndim else 0) for a in range(x.ndim)])


class _Walk:
    """Blocks of padded operands: slices, masks and the range of key blocks of a query block."""

    def __init__(self, blocks: Blocks, operands: Operands):
        self.blocks, self.keys = blocks, operands.key.shape[2]
        query, key, value, query_segments, key_segments, mask = operands
        self.query = _padded(precision.wide(query) * blocks.scale, 3, blocks.rows)
        self.key, self.value = (_padded(precision.wide(x), 2, blocks.columns) for x in (key, value))
        self.segments = (
            None
            if query_segments is None
            else (_padded(query_segments, 1, blocks.rows), _padded(key_segments, 1, blocks.columns))
        )
        self.mask = mask
        if mask is not None:
            mask = mask if mask.shape[3] == 1 else _padded(mask, 3, blocks.rows)
            self.mask = mask if mask.shape[4] == 1 else _padded(mask, 4, blocks.columns)

    @property
    def row_blocks(self) -> int:
        return self.query.shape[3] // self.blocks.rows

    def rows(self, x, i, axis=3):
        """Block i of an array with queries on `axis`."""
        return lax.dynamic_slice_in_dim(x, i * self.blocks.rows, self.blocks.rows, axis)

    def columns(self, x, j, axis=2):
        """Block j of an array with keys on `axis`."""
        return lax.dynamic_slice_in_dim(x, j * self.blocks.columns, self.blocks.columns, axis)

    def range(self, i: Bound) -> tuple[Bound, Bound]:
        """First key block, and one after the last, that query block i sees."""
        first = i * self.blocks.rows + self.blocks.pattern.offset
        low, high = self.blocks.pattern.span(first, first + self.blocks.rows - 1, self.keys)
        return low // self.blocks.columns, high // self.blocks.columns + 1

    def logits(self, query_block, i, j):
        """Logits of query block i against key block j, `_low` where there is nothing to see."""
        logits = jnp.einsum("bgrtk,bgsk->bgrts", query_block, self.columns(self.key, j))
        query_at = i * self.blocks.rows + self.blocks.pattern.offset + jnp.arange(self.blocks.rows)
        key_at = j * self.blocks.columns + jnp.arange(self.blocks.columns)
        seen = self.blocks.pattern.visible(query_at, key_at)
        if self.keys % self.blocks.columns:
            seen &= key_at < self.keys
        if self.segments is not None:
            same = self.rows(self.segments[0], i, 1)[:, :, None] == self.columns(self.segments[1], j, 1)[:, None]
            seen = seen & same[:, None, None]
        if self.mask is not None:
            mask = self.mask if self.mask.shape[3] == 1 else self.rows(self.mask, i)
            seen = seen & (mask if mask.shape[4] == 1 else self.columns(mask, j, 4))
        return jnp.where(seen, logits, _low(logits.dtype))


def _forward(blocks, *operands):
    operands = Operands(*operands)
    walk = _Walk(blocks, operands)
    dtype, low = walk.query.dtype, _low(walk.query.dtype)
    shape = (*walk.query.shape[:3], blocks.rows)

    def row_block(i):
        query_block = walk.rows(walk.query, i)

        def column_block(j, carry):
            peak, total, out = carry
            logits = walk.logits(query_block, i, j)
            new_peak = jnp.maximum(peak, logits.max(-1))
            weights = jnp.exp(logits - new_peak[..., None])
            shrink = jnp.exp(peak - new_peak)
            product = jnp.einsum("bgrts,bgsv->bgrtv", weights, walk.columns(walk.value, j))
            return new_peak, total * shrink + weights.sum(-1), out * shrink[..., None] + product

        start = jnp.full(shape, low, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, walk.value.shape[-1]), dtype)
        first, end = walk.range(i)
        peak, total, out = lax.fori_loop(first, end, column_block, start)
        # A row that has seen nothing has summed exp(low - low): its sums are dropped, and a zero log-sum-exp makes its
        # weights zero later.
        seen = peak > low
        return jnp.where(seen[..., None], out / jnp.where(seen, total, 1)[..., None], 0), jnp.where(
            seen, peak + jnp.log(total), 0
        )

    out, log_sum = lax.map(row_block, jnp.arange(walk.row_blocks))
    length = operands.query.shape[3]
    out = jnp.moveaxis(out, 0, 3).reshape(*shape[:3], -1, out.shape[-1])[:, :, :, :length]
    log_sum = jnp.moveaxis(log_sum, 0, 3).reshape(*shape[:3], -1)[..., :length]
    out = out.astype(operands.value.dtype)
    return out, (operands, out, log_sum)


def _backward(blocks, residuals, d_out):
    operands, out, log_sum = residuals
    walk = _Walk(blocks, operands)
    d_out = precision.wide(d_out)
    along = _padded((d_out * precision.wide(out)).sum(-1), 3, blocks.rows)
    d_out, log_sum = _padded(d_out, 3, blocks.rows), _padded(log_sum, 3, blocks.rows)

    def row_block(carry, i):
        query_block, d_block = walk.rows(walk.query, i), walk.rows(d_out, i)
        log_sum_block, along_block = walk.rows(log_sum, i)[..., None], walk.rows(along, i)[..., None]

        def column_block(j, carry):
            d_query, d_key, d_value = carry
            weights = jnp.exp(walk.logits(query_block, i, j) - log_sum_block)
            d_weights = jnp.einsum("bgrtv,bgsv->bgrts", d_block, walk.columns(walk.value, j))
            d_logits = weights * (d_weights - along_block)
            d_query += jnp.einsum("bgrts,bgsk->bgrtk", d_logits, walk.columns(walk.key, j))
            at = j * blocks.columns
            d_key_block = walk.columns(d_key, j) + jnp.einsum("bgrts,bgrtk->bgsk", d_logits, query_block)
            d_value_block = walk.columns(d_value, j) + jnp.einsum("bgrts,bgrtv->bgsv", weights, d_block)
            return (
                d_query,
                lax.dynamic_update_slice_in_dim(d_key, d_key_block, at, 2),
                lax.dynamic_update_slice_in_dim(d_value, d_value_block, at, 2),
            )

        first, end = walk.range(i)
        d_query, *carry = lax.fori_loop(first, end, column_block, (jnp.zeros_like(query_block), *carry))
        return tuple(carry), d_query

    start = jnp.zeros_like(walk.key), jnp.zeros_like(walk.value)
    (d_key, d_value), d_query = lax.scan(row_block, start, jnp.arange(walk.row_blocks))
    query, key, value = operands[:3]
    d_query = jnp.moveaxis(d_query, 0, 3).reshape(walk.query.shape)[:, :, :, : query.shape[3]] * blocks.scale
    d_key, d_value = d_key[:, :, : key.shape[2]], d_value[:, :, : value.shape[2]]
    return (
        *(d.astype(x.dtype) for d, x in zip((d_query, d_key, d_value), (query, key, value), strict=True)),
        None,
        None,
        None,
    )


_attend.defvjp(_forward, _backward)


def attend_parallel(operands: Operands, blocks: Blocks) -> Float[Array, "B G R T V"]:
    """The same for a pattern that is bounded both ways, without a loop: every block of queries beside copies of the
    blocks that it sees.

    Args:
      operands: arrays, without a mask.
      blocks: rows is the size of all blocks, and `pattern.local` if that is set.

    Returns:
      Output in the dtype of the value. Products of matrices for back ends that want them large; gradient by autodiff.

    Raises:
      ValueError: the pattern is not bounded both ways.
    """
    size, pattern, _ = blocks.rows, blocks.pattern, operands.mask
    query = _padded(precision.wide(operands.query) * blocks.scale, 3, size)
    count, keys = query.shape[3] // size, operands.key.shape[2]
    before = size if pattern.local is not None else pattern.before
    if before is None or pattern.after is None:
        raise ValueError(f"attend_parallel: {pattern} is not bounded both ways")
    back, ahead = -(-before // size), -(-pattern.after // size)
    front = back * size - pattern.offset

    def beside(x, axis):
        """Blocks of keys, and for each block of queries those that it sees: [.., count, (back + 1 + ahead) * size,
        ..]."""
        end = (back + count + ahead) * size - front - keys
        x = jnp.pad(x, [(front, max(end, 0)) if a == axis else (0, 0) for a in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
        shifts = [lax.slice_in_dim(x, i, i + count, axis=axis) for i in range(back + 1 + ahead)]
        return jnp.concatenate(shifts, axis + 1)

    query = query.reshape(*query.shape[:3], count, size, -1)
    query_at = pattern.offset + jnp.arange(count * size).reshape(count, size)
    key_at = jnp.arange((back + 1 + ahead) * size) - front + size * jnp.arange(count)[:, None]
    seen = jax.vmap(pattern.visible)(query_at, key_at) & ((key_at >= 0) & (key_at < keys))[:, None]
    if operands.query_segments is not None:
        query_segments = _padded(operands.query_segments, 1, size).reshape(-1, count, size)
        seen = seen & (query_segments[..., None] == beside(operands.key_segments, 1)[:, :, None])[:, None, None]
    logits = jnp.einsum("bgrntk,bgnsk->bgrnts", query, beside(precision.wide(operands.key), 2))
    logits = jnp.where(seen, logits, _low(logits.dtype))
    peak = lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - peak), 0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    out = jnp.einsum("bgrnts,bgnsv->bgrntv", weights, beside(precision.wide(operands.value), 2))
    out = out.reshape(*out.shape[:3], count * size, -1)[:, :, :, : operands.query.shape[3]]
    return out.astype(operands.value.dtype)
