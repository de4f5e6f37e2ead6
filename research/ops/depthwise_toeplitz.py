"""Depthwise convolution with one dense Toeplitz matrix per channel, batched over channels; long maps are cut into
tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from research.ops import depthwise_geometry as geometry
from research.ops import depthwise_tiles

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

_ONE_HOT_PIXELS = 64  # largest map whose matrices are made by a product with a constant; it has taps * pixels^2 numbers


# --- matrices ---------------------------------------------------------------------------------------------------------


def _skew(v, axis, rows, columns):
    """Replaces an axis of rows + columns - 1 offsets by a Toeplitz pair: result[row, column] = v[column - row + rows -
    1].

    Rows of period p read with stride p - 1 slip by one a row: no gather, and the transpose is no scatter.
    """
    before, after, period = v.shape[:axis], v.shape[axis + 1 :], rows + columns
    v = jnp.concatenate([v, jnp.zeros((*before, 1, *after), v.dtype)], axis)
    v = jnp.broadcast_to(jnp.expand_dims(v, axis), (*before, rows, period, *after))
    v = v.reshape(*before, rows * period, *after)
    v = lax.slice_in_dim(v, 0, rows * (period - 1), axis=axis)
    v = v.reshape(*before, rows, period - 1, *after)
    return lax.slice_in_dim(v, rows - 1, rows - 1 + columns, axis=axis + 1)


def _places(first, size, rows, columns):
    """[size, rows, columns]: 1 where the tap at offset first + tap joins an input (column) to an output (row)."""
    taps = first + np.arange(size)[:, None, None]
    return (np.arange(columns)[None, None, :] - np.arange(rows)[None, :, None] == taps).astype(np.float32)


@functools.lru_cache(maxsize=64)
def _places_2d(window, out, extent):
    """[taps of the window, outputs * inputs]: the same on a map, as the matrix that spreads taps."""
    rows, columns = (_places(*axis) for axis in zip(window.first, window.size, out, extent, strict=True))
    return np.einsum("aoi,bpj->abopij", rows, columns).reshape(window.size[0] * window.size[1], -1)


def _one_hot(out, extent):
    return out[0] * out[1] <= _ONE_HOT_PIXELS and extent[0] * extent[1] <= _ONE_HOT_PIXELS


def matrix_window(branches, out, extent):
    """The window that `matrices` wants for branches from a map of `extent` to one of `out` pixels."""
    if _one_hot(out, extent):
        return geometry.common_window(branches, extent)
    return geometry.Window(tuple(1 - o for o in out), tuple(o + e - 1 for o, e in zip(out, extent, strict=True)))


def matrices(windowed, window, out, extent):
    """Kernels [N, *window.size, C] in the window that `matrix_window` says, to matrices [C, N, outputs, inputs]."""
    count, channels = windowed.shape[0], windowed.shape[-1]
    outputs, inputs = out[0] * out[1], extent[0] * extent[1]
    t = windowed.transpose(3, 0, 1, 2)
    if _one_hot(out, extent):
        places = jnp.asarray(_places_2d(window, tuple(out), tuple(extent)), windowed.dtype)
        t = _einsum("nt,tp->np", t.reshape(channels * count, -1), places)
    else:
        t = _skew(_skew(t, 3, out[1], extent[1]), 2, out[0], extent[0]).transpose(0, 1, 2, 4, 3, 5)
    return t.reshape(channels, count, outputs, inputs)


def channel_major(x):
    """[B, H, W, C] to [C, B, H*W]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height * width, channels).transpose(2, 0, 1)


def _matrices(kernels, branches, extent):
    window = matrix_window(branches, branches[0].out, extent)
    return matrices(geometry.windows(kernels, branches, window), window, branches[0].out, extent)


# --- the three directions ---------------------------------------------------------------------------------------------


def _conv(x, kernels, branches):
    x_cm, made, shape = (
        channel_major(x),
        _matrices(kernels, branches, x.shape[1:3]),
        (x.shape[0], *branches[0].out, x.shape[-1]),
    )
    return tuple(
        _einsum("cbi,coi->cbo", x_cm, made[:, n]).transpose(1, 2, 0).reshape(shape) for n in range(len(kernels))
    )


def _input_grad(kernels, grads, branches, extent):
    made = _matrices(kernels, branches, extent)
    terms = [_einsum("cbo,coi->cbi", channel_major(g), made[:, n]) for n, g in enumerate(grads)]
    return functools.reduce(jnp.add, terms).transpose(1, 2, 0).reshape(grads[0].shape[0], *extent, -1)


def _weight_grad(x, grads, branches):
    x_cm, extent, out = channel_major(x), x.shape[1:3], branches[0].out
    d_matrices = jnp.stack([_einsum("cbo,cbi->coi", channel_major(g), x_cm) for g in grads], 1)
    window = matrix_window(branches, out, extent)
    windowed = jax.ShapeDtypeStruct((len(grads), *window.size, x.shape[-1]), x.dtype)
    transpose = jax.linear_transpose(lambda w: matrices(w, window, out, extent), windowed)
    return geometry.unwindow(transpose(d_matrices)[0], branches, window)


IMPLEMENTATION = depthwise_tiles.tiled(
    depthwise_tiles.Implementation(_conv, _input_grad, _weight_grad), tile_1d=32, tile_2d=14
)
