"""The implementations of the grouped matrix product: a masked loop over the groups, `lax.ragged_dot`, and blocks of
rows for a CPU.

Each implementation has two functions, for rows x [T, K] sorted by group, weights [E, K, N] and group sizes [E] that sum
to at most T:

    product(x, weights, sizes)           -> [T, N], zero in the rows beyond the sum
    gradients(x, weights, sizes, dy)     -> dx [T, K], zero there too, and dweights [E, K, N]

Operands have one dtype; sums are taken in float32 at least, and results are in the dtype of either.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from research.ops import precision

_dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Implementation(NamedTuple):
    """One way to compute a grouped matrix product and its two gradients."""

    product: Callable[..., Array]
    gradients: Callable[..., tuple[Array, Array]]


# --- naive: the definition --------------------------------------------------------------------------------------------


def naive(x: Array, weights: Array, sizes: Array) -> Array:
    """All rows with each group's weights in turn, those of other groups masked: E times the work; gradients by
    autodiff."""
    x, weights, ends = precision.wide(x), precision.wide(weights), jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0])[:, None]

    def add_group(y, group):
        weight, start, end = group
        return y + _dot(jnp.where((row >= start) & (row < end), x, 0), weight), None

    zeros = jnp.zeros((x.shape[0], weights.shape[2]), x.dtype)
    return lax.scan(add_group, zeros, (weights, ends - sizes, ends))[0]


def _naive_gradients(x, weights, sizes, dy):
    product, transpose = jax.vjp(lambda x, weights: naive(x, weights, sizes), x, weights)
    return transpose(dy.astype(product.dtype))


# --- ragged: XLA's own op, a kernel on accelerators, E times the work on a CPU ----------------------------------------

_OUTER = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])


def _wide_dtype(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _ragged(x, weights, sizes):
    y = lax.ragged_dot(x, weights, sizes, precision=lax.Precision.HIGHEST, preferred_element_type=_wide_dtype(x))
    # What a kernel leaves in rows of no group is not defined.
    return jnp.where(jnp.arange(x.shape[0])[:, None] < sizes.sum(), y, 0)


def _ragged_gradients(x, weights, sizes, dy):
    outer = functools.partial(
        lax.ragged_dot_general, ragged_dot_dimension_numbers=_OUTER, preferred_element_type=_wide_dtype(x)
    )
    return _ragged(dy, weights.swapaxes(1, 2), sizes), outer(x, dy, sizes, precision=lax.Precision.HIGHEST)


# --- blocks: as many products as the groups have blocks of rows -------------------------------------------------------

BLOCK_SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
FINEST = 8  # sizes below this part of the mean group would save less than compiling their loops costs


class _Cuts(NamedTuple):
    """Where the groups are cut: into blocks of the largest size, and a last one each that has 1 to that many rows.

    Attributes:
      sizes: static sizes of a block, ascending.
      starts, ends: of each group.
      full: number of blocks of the largest size in each group, and `full_ends` summed up to it.
      full_groups: the group of each of them.
      last_starts: first row of each group's last block.
      last_order: groups by the size that their last block is rounded up to.
      last_bounds: where in that order each size ends.
    """

    sizes: tuple[int, ...]
    starts: Array
    ends: Array
    full: Array
    full_ends: Array
    full_groups: Array
    last_starts: Array
    last_order: Array
    last_bounds: Array


def _cut(sizes: Array, num_rows: int) -> _Cuts:
    least = min(num_rows // len(sizes) // FINEST, BLOCK_SIZES[-1])
    block_sizes = tuple(size for size in BLOCK_SIZES if least <= size <= num_rows) or (num_rows,)
    largest = block_sizes[-1]
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    full = jnp.maximum(sizes - 1, 0) // largest
    last = sizes - full * largest
    # Empty groups sort behind the bounds of all sizes.
    kind = jnp.where(last > 0, (last[:, None] > jnp.array(block_sizes)).sum(1), len(block_sizes))
    full_ends = jnp.cumsum(full)
    return _Cuts(
        sizes=block_sizes,
        starts=starts,
        ends=ends,
        full=full,
        full_ends=full_ends,
        full_groups=(jnp.arange(max((num_rows - 1) // largest, 1))[:, None] >= full_ends).sum(1),
        last_starts=starts + full * largest,
        last_order=jnp.argsort(kind),
        last_bounds=(kind[:, None] <= jnp.arange(len(block_sizes))).sum(0),
    )


def _take(array, i):
    return lax.dynamic_index_in_dim(array, i, keepdims=False)


def _over_blocks(cuts: _Cuts, num_rows: int, step: Callable[..., Any], carry: Any) -> Any:
    """Folds `step(carry, group, start, size, mask)` over all blocks; mask [size, 1] marks the group's rows, None stands
    for all.

    A group's last block comes before its others: it is the first to touch the weights' gradient. A block that would
    reach beyond the last row starts earlier.
    """

    def last(size, state):
        i, carry = state
        group = _take(cuts.last_order, i)
        start = _take(cuts.last_starts, group)
        shifted = jnp.minimum(start, num_rows - size)
        row = shifted + jnp.arange(size)[:, None]
        return i + 1, step(carry, group, shifted, size, (row >= start) & (row < _take(cuts.ends, group)))

    def full(i, carry):
        group = _take(cuts.full_groups, i)
        start = (
            _take(cuts.starts, group) + (i + _take(cuts.full, group) - _take(cuts.full_ends, group)) * cuts.sizes[-1]
        )
        return step(carry, group, start, cuts.sizes[-1], None)

    def unfinished(kind, state):
        return state[0] < cuts.last_bounds[kind]

    state = jnp.zeros((), jnp.int32), carry
    for kind, size in enumerate(cuts.sizes):
        state = lax.while_loop(functools.partial(unfinished, kind), functools.partial(last, size), state)
    return lax.fori_loop(0, cuts.full_ends[-1], full, state[1])


def _read(array, start, size):
    return precision.wide(lax.dynamic_slice_in_dim(array, start, size))


def _write(array, block, start, mask):
    if mask is not None:
        block = jnp.where(mask, block, lax.dynamic_slice_in_dim(array, start, block.shape[0]))
    return lax.dynamic_update_slice_in_dim(array, block, start, 0)


def _blocks(x, weights, sizes):
    def step(y, group, start, size, mask):
        return _write(y, _dot(_read(x, start, size), precision.wide(_take(weights, group))), start, mask)

    zeros = jnp.zeros((x.shape[0], weights.shape[2]), _wide_dtype(x))
    return _over_blocks(_cut(sizes, x.shape[0]), x.shape[0], step, zeros)


def _blocks_gradients(x, weights, sizes, dy):
    def step(carry, group, start, size, mask):
        dx, dweights = carry
        x_block, dy_block = _read(x, start, size), _read(dy, start, size)
        if mask is not None:
            # Both, so that an infinity of another group stays there.
            x_block, dy_block = jnp.where(mask, x_block, 0), jnp.where(mask, dy_block, 0)
        dx = _write(dx, _dot(dy_block, precision.wide(_take(weights, group)).T), start, mask)
        # Kept apart: folded into the product, the transpose keeps it from XLA:CPU's library of kernels.
        dweight = _dot(lax.optimization_barrier(x_block.T), dy_block)
        if mask is None:
            dweight += _take(dweights, group)
        return dx, lax.dynamic_update_index_in_dim(dweights, dweight, group, 0)

    zeros = jnp.zeros(x.shape, _wide_dtype(x)), jnp.zeros(weights.shape, _wide_dtype(x))
    return _over_blocks(_cut(sizes, x.shape[0]), x.shape[0], step, zeros)


IMPLEMENTATIONS = {
    "naive": Implementation(naive, _naive_gradients),
    "ragged": Implementation(_ragged, _ragged_gradients),
    "blocks": Implementation(_blocks, _blocks_gradients),
}
