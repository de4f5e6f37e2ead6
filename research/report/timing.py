"""Latency as medians of interleaved runs, and the memory that a compiled program needs."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def latency(
    fns: Mapping[str, Callable[[], Any]],
    *,
    warmup: int = 3,
    repeats: int | Mapping[str, int] = 30,
    lead: Mapping[str, int] | None = None,
    pause_s: float = 0.0,
) -> dict[str, dict[str, float]]:
    """Times calls without arguments in turn, so that a machine that drifts drifts for all of them alike.

    Args:
      fns: name to function; inputs are closed over and already on the device. All outputs are waited for.
      warmup: untimed calls of each first (compilation happens here).
      repeats: timed calls of each, or a number for each name; the order is turned by one each round, so that none
        always follows the same neighbour, and those with fewer calls are spread evenly over the rounds.
      lead: untimed calls right before each timed one, by name, none by default: its threads wake up and its data come
        back to the caches.
      pause_s: seconds to sleep before that, where threads of another library may still be spinning.

    Returns: name to `{"median_ms", "p5_ms", "p95_ms", "repeats"}`.
    """
    counts = {name: repeats if isinstance(repeats, int) else repeats[name] for name in fns}
    rounds = max(counts.values(), default=repeats if isinstance(repeats, int) else 1)
    if min([rounds, *counts.values()]) < 1:
        raise ValueError(f"repeats={repeats}: at least 1 timed call is needed")
    for fn in fns.values():
        for _ in range(warmup):
            jax.block_until_ready(fn())
    names = list(fns)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            if turn * counts[name] // rounds == (turn + 1) * counts[name] // rounds:
                continue
            if pause_s:
                time.sleep(pause_s)
            for _ in range((lead or {}).get(name, 0)):
                jax.block_until_ready(fns[name]())
            start = time.perf_counter()
            jax.block_until_ready(fns[name]())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: _summary(ms) for name, ms in times.items()}


def _summary(ms: list[float]) -> dict[str, float]:
    p5, median, p95 = np.percentile(ms, [5, 50, 95])
    return {"median_ms": float(median), "p5_ms": float(p5), "p95_ms": float(p95), "repeats": len(ms)}


def memory(compiled: Any) -> int | None:
    """Bytes that one call needs on a device: arguments + temporaries + outputs - aliases (donated buffers).

    Args:
      compiled: `jax.jit(f).lower(*args).compile()`.

    Returns: bytes, or None where the backend does not tell. A conservative figure: XLA's own `peak_memory_in_bytes` has
      been seen below its temporaries.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    return (
        stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    )
