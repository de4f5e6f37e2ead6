"""Measures cases: all contenders of a case in turns, in one process, beside the floor that the machine sets."""

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from research.bench.case import Built, Case
from research.report import machine, timing

SECONDS = 3.0  # of timed calls of one contender
MAX_REPEATS = 30
FEW, SLOW_S = 5, 5.0  # the least number of timed calls, one where a single call takes longer than SLOW_S
LEAD, LED_MS = (
    2,
    100.0,
)  # the first call after another library's is several times slower: threads wake up, caches are cold
PAUSE_S = 0.01  # threads of OpenMP go on spinning for milliseconds after a call of torch
FOREIGN = ("torch", "transformers")


def rates() -> dict[str, float]:
    """What the machine reaches in this run: FLOP/s of a matrix product, bytes/s in place on a donated buffer."""
    return {"gemm_flops_per_s": machine.gemm_rate(), "bandwidth_bytes_per_s": machine.bandwidth()}


def floor_ms(flops: float, num_bytes: float, measured: Mapping[str, float]) -> float:
    """Milliseconds that the job needs at the measured rates: the larger of products and traffic."""
    return 1e3 * max(flops / measured["gemm_flops_per_s"], num_bytes / measured["bandwidth_bytes_per_s"])


def header(measured: Mapping[str, float], peers: Sequence[str]) -> dict[str, str]:
    """What the figures depend on, in words: versions, commit, device, threads, flags and the two rates."""
    packages = ["jax", "jaxlib", "numpy", *FOREIGN[: 2 if "transformers" in peers else 1 if peers else 0]]
    git = machine.git_state()
    commit = (
        "none"
        if git is None or git["commit"] is None
        else git["commit"][:12] + (" and changes" if git["dirty"] else "")
    )
    device = machine.device_summary()
    return {
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
        + f", python {platform.python_version()}",
        "commit": commit,
        "device": f"{device['count']} x {device['platform']}, {device['kind']}, {device['threads']} threads",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "rates": f"{measured['gemm_flops_per_s'] / 1e9:.1f} GFLOP/s matrix product, "
        f"{measured['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s in place",
    }


def select(case: Case, implementations: bool, peers: Sequence[str]) -> dict[str, Callable[..., Built]]:
    """The contenders of a case that are asked for, "ours" first."""
    chosen = dict(case.contenders)
    if implementations:
        chosen |= {f"implementation {name}": make for name, make in case.implementations.items()}
    return chosen | {name: make for name, make in case.peers.items() if name.split()[0] in peers}


def measure(
    case: Case, measured: Mapping[str, float], *, implementations: bool = False, peers: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Times the contenders of a case, interleaved.

    Args:
      measured: as `rates` returns it.
      implementations: also time every implementation of the op by name.
      peers: names of the peers to time.

    Returns:
      One row a contender: name, shape, direction, contender, median_ms, p5_ms, p95_ms, repeats, compile_s (trace, lower
      and compile), temp_bytes, flops, num_bytes, floor_ms, of_floor (median over the floor) and of_ours (median over
      ours).
    """
    inputs = case.inputs()
    chosen = select(case, implementations, peers)
    built = {name: make(*inputs) for name, make in chosen.items()}
    calls = {name: one.call for name, one in built.items()}
    pause = PAUSE_S if len(chosen) > len(case.contenders) and any(name.split()[0] in peers for name in chosen) else 0.0
    times = timed(calls, SECONDS, pause)
    floor, ours = floor_ms(case.flops, case.num_bytes, measured), times["ours"]["median_ms"]
    return [
        {
            "name": case.name,
            "shape": case.shape,
            "direction": case.direction,
            "contender": name,
            **stats,
            "compile_s": built[name].compile_s,
            "temp_bytes": built[name].temp_bytes,
            "flops": case.flops,
            "num_bytes": case.num_bytes,
            "floor_ms": floor,
            "of_floor": stats["median_ms"] / floor,
            "of_ours": stats["median_ms"] / ours,
        }
        for name, stats in times.items()
    ]


def timed(calls: Mapping[str, Callable[[], Any]], seconds: float, pause_s: float = 0.0) -> dict[str, dict[str, float]]:
    """`timing.latency` with as many calls of each as fit into `seconds`, from FEW to MAX_REPEATS, the fast ones led in
    by others."""
    once = {name: _warm_up(call, pause_s) for name, call in calls.items()}
    counts = {name: max(FEW, min(MAX_REPEATS, round(1e3 * seconds / max(ms, 1e-3)))) for name, ms in once.items()}
    counts |= {name: 1 for name, ms in once.items() if ms > 1e3 * SLOW_S}
    lead = {name: LEAD for name, ms in once.items() if ms < LED_MS}
    return timing.latency(calls, warmup=0, repeats=counts, lead=lead, pause_s=pause_s)


def _warm_up(call: Callable[[], Any], pause_s: float) -> float:
    """Calls twice, or once what is slow: a library's first call may hold its set-up. Returns ms of the last call."""
    ms = 0.0
    for _ in range(2):
        ms = timing.latency({"": call}, warmup=0, repeats=1, pause_s=pause_s)[""]["median_ms"]
        if ms > 1e3 * SLOW_S:
            break
    return ms
