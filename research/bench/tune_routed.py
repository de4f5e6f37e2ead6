"""The grid that the implementations of the routed convolution are chosen from: the maps of small CIFAR networks, 1 to 8
experts."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from research.bench.case import BOTH, directed, fast, normal
from research.bench.tune import Measured, register
from research.ops import routed_conv

BATCH = 64
SHAPES = ((4, 128), (16, 64), (49, 32), (196, 16), (64, 128), (256, 64))
"""Pixels of a map and its channels in and out."""
EXPERTS = (1, 2, 8)


@register("routed_conv")
def cases() -> Iterator[Measured]:
    """Yields (features, {direction: {implementation: call}}); an implementation is chosen once for both directions, so
    that they are timed together."""
    for pixels, channels in SHAPES:
        side = round(pixels**0.5)
        for count in EXPERTS:
            width = channels // count
            arrays = (
                normal(1, (BATCH, side, side, width)),
                normal(2, (3, 3, width, count, width)),
                jnp.arange(BATCH) % count,
            )
            calls: dict[str, Callable[[], Any]] = {}
            for implementation in _worth_a_try(pixels, count):
                run = functools.partial(routed_conv.routed_conv, implementation=implementation)
                calls[implementation] = functools.partial(
                    jax.jit(directed(run, BOTH, 2)), normal(3, (BATCH, side, side, width)), *arrays
                )
            yield {"pixels": pixels, "inputs": width, "outputs": width, "experts": count}, {"forward": calls}


def _worth_a_try(pixels: int, experts: int) -> list[str]:
    """A matrix over the whole map grows by the square of its pixels; for two experts "grouped" gains little and
    compiles for long."""
    left_out = {"matrix"} if pixels > 16 else set()
    return [
        implementation
        for implementation in fast(routed_conv.IMPLEMENTATIONS)
        if implementation not in left_out | ({"grouped"} if experts <= 2 else set())
    ]
