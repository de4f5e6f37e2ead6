"""What the machine is and what it can do: measured peak rates, devices, and the contents of a run's
environment.json."""

import datetime
import functools
import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

MAX_DIFF_CHARS = 200_000
PACKAGES = (
    "jax jaxlib flax optax orbax-checkpoint grain array_record tensorflow-datasets numpy ml_collections jaxtyping "
    "einops scikit-learn safetensors"
).split()
# Variables that change numbers or speed. No others are recorded: an environment holds secrets.
VARIABLES = (
    "NESTAX_ALLOCATOR XLA_FLAGS JAX_PLATFORMS JAX_ENABLE_X64 JAX_DEFAULT_MATMUL_PRECISION JAX_NUM_CPU_DEVICES "
    "OMP_NUM_THREADS LIBTPU_INIT_ARGS XLA_PYTHON_CLIENT_MEM_FRACTION CUDA_VISIBLE_DEVICES TPU_VISIBLE_DEVICES"
).split()


def gemm_rate(size: int | None = None, dtype: Any = jnp.float32) -> float:
    """FLOP/s of one device on a square matrix product, the denominator of MFU: median of several, measured once a
    process.

    Args:
      size: rows and columns of both matrices; by default 1024 on CPU (tens of milliseconds) and 8192 on accelerators.
      dtype: of the inputs and the output.
    """
    if size is None:
        size = 1024 if jax.default_backend() == "cpu" else 8192
    return _gemm_rate(size, jnp.dtype(dtype).name)


@functools.cache
def _gemm_rate(size: int, dtype: str) -> float:
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / _median_seconds(lambda: jax.block_until_ready(product(a, a)))


def bandwidth(num_bytes: int | None = None) -> float:
    """Bytes/s of one device's memory, read plus written, by `x + 1` in place on a donated buffer; measured once a
    process.

    Args:
      num_bytes: the buffer's size; by default 128 MiB on CPU, 1 GiB on accelerators, beyond most caches.
    """
    if num_bytes is None:
        num_bytes = 2**27 if jax.default_backend() == "cpu" else 2**30
    return _bandwidth(num_bytes)


@functools.cache
def _bandwidth(num_bytes: int) -> float:
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(num_bytes // 4, jnp.float32)

    def run() -> None:
        nonlocal x
        x = jax.block_until_ready(step(x))

    return 2 * x.nbytes / _median_seconds(run)


def _median_seconds(run: Callable[[], None], *, repeats: int = 7, budget_s: float = 0.25) -> float:
    """Median seconds of up to `repeats` calls after one warm-up, at least two, stopping when the budget is spent."""
    run()
    times: list[float] = []
    while len(times) < 2 or (len(times) < repeats and sum(times) < budget_s):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def num_threads() -> int:
    """Cores that this process may run on: affinity where the system has it, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_summary() -> dict[str, Any]:
    """The devices of this run: platform, kind, count over all processes, bytes of memory of one (None where
    unknown)."""
    first = jax.local_devices()[0]
    stats = first.memory_stats() or {}
    return {
        "platform": first.platform,
        "kind": _cpu_model() if first.platform == "cpu" else first.device_kind,
        "count": jax.device_count(),
        "processes": jax.process_count(),
        "memory_bytes": stats.get("bytes_limit"),
        "threads": num_threads(),
    }


def _cpu_model() -> str:
    """The processor's name, e.g. "AMD EPYC 7B13"; its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def environment(root: str | os.PathLike | None = None) -> dict[str, Any]:
    """What environment.json holds: all that is needed to run this again, as plain JSON values. No host or user name.

    Args:
      root: folder of the git checkout to describe; by default the one that this package is imported from.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": num_threads(),
        "devices": device_summary(),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]  # JAX adds it
        "git": git_state(root),
    }


def command_line() -> str:
    """The command that started this process, ready to paste: `python -m launch.train --config=...`."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def git_state(root: str | os.PathLike | None = None) -> dict[str, Any] | None:
    """Commit, dirty diff and untracked files of the checkout at `root`; None without git or outside a checkout.

    Returns: `{"commit", "dirty", "diff", "untracked"}`. `commit` and `diff` are None before the first commit. A diff
      longer than MAX_DIFF_CHARS is cut and says so in its last line.
    """
    root = Path(root) if root is not None else Path(__file__).resolve().parents[2]
    top = _git(root, "rev-parse", "--show-toplevel")
    # An installed package may lie inside somebody else's checkout: that one's commit says nothing about this code.
    if top is None or Path(top.strip()).resolve() != root.resolve():
        return None
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    diff = _git(root, "diff", "--no-ext-diff", "--no-color", "HEAD") if commit else None
    if diff is not None and len(diff) > MAX_DIFF_CHARS:
        diff = f"{diff[:MAX_DIFF_CHARS]}\n[cut: {len(diff)} characters in all]\n"
    untracked = (_git(root, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    return {
        "commit": commit.strip() if commit else None,
        "dirty": bool(diff or untracked),
        "diff": diff,
        "untracked": untracked[:200],
    }


def _git(root: Path, *args: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(root), *args]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
