"""Long maps cut into tiles of outputs, each with the halo of inputs that it reads: overlap-save for any implementation
at stride 1.

Tiles go into the batch, so the implementation sees one small map, and its matrices do not grow with the map. The
branches of a call share the size of their outputs.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from research.ops import depthwise_geometry as geometry


def _plan(branches, extent, tile):
    """(window of the branches, outputs of a tile, number of tiles, the branch of a dense kernel on a tile), pairs by
    axis."""
    window = geometry.common_window(branches, extent)
    sizes, counts = [], []
    for out, span in zip(branches[0].out, window.size, strict=True):
        count = -(-out // max(tile, span - 1))
        # A tile no shorter than its halo: the halo of one tile then lies within the next.
        sizes.append(max(-(-out // count), span - 1) if count > 1 else out)
        counts.append(count)
    return window, tuple(sizes), tuple(counts), geometry.Branch(window.size, (1, 1), (0, 0), tuple(sizes))


def _pad_to(x, axis, low, length):
    """x shifted by `low` zeros along an axis and padded or cropped to `length`."""
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (low, length - low - x.shape[axis], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), pads)


def _cut_axis(x, axis, low, size, count, halo):
    """[..., E, ...] to [..., count, size + halo, ...]."""
    if count == 1:
        return jnp.expand_dims(_pad_to(x, axis, low, size + halo), axis)
    x = _pad_to(x, axis, low, size * (count + 1))
    x = x.reshape(*x.shape[:axis], count + 1, size, *x.shape[axis + 1 :])
    body = lax.slice_in_dim(x, 0, count, axis=axis)
    following = lax.slice_in_dim(lax.slice_in_dim(x, 1, count + 1, axis=axis), 0, halo, axis=axis + 1)
    return jnp.concatenate([body, following], axis + 1)


def _cut(x, lows, sizes, counts, halos):
    """[B, H, W, C] to tiles [B * count_h * count_w, size_h + halo_h, size_w + halo_w, C]."""
    x = _cut_axis(x, 1, lows[0], sizes[0], counts[0], halos[0])
    x = _cut_axis(x, 3, lows[1], sizes[1], counts[1], halos[1])
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, *x.shape[3:])


def _join(tiles, counts, out):
    """Tiles of outputs to [B, *out, C]."""
    rows, columns, channels = tiles.shape[1:]
    y = tiles.reshape(-1, *counts, rows, columns, channels).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(-1, counts[0] * rows, counts[1] * columns, channels)[:, : out[0], : out[1]]


class Implementation(NamedTuple):
    """One way to compute depthwise convolutions and their gradients, with the signatures that
    `depthwise_implementations` gives."""

    conv: Callable
    input_grad: Callable
    weight_grad: Callable


def tiled(implementation: Implementation, *, tile_1d: int, tile_2d: int) -> Implementation:
    """The implementation over tiles of at most so many outputs a side, in sequences and in maps; shorter ones stay
    whole."""

    def plan(branches, extent):
        out = branches[0].out
        return _plan(branches, extent, tile_1d if 1 in out else tile_2d)

    def conv(x, kernels, branches):
        window, sizes, counts, branch = plan(branches, x.shape[1:3])
        if math.prod(counts) == 1:
            return implementation.conv(x, kernels, branches)
        halos = tuple(s - 1 for s in window.size)
        tiles = _cut(x, tuple(-f for f in window.first), sizes, counts, halos)
        dense = geometry.windows(kernels, branches, window)
        return tuple(
            _join(y, counts, branches[0].out) for y in implementation.conv(tiles, list(dense), [branch] * len(kernels))
        )

    def input_grad(kernels, grads, branches, extent):
        """Over tiles it is the convolution of the gradients with the turned kernels."""
        turned = [geometry.flipped(b, extent) for b in branches]
        if math.prod(plan(turned, branches[0].out)[2]) == 1:
            return implementation.input_grad(kernels, grads, branches, extent)
        return sum(conv(g, [k[::-1, ::-1]], [b])[0] for g, k, b in zip(grads, kernels, turned, strict=True))

    def weight_grad(x, grads, branches):
        window, sizes, counts, branch = plan(branches, x.shape[1:3])
        if math.prod(counts) == 1:
            return implementation.weight_grad(x, grads, branches)
        x_tiles = _cut(x, tuple(-f for f in window.first), sizes, counts, tuple(s - 1 for s in window.size))
        g_tiles = [_cut(g, (0, 0), sizes, counts, (0, 0)) for g in grads]
        d_dense = implementation.weight_grad(x_tiles, g_tiles, [branch] * len(grads))
        return geometry.unwindow(jnp.stack(d_dense), branches, window)

    return Implementation(conv, input_grad, weight_grad)
