"""Depthwise convolution as a sum of shifted maps, one multiply-add per tap: few taps stream at memory speed.

The weight gradient keeps one accumulator per tap, of the size of a block of rows, so that nothing is reduced until the
end and each block of the maps is read while it is cached. Both can leave out taps that reach into another segment,
which packed sequences want: `ids` are then the segment numbers of inputs and of outputs, integers [B, H, W, 1].
"""

import functools
import math

import jax.numpy as jnp
from jax import lax

from research.ops import depthwise_geometry as geometry

_UNROLLED_TAPS = 49
_TAPS_OF_A_STEP = 32
_FUSED_PAD_TAPS = 9  # beyond it the bounds that each tap checks cost more than a padded copy
_ACCUMULATED_TAPS = 25
_ACCUMULATED_NUMBERS = (
    2**15
)  # of a block; the blocks of input and gradient and the accumulators stay in the second-level cache
_SUMMED_NUMBERS = 2**14  # of the whole gradient; below it the steps of the loop cost more than they save
_BLOCKS_AT_ONCE = 4


def conv(x, kernels, branches):
    return tuple(conv_single(x, k, b) for k, b in zip(kernels, branches, strict=True))


def input_grad(kernels, grads, branches, extent):
    terms = [input_grad_single(k, g, b, extent) for k, g, b in zip(kernels, grads, branches, strict=True)]
    return functools.reduce(jnp.add, terms)


def weight_grad(x, grads, branches):
    return tuple(weight_grad_single(x, g, b) for g, b in zip(grads, branches, strict=True))


def _taps(branch):
    return [(i, j) for i in range(branch.size[0]) for j in range(branch.size[1])]


def _shifted(x, branch, i, j, rows):
    """`rows` rows of the padded map x [..., H, W, C] under tap (i, j)."""
    (dh, dw), columns = branch.dilation, branch.out[1]
    return x[..., i * dh : i * dh + rows, j * dw : j * dw + columns, :]


def _is_flat(x, branch):
    return x.shape[2] == 1 and branch.size[1] == 1 and branch.out[1] == 1


# --- convolution ------------------------------------------------------------------------------------------------------


def conv_single(x, kernel, branch, ids=None):
    """One kernel's output; with `ids`, without the taps that reach into another segment."""
    rows, taps = branch.out[0], _taps(branch)
    if _is_flat(x, branch) and len(taps) <= _FUSED_PAD_TAPS:
        views = (_pad_for_tap(x, branch, i) for i, _ in taps)
    elif len(taps) <= _UNROLLED_TAPS or 1 in branch.size:
        padded = geometry.pad(x, branch)
        views = (_shifted(padded, branch, i, j, rows) for i, j in taps)
    else:
        return _conv_by_rows(geometry.pad(x, branch), kernel, branch)
    terms = (view * kernel[i, j] for view, (i, j) in zip(views, taps, strict=True))
    if ids is not None:
        ids_in = geometry.pad(ids[0], branch)
        terms = (
            jnp.where(_shifted(ids_in, branch, i, j, rows) == ids[1], term, 0)
            for term, (i, j) in zip(terms, taps, strict=True)
        )
    return functools.reduce(jnp.add, terms)


def _pad_for_tap(x, branch, i):
    """The map of one column under tap i as one shift of the map itself: it fuses, so nothing is copied first."""
    low = branch.low[0] - i * branch.dilation[0]
    return lax.pad(
        x, jnp.zeros((), x.dtype), [(0, 0, 0), (low, branch.out[0] - x.shape[1] - low, 0), (0, 0, 0), (0, 0, 0)]
    )


