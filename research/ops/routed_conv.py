"""Convolution of every image with the kernel of its expert (Robust MoE-CNN, Zhang et al. 2023, arXiv 2308.10110).

The kernels of all experts are one ordinary kernel with E groups of output channels; an image gets those of one group.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from research.ops import checks, dispatch
from research.ops.grouped_matmul import grouped_matmul, permute, sort_by_group, unpermute

OP = "routed_conv"
NUMBERS = ("NHWC", "HWIO", "NHWC")


def routed_conv(
    x: Float[Array, "B H W I"],
    kernel: Float[Array, "K L I E O"],
    experts: Int[Array, " B"],
    *,
    stride: int = 1,
    implementation: str = "auto",
) -> Float[Array, "B h w O"]:
    """Returns y[b] = x[b] convolved with kernel[..., experts[b], :], zero-padded by half the window on every side.

    Args:
      x: images.
      kernel: windows of odd sides, input channels, experts, output channels of one expert.
      experts: the expert of each image, from 0 to E - 1.
      stride: of both axes.
      implementation: "auto" (by platform and, on a CPU, by shape), "cpu", "all" (one convolution with all E * O
        outputs, E times the work; that of accelerators), "matrix" (the same as one matrix over the whole map, for maps
        of a few pixels, where XLA's convolution is slow), "grouped" (windows of the images, sorted by expert, times the
        matrix of theirs) or "naive" (image by image).

    Returns:
      Images of ceil(H / stride) x ceil(W / stride). Differentiable in x and kernel; "grouped" once and in reverse.

    Raises:
      ValueError: when shapes do not fit, a window's side is even, or the implementation is unknown.
    """
    implementation = dispatch.resolve(implementation, OP, tuple(IMPLEMENTATIONS))
    sizes = checks.shapes(OP, x=(x, "B H W I"), kernel=(kernel, "K L I E O"), experts=(experts, "B"))
    checks.require(
        sizes["K"] % 2 == sizes["L"] % 2 == 1, OP, "kernel", f"of windows {sizes['K']}x{sizes['L']}", "odd sides"
    )
    if implementation in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[implementation](x, kernel, experts, stride=stride)
    pixels = -(-sizes["H"] // stride) * -(-sizes["W"] // stride)
    quickest = dispatch.choose(OP, pixels=pixels, inputs=sizes["I"], outputs=sizes["O"], experts=sizes["E"])
    implementations = (functools.partial(IMPLEMENTATIONS[name], stride=stride) for name in (quickest, "all"))
    return dispatch.per_platform(implementation, *implementations, x, kernel, experts)


def _convolve(x: Array, kernel: Array, stride: int) -> Array:
    padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=NUMBERS)


def naive(x: Array, kernel: Array, experts: Array, *, stride: int) -> Array:
    """The definition, image by image; its FLOPs are those of one expert."""

    def one(args):
        image, expert = args
        return _convolve(image[None], jnp.take(kernel, expert, axis=3), stride)[0]

    return lax.map(one, (x, experts))


def all_experts(x: Array, kernel: Array, experts: Array, *, stride: int) -> Array:
    """All groups of every image, then the choice among them."""
    *window, num_experts, width = kernel.shape
    return _select(_convolve(x, kernel.reshape(*window, num_experts * width), stride), experts, num_experts)


def each_expert(x: Array, kernel: Array, experts: Array, *, stride: int) -> Array:
    """One convolution for each expert, then the choice among them."""
    return _choose([_convolve(x, kernel[..., expert, :], stride) for expert in range(kernel.shape[3])], experts)


def as_matrix(x: Array, kernel: Array, experts: Array, *, stride: int) -> Array:
    """All groups as one matrix from all input pixels to all output pixels, then the choice among them."""
    tall, wide, inputs, num_experts, width = kernel.shape
    taps, (height, length) = _taps((x.shape[1], x.shape[2]), (tall, wide), stride)
    flat = kernel.reshape(tall * wide, inputs, num_experts * width)
    matrix = jnp.einsum("pqt,tio->piqo", taps.astype(kernel.dtype), flat).reshape(x[0].size, -1)
    y = x.reshape(x.shape[0], -1) @ matrix
    return _select(y.reshape(x.shape[0], height, length, -1), experts, num_experts)


def _taps(size: tuple[int, int], sides: tuple[int, int], stride: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Which tap t of the window leads from input pixel p to output pixel q, 1 or 0 as [p, q, t]; and the size of the
    output."""
    along = []
    for length, side in zip(size, sides, strict=True):
        source = stride * np.arange(-(-length // stride))[:, None] + np.arange(side) - side // 2
        along.append((source == np.arange(length)[:, None, None]).astype(np.float32))
    rows, columns = along
    both = np.einsum("aik,bjl->abijkl", rows, columns)
    return both.reshape(size[0] * size[1], -1, sides[0] * sides[1]), (rows.shape[1], columns.shape[1])


def _select(y: Float[Array, "B h w P"], experts: Array, num_experts: int) -> Float[Array, "B h w O"]:
    """The group of each image's expert; of groups that are not chosen nothing counts, be it NaN."""
    width = y.shape[-1] // num_experts
    return _choose([y[..., expert * width : (expert + 1) * width] for expert in range(num_experts)], experts)


def _choose(outputs: Sequence[Array], experts: Array) -> Array:
    chosen = outputs[0]
    for expert, y in enumerate(outputs[1:], 1):
        chosen = jnp.where((experts == expert)[:, None, None, None], y, chosen)
    return chosen


def grouped(x: Array, kernel: Array, experts: Array, *, stride: int) -> Array:
    """Images sorted by expert, their windows as rows of a grouped matrix product: the work of one expert."""
    tall, wide, _, num_experts, width = kernel.shape
    order, places, counts = sort_by_group(experts, num_experts)
    batch = x.shape[0]
    rows = windows(permute(x.reshape(batch, -1), order, places).reshape(x.shape), (tall, wide), stride)
    _, height, length, taps = rows.shape
    weights = jnp.moveaxis(kernel, 3, 0).reshape(num_experts, taps, width)
    y = grouped_matmul(rows.reshape(-1, taps), weights, counts * (height * length))
    return unpermute(y.reshape(batch, -1), order, places).reshape(batch, height, length, width)


def windows(x: Float[Array, "B H W I"], sides: tuple[int, int], stride: int) -> Float[Array, "B h w P"]:
    """Returns the window around every stride-th pixel, zeros beyond the edge, as one vector: rows, columns,
    channels."""
    (tall, wide), (height, width) = sides, x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (tall // 2, tall // 2), (wide // 2, wide // 2), (0, 0)))
    taps = [padded[:, i : i + height : stride, j : j + width : stride] for i in range(tall) for j in range(wide)]
    return jnp.concatenate(taps, axis=-1)


IMPLEMENTATIONS = {"naive": naive, "all": all_experts, "each": each_expert, "matrix": as_matrix, "grouped": grouped}
"""Name -> implementation; each is `implementation(x, kernel, experts, stride=)`."""
