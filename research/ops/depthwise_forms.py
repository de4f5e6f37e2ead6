"""The forms of depthwise convolution: lax, shift-and-add, Toeplitz matrices and the discrete Fourier transform.

All forms have the same three functions, for one input and N kernels (each with its own dilation):

    conv(x, kernels, dilations)                     -> N outputs, [B, H, W, C] each
    input_grad(kernels, grads, dilations)           -> gradient of x, [B, H, W, C]
    weight_grad(x, grads, sizes, dilations)         -> N kernel gradients, [Kh, Kw, C] each

Kernels are [Kh, Kw, C] with odd Kh and Kw. Padding is 'SAME' with zeros: dilation * (K - 1) // 2 on both sides. Equal
subexpressions (the transform of x in conv and weight_grad, of the output gradients in both gradients) are written
alike, so that XLA computes them once within one program. Arrays are computed in the dtype that they come in.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Form(NamedTuple):
    """One way to compute a depthwise convolution and its two gradients."""

    conv: Callable
    input_grad: Callable
    weight_grad: Callable


# --- lax: the naive twin ---------------------------------------------------------------------------------------------


def _lax_conv_single(x, kernel, dilation):
    kh, kw, channels = kernel.shape
    pads = [(dilation * (k - 1) // 2,) * 2 for k in (kh, kw)]
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        (1, 1),
        pads,
        rhs_dilation=(dilation, dilation),
        feature_group_count=channels,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )


def _lax_conv(x, kernels, dilations):
    return tuple(_lax_conv_single(x, k, d) for k, d in zip(kernels, dilations, strict=True))


def _lax_weight_grad(x, grads, sizes, dilations):
    def single(g, size, dilation):
        kernel = jax.ShapeDtypeStruct((*size, x.shape[-1]), x.dtype)
        return jax.linear_transpose(lambda k: _lax_conv_single(x, k, dilation), kernel)(g)[0]

    return tuple(map(single, grads, sizes, dilations))


def _lax_input_grad(kernels, grads, dilations):
    transpose = jax.linear_transpose(lambda x: _lax_conv(x, kernels, dilations), jax.ShapeDtypeStruct(grads[0].shape, grads[0].dtype))
    return transpose(tuple(grads))[0]


NAIVE = Form(_lax_conv, _lax_input_grad, _lax_weight_grad)


# --- shift-and-add ---------------------------------------------------------------------------------------------------

_UNROLLED_TAPS = 25
_ACCUMULATED_TAPS = 9
_ACCUMULATED_PIXELS = 2**14  # height * width * channels; below it the steps of the loop cost more than they save


def _pad_spatial(x, size, dilation):
    ph, pw = (dilation * (k - 1) // 2 for k in size)
    return jnp.pad(x, ((0, 0), (ph, ph), (pw, pw), (0, 0)))


def _shift_conv_single(x, kernel, dilation):
    batch, height, width, channels = x.shape
    kh, kw, _ = kernel.shape
    x = _pad_spatial(x, (kh, kw), dilation)

    def row_sum(i, rows):
        taps = (rows[:, :, j * dilation : j * dilation + width] * kernel[i, j] for j in range(kw))
        return functools.reduce(jnp.add, taps)

    if kh * kw <= _UNROLLED_TAPS:
        return functools.reduce(jnp.add, (row_sum(i, x[:, i * dilation : i * dilation + height]) for i in range(kh)))

    def add_row(i, total):
        return total + row_sum(i, lax.dynamic_slice_in_dim(x, i * dilation, height, axis=1))

    return lax.fori_loop(0, kh, add_row, jnp.zeros((batch, height, width, channels), x.dtype))


def _shift_conv(x, kernels, dilations):
    return tuple(map(functools.partial(_shift_conv_single, x), kernels, dilations))


def _tap_sums_by_image(padded, g, size, dilation):
    """One accumulator of the size of an image per tap: no reduction until the end, each image read once while cached."""
    _, height, width, _ = g.shape

    def add_image(sums, image):
        x_1, g_1 = image
        shifted = (
            x_1[i * dilation : i * dilation + height, j * dilation : j * dilation + width] for i in range(size[0]) for j in range(size[1])
        )
        return tuple(total + s * g_1 for total, s in zip(sums, shifted, strict=True)), None

    sums, _ = lax.scan(add_image, (jnp.zeros_like(g[0]),) * math.prod(size), (padded, g))
    return jnp.stack([jnp.sum(total, axis=(0, 1)) for total in sums]).reshape(*size, g.shape[-1])


def _tap_sums_by_row(padded, g, size, dilation):
    """One reduction per tap, in a loop over the rows of the kernel."""
    _, height, width, _ = g.shape

    def row_grads(i):
        rows = lax.dynamic_slice_in_dim(padded, i * dilation, height, axis=1)
        columns = (rows[:, :, j * dilation : j * dilation + width] for j in range(size[1]))
        return jnp.stack([jnp.sum(column * g, axis=(0, 1, 2)) for column in columns])

    return lax.map(row_grads, jnp.arange(size[0]))


def _shift_weight_grad(x, grads, sizes, dilations):
    def single(g, size, dilation):
        by_image = math.prod(size) <= _ACCUMULATED_TAPS and g[0].size >= _ACCUMULATED_PIXELS
        tap_sums = _tap_sums_by_image if by_image else _tap_sums_by_row
        return tap_sums(_pad_spatial(x, size, dilation), g, size, dilation)

    return tuple(map(single, grads, sizes, dilations))


def _flip_grad(conv):
    """Input gradient from a form's convolution: at stride 1 it is the convolution with the kernel turned by 180 degrees."""

    def input_grad(kernels, grads, dilations):
        flipped = [k[::-1, ::-1] for k in kernels]
        return sum(conv(g, [k], [d])[0] for g, k, d in zip(grads, flipped, dilations, strict=True))

    return input_grad