def _conv_by_rows(padded, kernel, branch):
    """A loop over groups of rows of the kernel: the program stays small, and each step is long enough to stream."""
    (rows, columns), reach = branch.size, branch.dilation[0]
    group = max(2, _TAPS_OF_A_STEP // columns)
    count = rows // group

    def group_sum(maps, taps):
        shifted = (
            (_shifted(maps, branch, i, j, branch.out[0]), taps[i, j]) for i in range(len(taps)) for j in range(columns)
        )
        return functools.reduce(jnp.add, (view * tap for view, tap in shifted))

    def add_group(n, total):
        maps = lax.dynamic_slice_in_dim(padded, n * group * reach, branch.out[0] + (group - 1) * reach, axis=1)
        return total + group_sum(maps, lax.dynamic_slice_in_dim(kernel, n * group, group))

    left = count * group
    zeros = jnp.zeros((padded.shape[0], *branch.out, padded.shape[-1]), padded.dtype)
    total = group_sum(padded[:, left * reach :], kernel[left:]) if left < rows else zeros
    return lax.fori_loop(0, count, add_group, total)


def input_grad_single(kernel, g, branch, extent, ids=None):
    """The gradient of the map: the convolution of the output's gradient with the kernel turned by 180 degrees."""
    return conv_single(g, kernel[::-1, ::-1], geometry.flipped(branch, extent), ids and ids[::-1])


# --- weight gradient --------------------------------------------------------------------------------------------------


def weight_grad_single(x, g, branch, ids=None):
    """One kernel's gradient, summed block by block: the implementation for a CPU."""
    if g.size <= _SUMMED_NUMBERS:
        return weight_grad_plain(x, g, branch, ids)
    x, ids = geometry.pad(x, branch), ids and (geometry.pad(ids[0], branch), ids[1])
    taps = _taps(branch)
    if len(taps) <= _ACCUMULATED_TAPS or 1 in branch.size:
        groups = [taps[i : i + _ACCUMULATED_TAPS] for i in range(0, len(taps), _ACCUMULATED_TAPS)]
        sums = jnp.concatenate([_tap_sums(x, g, branch, group, ids) for group in groups])
        return sums.reshape(*branch.size, -1)

    def row_grads(i):
        rows = lax.dynamic_slice_in_dim(x, i * branch.dilation[0], branch.out[0], axis=1)
        return _tap_sums(rows, g, branch, [(0, j) for j in range(branch.size[1])], None)

    return lax.map(row_grads, jnp.arange(branch.size[0]))


def weight_grad_plain(x, g, branch, ids=None):
    """One kernel's gradient by one reduction per tap, in a loop over the rows of the kernel: no long loop on any
    platform."""
    x, ids_in = geometry.pad(x, branch), None if ids is None else geometry.pad(ids[0], branch)

    def row_grads(i):
        at = lambda v: lax.dynamic_slice_in_dim(v, i * branch.dilation[0], branch.out[0], axis=1)
        sums = []
        for j in range(branch.size[1]):
            product = _shifted(at(x), branch, 0, j, branch.out[0]) * g
            if ids is not None:
                product = jnp.where(_shifted(at(ids_in), branch, 0, j, branch.out[0]) == ids[1], product, 0)
            sums.append(product.sum((0, 1, 2)))
        return jnp.stack(sums)

    return lax.map(row_grads, jnp.arange(branch.size[0]))


def _block_rows(rows, row_size):
    """Rows of a block: about _ACCUMULATED_NUMBERS, a divisor of all rows if one is near."""
    most = max(1, min(rows, _ACCUMULATED_NUMBERS // row_size))
    return next((r for r in range(most, most // 2, -1) if rows % r == 0), most)


def _tap_sums(padded, g, branch, taps, ids):
    """Sums of products of the gradient with the padded map under each tap: [taps, C]."""
    rows = branch.out[0]
    block = _block_rows(rows, math.prod(g.shape[2:]))
    whole = rows - rows % block
    sums = _sums_over_blocks(padded, g, branch, taps, ids, 0, block, rows // block)
    return sums if whole == rows else sums + _sums_over_blocks(padded, g, branch, taps, ids, whole, rows - whole, 1)


def _sums_over_blocks(padded, g, branch, taps, ids, start, block, count):
    """`_tap_sums` over `count` blocks of `block` rows from row `start` of each map."""
    halo, total = max(i for i, _ in taps) * branch.dilation[0], g.shape[0] * count
    at_once = math.gcd(total, _BLOCKS_AT_ONCE)

    def cut(v, index, rows):
        begin = (index // count, start + index % count * block, 0, 0)
        return lax.dynamic_slice(v, begin, (1, rows, *v.shape[2:]))[0]

    def products(index):
        x_1, g_1 = cut(padded, index, block + halo), cut(g, index, block)
        terms = [_shifted(x_1, branch, i, j, block) * g_1 for i, j in taps]
        if ids is None:
            return terms
        in_1, out_1 = cut(ids[0], index, block + halo), cut(ids[1], index, block)
        return [
            jnp.where(_shifted(in_1, branch, i, j, block) == out_1, term, 0)
            for term, (i, j) in zip(terms, taps, strict=True)
        ]

    def add_blocks(sums, index):
        for part in range(at_once):
            sums = tuple(map(jnp.add, sums, products(part * (total // at_once) + index)))
        return sums, None

    zeros = (jnp.zeros((block, *g.shape[2:]), g.dtype),) * len(taps)
    sums, _ = lax.scan(add_blocks, zeros, jnp.arange(total // at_once))
    return jnp.stack([s.sum((0, 1)) for s in sums])
