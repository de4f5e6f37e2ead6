"""Where the taps of a depthwise kernel fall on a map: padding, dilation, stride, and kernels in a common window.

A branch is one kernel over one map. Output o reads input `stride * o + i * dilation - low` through tap i, zero off the
map; the padding at the high end follows from the size of the output. Windows are dense kernels over the offsets from
`first` to `first + size - 1`, the form that Toeplitz matrices and Fourier transforms are made from. A stride folds
away: the map is cut into one map per phase, which become channels, and the outputs are summed over the phases.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

Pair = tuple[int, int]


def pair(sizes: Iterable[int]) -> Pair:
    """Returns the two sizes, of rows and of columns, as a Pair."""
    rows, columns = sizes
    return rows, columns


class Branch(NamedTuple):
    """One kernel over a map: pairs are (rows, columns)."""

    size: Pair
    dilation: Pair
    low: Pair
    out: Pair
    stride: Pair = (1, 1)


class Window(NamedTuple):
    """The offsets that a dense kernel covers."""

    first: Pair
    size: Pair


def extent_and_low(extent: int, size: int, dilation: int, stride: int, padding: str | Pair) -> Pair:
    """Returns (number of outputs, padding at the low end) along one axis; "SAME" and "VALID" are TensorFlow's and
    XLA's."""
    reach = dilation * (size - 1)
    if padding == "SAME":
        out = -(-extent // stride)
        return out, max((out - 1) * stride + reach + 1 - extent, 0) // 2
    low, high = {"VALID": (0, 0), "CAUSAL": (reach, 0)}[padding] if isinstance(padding, str) else padding
    return (extent + low + high - reach - 1) // stride + 1, low


def same(size: Pair, dilation: int, extent: Pair) -> Branch:
    """The branch of a kernel at stride 1 whose output has the size of the map."""
    low = pair(extent_and_low(e, k, dilation, 1, "SAME")[1] for e, k in zip(extent, size, strict=True))
    return Branch(pair(size), (dilation, dilation), low, pair(extent))


def flipped(branch: Branch, extent: Pair) -> Branch:
    """The branch of the kernel turned by 180 degrees that takes the output's gradient to the gradient of a map of
    `extent`."""
    low = pair(d * (k - 1) - lo for k, d, lo in zip(branch.size, branch.dilation, branch.low, strict=True))
    return Branch(branch.size, branch.dilation, low, pair(extent))


def pad(x: Shaped[Array, "B H W C"], branch: Branch) -> Shaped[Array, "B Hp Wp C"]:
    """Pads (or crops, where padding is negative) so that the branch at stride 1 reads nothing else."""
    (low_h, low_w), lengths = (
        branch.low,
        [o + d * (k - 1) for o, d, k in zip(branch.out, branch.dilation, branch.size, strict=True)],
    )
    high_h, high_w = (n - e - lo for n, e, lo in zip(lengths, x.shape[1:3], branch.low, strict=True))
    batch, height, width, channels = x.shape
    # Columns and channels as one axis: XLA:CPU pads long rows of numbers up to 1.5 times faster.
    lines = x.reshape(batch, height, width * channels)
    config = [(0, 0, 0), (low_h, high_h, 0), (low_w * channels, high_w * channels, 0)]
    return lax.pad(lines, jnp.zeros((), x.dtype), config).reshape(batch, *lengths, channels)


# --- windows ---------------------------------------------------------------------------------------------------------


def place(
    kernel: Float[Array, "*lead Kh Kw C"], dilation: Pair, before: Pair, size: Pair
) -> Float[Array, "*lead Sh Sw C"]:
    """Dilates a kernel and puts its first tap at `before` in zeros of `size`; taps that fall outside are cropped."""
    pads = [
        (b, s - b - (d * (k - 1) + 1), d - 1)
        for k, d, b, s in zip(kernel.shape[-3:-1], dilation, before, size, strict=True)
    ]
    return lax.pad(kernel, jnp.zeros((), kernel.dtype), [(0, 0, 0)] * (kernel.ndim - 3) + pads + [(0, 0, 0)])


def common_window(branches: Sequence[Branch], extent: Pair) -> Window:
    """The smallest window that holds all taps of the branches that can meet a map of `extent`."""
    first, size = [], []
    for axis in (0, 1):
        out = max(b.out[axis] for b in branches)
        low = max(-(out - 1), min(-b.low[axis] for b in branches))
        high = min(extent[axis] - 1, max(b.dilation[axis] * (b.size[axis] - 1) - b.low[axis] for b in branches))
        first.append(low)
        size.append(high - low + 1)
    return Window(pair(first), pair(size))


def windows(
    kernels: Sequence[Float[Array, "_ _ C"]], branches: Sequence[Branch], window: Window
) -> Float[Array, "N Sh Sw C"]:
    """N kernels as one array; taps outside the window are cropped away."""
    placed = []
    for kernel, b in zip(kernels, branches, strict=True):
        before = pair(-lo - first for lo, first in zip(b.low, window.first, strict=True))
        placed.append(place(kernel, b.dilation, before, window.size))
    return jnp.stack(placed)


def unwindow(
    d_windows: Float[Array, "N Sh Sw C"], branches: Sequence[Branch], window: Window
) -> tuple[Float[Array, "_ _ C"], ...]:
    """Transpose of `windows`."""
    kernels = tuple(jax.ShapeDtypeStruct((*b.size, d_windows.shape[-1]), d_windows.dtype) for b in branches)
    return jax.linear_transpose(lambda ks: windows(ks, branches, window), kernels)(d_windows)[0]


# --- strides and channel multipliers ----------------------------------------------------------------------------------


def fold_input(x: Float[Array, "B H W C"], stride: Pair, multiplier: int) -> Float[Array, "B h w P"]:
    """Repeats each channel `multiplier` times, then makes the phases of the stride channels: P = stride_h * stride_w *
    C * multiplier."""
    x = jnp.repeat(x, multiplier, axis=-1) if multiplier > 1 else x
    if stride == (1, 1):
        return x
    batch, height, width, channels = x.shape
    rows, columns = -(-height // stride[0]), -(-width // stride[1])
    x = jnp.pad(x, ((0, 0), (0, rows * stride[0] - height), (0, columns * stride[1] - width), (0, 0)))
    x = x.reshape(batch, rows, stride[0], columns, stride[1], channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows, columns, math.prod(stride) * channels)


def fold_branch(branch: Branch) -> Branch:
    """The branch at stride 1 over the phases."""
    if branch.stride == (1, 1):
        return branch
    low = pair(-(-lo // s) for lo, s in zip(branch.low, branch.stride, strict=True))
    return Branch(_folded_size(branch, low), (1, 1), low, branch.out)


def _folded_size(branch, low):
    """Taps over the phases: those from the phase of the first tap to that of the last."""
    ends = [d * (k - 1) - lo for k, d, lo in zip(branch.size, branch.dilation, branch.low, strict=True)]
    return pair(end // s + lo + 1 for end, s, lo in zip(ends, branch.stride, low, strict=True))


def fold_kernel(kernel: Float[Array, "Kh Kw C"], branch: Branch) -> Float[Array, "kh kw P"]:
    """The kernel of `fold_branch`."""
    if branch.stride == (1, 1):
        return kernel
    (sh, sw), folded = branch.stride, fold_branch(branch)
    before = pair(s * lo_1 - lo for s, lo_1, lo in zip(branch.stride, folded.low, branch.low, strict=True))
    dense = place(kernel, branch.dilation, before, (folded.size[0] * sh, folded.size[1] * sw))
    dense = dense.reshape(folded.size[0], sh, folded.size[1], sw, -1).transpose(0, 2, 1, 3, 4)
    return dense.reshape(*folded.size, -1)


def unfold_output(y: Float[Array, "B h w P"], stride: Pair) -> Float[Array, "B h w C"]:
    """Sums the outputs over the phases."""
    return y if stride == (1, 1) else y.reshape(*y.shape[:3], math.prod(stride), -1).sum(3)


def spread_grad(g: Float[Array, "B h w C"], stride: Pair) -> Float[Array, "B h w P"]:
    """Transpose of `unfold_output`."""
    return g if stride == (1, 1) else jnp.tile(g, math.prod(stride))