SHIFT = Form(_shift_conv, _flip_grad(_shift_conv), _shift_weight_grad)


# --- kernels in a common window --------------------------------------------------------------------------------------


def window(kernel, dilation, size):
    """Dilates a kernel [..., Kh, Kw, C] and centres it in a window of odd `size`, padding with zeros or cropping."""
    pads = [((s - (dilation * (k - 1) + 1)) // 2,) * 2 + (dilation - 1,) for k, s in zip(kernel.shape[-3:-1], size, strict=True)]
    config = [(0, 0, 0)] * (kernel.ndim - 3) + pads + [(0, 0, 0)]
    return lax.pad(kernel, jnp.zeros((), kernel.dtype), config)


def windows(kernels, dilations, size):
    """N kernels as one array [N, size_h, size_w, C]; taps that only ever meet the zero padding may be cropped away."""
    return jnp.stack([window(k, d, size) for k, d in zip(kernels, dilations, strict=True)])


def _unwindow(d_windows, sizes, dilations):
    """Transpose of `windows`."""
    channels = d_windows.shape[-1]
    kernels = tuple(jax.ShapeDtypeStruct((*size, channels), d_windows.dtype) for size in sizes)
    transpose = jax.linear_transpose(lambda ks: windows(ks, dilations, d_windows.shape[1:3]), kernels)
    return transpose(d_windows)[0]


def _reach(sizes, dilations, axis, extent):
    """How far the kernels reach from their centre, in pixels, on a map of `extent` pixels."""
    return min(extent - 1, max(d * (size[axis] - 1) // 2 for size, d in zip(sizes, dilations, strict=True)))


# --- Toeplitz: one dense (H*W x H*W) matrix per channel, batched over channels ---------------------------------------

_ONE_HOT_PIXELS = 64  # largest map whose matrices are made by a product with a constant; it has taps * pixels^2 numbers


def _skew(v, axis, extent):
    """Replaces an axis of 2 * extent - 1 offsets by a Toeplitz pair (out, in): result[out, in] = v[in - out + extent - 1].

    Rows of period 2n read with stride 2n - 1 slip by one a row: no gather, and the transpose is no scatter.
    """
    before, after = v.shape[:axis], v.shape[axis + 1 :]
    v = jnp.concatenate([v, jnp.zeros((*before, 1, *after), v.dtype)], axis)
    v = jnp.broadcast_to(jnp.expand_dims(v, axis), (*before, extent, 2 * extent, *after))
    v = v.reshape(*before, 2 * extent * extent, *after)
    v = lax.slice_in_dim(v, 0, extent * (2 * extent - 1), axis=axis)
    v = v.reshape(*before, extent, 2 * extent - 1, *after)
    return lax.slice_in_dim(v, extent - 1, 2 * extent - 1, axis=axis + 1)


@functools.lru_cache(maxsize=64)
def _places(size, extent):
    """[size, extent (out), extent (in)]: 1 where the tap of a centred kernel of `size` joins an input to an output."""
    taps = np.arange(size)[:, None, None] - size // 2
    return (np.arange(extent)[None, None, :] - np.arange(extent)[None, :, None] == taps).astype(np.float32)


@functools.lru_cache(maxsize=64)
def _places_2d(size_h, size_w, height, width):
    """[size_h * size_w, H*W (out) * H*W (in)]: the same on a map, as the matrix that spreads taps."""
    both = np.einsum("aoi,bpj->abopij", _places(size_h, height), _places(size_w, width))
    return both.reshape(size_h * size_w, (height * width) ** 2)


def toeplitz_window(sizes, dilations, height, width):
    """The size of the window that `toeplitz_matrices` wants for kernels on a map of height x width pixels."""
    if height * width > _ONE_HOT_PIXELS:
        return 2 * height - 1, 2 * width - 1
    return tuple(2 * _reach(sizes, dilations, axis, extent) + 1 for axis, extent in enumerate((height, width)))


def toeplitz_matrices(windowed, height, width):
    """Windows [N, Sh, Sw, C] of the size that `toeplitz_window` says, to matrices [C, N, H*W (out), H*W (in)]."""
    count, rows, columns, channels = windowed.shape
    t = windowed.transpose(3, 0, 1, 2)
    if height * width <= _ONE_HOT_PIXELS:
        places = jnp.asarray(_places_2d(rows, columns, height, width), windowed.dtype)
        return _einsum("nt,tp->np", t.reshape(channels * count, rows * columns), places).reshape(channels, count, height * width, -1)
    t = _skew(_skew(t, 3, width), 2, height)
    return t.transpose(0, 1, 2, 4, 3, 5).reshape(channels, count, height * width, height * width)


def channel_major(x):
    """[B, H, W, C] to [C, B, H*W]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height * width, channels).transpose(2, 0, 1)


def _matrices(kernels, dilations, shape):
    size = toeplitz_window(_sizes(kernels), dilations, *shape[1:3])
    return toeplitz_matrices(windows(kernels, dilations, size), *shape[1:3])


def _toeplitz_conv(x, kernels, dilations):
    matrices, x_cm = _matrices(kernels, dilations, x.shape), channel_major(x)
    return tuple(_einsum("cbi,coi->cbo", x_cm, matrices[:, n]).transpose(1, 2, 0).reshape(x.shape) for n in range(len(kernels)))


def _toeplitz_input_grad(kernels, grads, dilations):
    matrices = _matrices(kernels, dilations, grads[0].shape)
    terms = [_einsum("cbo,coi->cbi", channel_major(g), matrices[:, n]) for n, g in enumerate(grads)]
    return functools.reduce(jnp.add, terms).transpose(1, 2, 0).reshape(grads[0].shape)


def _toeplitz_weight_grad(x, grads, sizes, dilations):
    _, height, width, channels = x.shape
    x_cm = channel_major(x)
    d_matrices = jnp.stack([_einsum("cbo,cbi->coi", channel_major(g), x_cm) for g in grads], 1)
    windowed = jax.ShapeDtypeStruct((len(grads), *toeplitz_window(sizes, dilations, height, width), channels), x.dtype)
    transpose = jax.linear_transpose(lambda w: toeplitz_matrices(w, height, width), windowed)
    return _unwindow(transpose(d_matrices)[0], sizes, dilations)


TOEPLITZ = Form(_toeplitz_conv, _toeplitz_input_grad, _toeplitz_weight_grad)


# --- DFT as matrix products ------------------------------------------------------------------------------------------


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
    """DFT of circular size (size_h, size_w) of a patch that starts at (first_h, first_w) and has (out_h, out_w) pixels."""
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


def _dft(v, m):
    """[h, w, ...] to the spectrum [F, 2, S, ...]."""
    rest = v.shape[2:]
    v = v.reshape(*v.shape[:2], math.prod(rest))
    v = _einsum("fh,hwn->fwn", jnp.asarray(m.rows, v.dtype), v)
    v = v.reshape(v.shape[0] // 2, 2 * v.shape[1], v.shape[2])
    v = _einsum("sw,fwn->fsn", jnp.asarray(m.columns, v.dtype), v)
    return v.reshape(v.shape[0], 2, v.shape[1] // 2, *rest)


def _idft(v, m):
    """Spectrum [F, 2, S, ...] to [h, w, ...]."""
    rest = v.shape[3:]
    v = v.reshape(v.shape[0], 2 * v.shape[2], math.prod(rest))
    v = _einsum("ws,fsn->fwn", jnp.asarray(m.columns_back, v.dtype), v)
    v = v.reshape(2 * v.shape[0], v.shape[1] // 2, v.shape[2])
    v = _einsum("hf,fwn->hwn", jnp.asarray(m.rows_back, v.dtype), v)
    return v.reshape(*v.shape[:2], *rest)


def _times(a, b):
    """Complex product of spectra with the parts on axis 1; a reversal fuses with the product where a stack would not."""
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


def _dft_plan(shape, sizes, dilations):
    """DFT matrices of the maps and of the kernel windows. A circle of H + reach pixels keeps wrapped taps off the map."""
    _, height, width, _ = shape
    reach = [_reach(sizes, dilations, axis, extent) for axis, extent in enumerate((height, width))]
    circle = height + reach[0], width + reach[1]
    maps = _dft_matrices(height, width, 0, 0, *circle)
    taps = _dft_matrices(2 * reach[0] + 1, 2 * reach[1] + 1, -reach[0], -reach[1], *circle)
    return maps, taps


def _spatial_major(x):
    return x.transpose(1, 2, 0, 3)


def _batch_major(x):
    return x.transpose(2, 0, 1, 3)


def _kernel_spectra(kernels, dilations, taps):
    """N kernels to their spectra [F, 2, S, N, C]."""
    size = taps.rows.shape[1], taps.columns.shape[1] // 2
    return _dft(windows(kernels, dilations, size).transpose(1, 2, 0, 3), taps)


def _sizes(kernels):
    return [k.shape[:2] for k in kernels]


def _dft_conv(x, kernels, dilations):
    maps, taps = _dft_plan(x.shape, _sizes(kernels), dilations)
    x_hat = _dft(_spatial_major(x), maps)
    k_hat = _kernel_spectra(kernels, dilations, taps)
    return tuple(_batch_major(_idft(_times_conj(x_hat, k_hat[..., n, None, :]), maps)) for n in range(len(kernels)))


def _dft_input_grad(kernels, grads, dilations):
    maps, taps = _dft_plan(grads[0].shape, _sizes(kernels), dilations)
    k_hat = _kernel_spectra(kernels, dilations, taps)
    products = [_times(_dft(_spatial_major(g), maps), k_hat[..., n, None, :]) for n, g in enumerate(grads)]
    return _batch_major(_idft(functools.reduce(jnp.add, products), maps))


def _dft_weight_grad(x, grads, sizes, dilations):
    maps, taps = _dft_plan(x.shape, sizes, dilations)
    x_hat = _dft(_spatial_major(x), maps)
    spectra = [_sum_times_conj(x_hat, _dft(_spatial_major(g), maps)) for g in grads]
    d_windows = _idft(jnp.stack(spectra, axis=3), taps).transpose(2, 0, 1, 3)
    return _unwindow(d_windows, sizes, dilations)


DFT = Form(_dft_conv, _dft_input_grad, _dft_weight_grad)

FORMS = {"naive": NAIVE, "shift": SHIFT, "toeplitz": TOEPLITZ, "dft": DFT}
