"""The grid that the implementations of softmax attention are chosen from: lengths up to 4,096, with and without
causality."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from research.bench.case import BOTH, directed, fast, normal
from research.bench.tune import Measured, register
from research.ops import attention

LENGTHS = (64, 256, 1024, 4096)
TOKENS = 4096
HEADS, WIDTH = 4, 64


@register("softmax_attention")
def cases() -> Iterator[Measured]:
    """Yields (features, {direction: {implementation: call}}); an implementation is chosen once for both directions, so
    that they are timed together."""
    for length in LENGTHS:
        arrays = tuple(normal(seed, (TOKENS // length, length, HEADS, WIDTH)) for seed in range(4))
        for causal in (False, True):
            calls: dict[str, Callable[[], Any]] = {}
            for implementation in fast(attention.IMPLEMENTATIONS):
                run = functools.partial(attention.softmax_attention, causal=causal, implementation=implementation)
                calls[implementation] = functools.partial(jax.jit(directed(run, BOTH, 3)), *arrays)
            yield {"queries": length, "keys": length, "causal": 2 if causal else 1}, {"forward": calls}
