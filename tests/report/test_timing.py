"""Interleaving, percentiles and the memory sum."""

import time
import types

import jax
import jax.numpy as jnp
import pytest

from research.report import timing


def test_calls_interleave_and_rotate():
    calls = []
    fns = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    stats = timing.latency(fns, warmup=2, repeats=3)
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab"
    assert list(stats) == ["a", "b", "c"] and stats["a"]["repeats"] == 3


def test_latency_is_in_milliseconds_of_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def taking(*seconds):
        left = iter(seconds)
        return lambda: now.__setitem__(0, now[0] + next(left))

    stats = timing.latency({"slow": taking(0.02, 0.06, 0.04), "fast": taking(0.001, 0.001, 0.001)}, warmup=0, repeats=3)
    assert stats["slow"]["median_ms"] == pytest.approx(40) and stats["fast"]["median_ms"] == pytest.approx(1)
    assert stats["slow"]["p5_ms"] == pytest.approx(22) and stats["slow"]["p95_ms"] == pytest.approx(58)


def test_latency_waits_for_every_output(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    timing.latency({"f": lambda: {"a": 1, "b": 2}}, warmup=1, repeats=2)
    assert waited == [{"a": 1, "b": 2}] * 3


def test_no_call_at_all_is_refused():
    with pytest.raises(ValueError, match="repeats=0"):
        timing.latency({}, repeats=0)


def test_memory_of_a_compiled_program():
    x = jnp.ones((256, 256))
    size = x.nbytes
    assert timing.memory(jax.jit(lambda x: x + 1).lower(x).compile()) == 2 * size
    assert timing.memory(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()) == size
    # The first product is a temporary of the second.
    assert timing.memory(jax.jit(lambda x: (x @ x) @ x).lower(x).compile()) >= 3 * size


def test_memory_sum_and_none():
    stats = types.SimpleNamespace(
        argument_size_in_bytes=1000, temp_size_in_bytes=200, output_size_in_bytes=30, alias_size_in_bytes=4
    )
    assert timing.memory(types.SimpleNamespace(memory_analysis=lambda: stats)) == 1226
    assert timing.memory(types.SimpleNamespace(memory_analysis=lambda: None)) is None


def test_numbers_are_plain_floats():
    (numbers,) = timing.latency({"f": lambda: None}, warmup=0, repeats=2).values()
    assert {key: type(value) for key, value in numbers.items()} == {
        "median_ms": float,
        "p5_ms": float,
        "p95_ms": float,
        "repeats": int,
    }
