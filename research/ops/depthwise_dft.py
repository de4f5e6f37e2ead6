"""Depthwise convolution as a product of spectra, the Fourier transforms being products with constant matrices.

The circle is just long enough to keep wrapped taps off the map, no FFT op is needed, and the transforms run at the rate
of matrix products on every back end. Long maps are cut into tiles.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from research.ops import depthwise_geometry as geometry
from research.ops import depthwise_tiles

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


# --- transforms -------------------------------------------------------------------------------------------------------


class _Dft(NamedTuple):
    """Real matrices of a circular 2-D DFT: rows (real input), then columns (complex), and back."""

    rows: np.ndarray  # [2F, H]: half spectrum of a real column, real and imaginary parts interleaved by frequency
    columns: np.ndarray  # [2S, 2W]: a complex row to its spectrum
    columns_back: np.ndarray  # [2W, 2S]
    rows_back: np.ndarray  # [H, 2F]


def _complex_as_real(m):
    """A complex matrix [r, c] as the real [2r, 2c] that acts on (real block, imaginary block)."""
    return np.block([[m.real, -m.imag], [m.imag, m.real]])


def _dft_matrices(out_h, out_w, first_h, first_w, size_h, size_w):
    """DFT of circular size (size_h, size_w) of a patch that starts at (first_h, first_w) and has (out_h, out_w)
    pixels."""
    half = size_h // 2 + 1
    h, w = first_h + np.arange(out_h), first_w + np.arange(out_w)
    f_h = np.exp(-2j * np.pi * np.outer(np.arange(half), h) / size_h)
    f_w = np.exp(-2j * np.pi * np.outer(np.arange(size_w), w) / size_w)
    weight = np.full(half, 2.0)
    weight[0] = 1.0
    if size_h % 2 == 0:
        weight[-1] = 1.0
    rows = np.stack([f_h.real, f_h.imag], 1).reshape(2 * half, out_h)
    back = np.conj(f_h).T * weight / size_h
    rows_back = np.stack([back.real, -back.imag], 2).reshape(out_h, 2 * half)
    return _Dft(rows, _complex_as_real(f_w), _complex_as_real(np.conj(f_w).T / size_w), rows_back)


def _is_flat(m):
    """Whether maps and circle have one column: nothing to transform along it."""
    return m.columns.shape == (2, 2)


def _dft(v, m):
    """[h, w, ...] to the spectrum [F, 2, S, ...]."""
    rest = v.shape[2:]
    v = v.reshape(*v.shape[:2], math.prod(rest))
    v = _einsum("fh,hwn->fwn", jnp.asarray(m.rows, v.dtype), v)
    v = v.reshape(v.shape[0] // 2, 2 * v.shape[1], v.shape[2])
    v = v if _is_flat(m) else _einsum("sw,fwn->fsn", jnp.asarray(m.columns, v.dtype), v)
    return v.reshape(v.shape[0], 2, v.shape[1] // 2, *rest)


def _idft(v, m):
    """Spectrum [F, 2, S, ...] to [h, w, ...]."""
    rest = v.shape[3:]
    v = v.reshape(v.shape[0], 2 * v.shape[2], math.prod(rest))
    v = v if _is_flat(m) else _einsum("ws,fsn->fwn", jnp.asarray(m.columns_back, v.dtype), v)
    v = v.reshape(2 * v.shape[0], v.shape[1] // 2, v.shape[2])
    v = _einsum("hf,fwn->hwn", jnp.asarray(m.rows_back, v.dtype), v)
    return v.reshape(*v.shape[:2], *rest)


def _times(a, b):
    """Complex product of spectra with the parts on axis 1; a reversal fuses with the product where a stack would
    not."""
    real, imag = b[:, :1], b[:, 1:]
    return a * real + a[:, ::-1] * jnp.concatenate([-imag, imag], 1)


def _times_conj(a, b):
    """a * conj(b) of spectra with the parts on axis 1."""
    real, imag = b[:, :1], b[:, 1:]
    return a * real + a[:, ::-1] * jnp.concatenate([imag, -imag], 1)


def _sum_times_conj(a, b):
    """a * conj(b), summed over the batch: [F, 2, S, B, C] to [F, 2, S, C]."""
    ar, ai, br, bi = a[:, 0], a[:, 1], b[:, 0], b[:, 1]
    return jnp.stack([jnp.sum(ar * br + ai * bi, axis=2), jnp.sum(ai * br - ar * bi, axis=2)], 1)


class _Plan(NamedTuple):
    window: geometry.Window
    inputs: _Dft
    outputs: _Dft
    taps: _Dft


def _plan(branches: Sequence[geometry.Branch], extent: geometry.Pair) -> _Plan:
    """Matrices on a circle that has room for every pair of input and output, so that no tap wraps around onto the
    map."""
    window, out = geometry.common_window(branches, extent), branches[0].out
    axes = zip(extent, out, window.first, window.size, strict=True)
    circle = geometry.pair(max(e - first, o + first + size - 1) for e, o, first, size in axes)
    return _Plan(
        window,
        _dft_matrices(*extent, 0, 0, *circle),
        _dft_matrices(*out, 0, 0, *circle),
        _dft_matrices(*window.size, *window.first, *circle),
    )


def _spatial_major(x):
    return x.transpose(1, 2, 0, 3)


def _batch_major(x):
    return x.transpose(2, 0, 1, 3)


def _kernel_spectra(kernels, branches, plan):
    """N kernels to their spectra [F, 2, S, N, C]."""
    return _dft(geometry.windows(kernels, branches, plan.window).transpose(1, 2, 0, 3), plan.taps)


# --- the three directions ---------------------------------------------------------------------------------------------


def _conv(x, kernels, branches):
    plan = _plan(branches, x.shape[1:3])
    x_hat = _dft(_spatial_major(x), plan.inputs)
    k_hat = _kernel_spectra(kernels, branches, plan)
    return tuple(
        _batch_major(_idft(_times_conj(x_hat, k_hat[..., n, None, :]), plan.outputs)) for n in range(len(kernels))
    )


def _input_grad(kernels, grads, branches, extent):
    plan = _plan(branches, extent)
    k_hat = _kernel_spectra(kernels, branches, plan)
    products = [_times(_dft(_spatial_major(g), plan.outputs), k_hat[..., n, None, :]) for n, g in enumerate(grads)]
    return _batch_major(_idft(functools.reduce(jnp.add, products), plan.inputs))


def _weight_grad(x, grads, branches):
    plan = _plan(branches, x.shape[1:3])
    x_hat = _dft(_spatial_major(x), plan.inputs)
    spectra = [_sum_times_conj(x_hat, _dft(_spatial_major(g), plan.outputs)) for g in grads]
    d_windows = _idft(jnp.stack(spectra, axis=3), plan.taps).transpose(2, 0, 1, 3)
    return geometry.unwindow(d_windows, branches, plan.window)


IMPLEMENTATION = depthwise_tiles.tiled(
    depthwise_tiles.Implementation(_conv, _input_grad, _weight_grad), tile_1d=64, tile_2d=128
)
