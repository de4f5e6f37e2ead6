"""The grid that the implementations of depthwise convolution are chosen from: maps of UniRepLKNet's stages and
sequences, few taps to many."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from research.bench.case import normal
from research.bench.tune import Measured, register
from research.ops import depthwise_geometry as geometry
from research.ops import depthwise_implementations

IMPLEMENTATIONS = ("shift", "toeplitz", "dft")
NUMBERS = 2**20
"""About how many numbers a map has, by the choice of the batch: enough that a call's own cost does not count."""
SIDES = (7, 10, 14, 20, 28, 56)
SIZES_2D = (3, 5, 7, 13, 31)
LENGTHS = (64, 512, 4096)
SIZES_1D = (4, 8, 16, 31, 63)
CHANNELS = 96
COSTLY_SHIFTS = 31 * 31
"""From this many taps on, the shift implementation is never the fastest, and timing it would take minutes."""


@register("depthwise_conv2d")
def cases() -> Iterator[Measured]:
    """Yields (features, {direction: {implementation: call}}) for maps and kernels in two dimensions."""
    for side in SIDES:
        for size in SIZES_2D:
            if size < 2 * side:
                yield _case((side, side), (size, size))


@register("depthwise_conv1d")
def cases_1d() -> Iterator[Measured]:
    """The same for sequences, which are maps of one column; the padding is causal."""
    for length in LENGTHS:
        for size in SIZES_1D:
            yield _case((length, 1), (size, 1))


def _case(extent: tuple[int, int], size: tuple[int, int]) -> Measured:
    pixels, taps = extent[0] * extent[1], size[0] * size[1]
    shape = (max(1, NUMBERS // (pixels * CHANNELS)), *extent, CHANNELS)
    low = geometry.pair(k - 1 if 1 in extent else (k - 1) // 2 for k in size)
    branch = geometry.Branch(size, (1, 1), low, extent)
    x, g, kernel = normal(1, shape), normal(2, shape), normal(3, (*size, CHANNELS))
    directions: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "input_grad": {}, "weight_grad": {}}
    for name in IMPLEMENTATIONS:
        if name == "shift" and taps >= COSTLY_SHIFTS:
            continue
        implementation = depthwise_implementations.IMPLEMENTATIONS[name]
        forward = jax.jit(lambda x, k, implementation=implementation: implementation.conv(x, (k,), (branch,)))
        input_grad = jax.jit(
            lambda k, g, implementation=implementation: implementation.input_grad((k,), (g,), (branch,), extent)
        )
        weight_grad = jax.jit(
            lambda x, g, implementation=implementation: implementation.weight_grad(x, (g,), (branch,))
        )
        directions["forward"][name] = functools.partial(forward, x, kernel)
        directions["input_grad"][name] = functools.partial(input_grad, kernel, g)
        directions["weight_grad"][name] = functools.partial(weight_grad, x, g)
    return {"pixels": pixels, "taps": taps}, directions
