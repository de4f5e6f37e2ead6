"""The grid that the forms of the routed convolution are chosen from: the maps of small CIFAR networks, 1 to 8 experts."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from research.bench.case import BOTH, directed, fast, normal
from research.ops import routed_conv

BATCH = 64
SHAPES = ((196, 16), (49, 32), (16, 64), (4, 128), (256, 64), (64, 128))
"""Pixels of a map and its channels in and out."""
EXPERTS = (1, 2, 8)

Measured = tuple[dict[str, float], dict[str, dict[str, Callable[[], Any]]]]


def cases() -> Iterator[Measured]:
    """Yields (features, {direction: {form: call}}); a form is chosen once for both directions, so that they are timed together."""
    for pixels, channels in SHAPES:
        side = round(pixels**0.5)
        for count in EXPERTS:
            width = channels // count
            arrays = normal(1, (BATCH, side, side, width)), normal(2, (3, 3, width, count, width)), jnp.arange(BATCH) % count
            calls = {}
            # For two experts "grouped" is about as quick as the best of the others, and takes many times as long to compile.
            for form in [name for name in fast(routed_conv.FORMS) if count > 2 or name != "grouped"]:
                run = functools.partial(routed_conv.routed_conv, form=form)
                calls[form] = functools.partial(jax.jit(directed(run, BOTH, 2)), normal(3, (BATCH, side, side, width)), *arrays)
            yield {"pixels": pixels, "inputs": width, "outputs": width, "experts": count}, {"forward": calls}
