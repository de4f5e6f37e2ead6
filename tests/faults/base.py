"""Runs of seconds into which faults are injected, and how they are judged."""

import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.train.manifests import MANIFEST

LIMIT_S = 600
FLAGS = [
    "--config=tests/tiny.py",
    "--config.train.duration=300",
    "--config.train.log_every=10",
    "--config.checkpoint.every=10",
]
FLAGS += ["--config.eval.every=100"]


@dataclass
class Outcome:
    """What became of an injected fault: how often it was injected, whether all was well each time, and what was
    said."""

    fault: str
    times: int
    well: int
    said: str

    def row(self) -> dict[str, str | int]:
        return {"fault": self.fault, "times": self.times, "well": self.well, "what was said": self.said}


class Failed(AssertionError):
    """An injected fault did harm."""


def require(condition: bool, text: str) -> None:
    if not condition:
        raise Failed(text)


class Runs:
    """Runs in one scratch folder, with the compiled programs kept between them."""

    def __init__(self, root: Path, seed: int = 0, programs: str = ""):
        self.root, self.random = root, random.Random(seed)
        self.environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": programs or str(root / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    # -- running --------------------------------------------------------------------------------------------------

    def words(self, workdir: Path, *more: str, module: tuple[str, ...] = ("launch.train",)) -> list[str]:
        return [sys.executable, "-m", *module, *FLAGS, f"--workdir={workdir}", *more]

    def train(
        self, workdir: Path, *more: str, module: tuple[str, ...] = ("launch.train",), **options
    ) -> subprocess.CompletedProcess:
        try:
            words = self.words(workdir, *more, module=module)
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=LIMIT_S, env=self.environment, **options
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"{workdir.name} hung for {LIMIT_S} s") from None
        require(
            "Traceback" not in done.stdout + done.stderr, f"{workdir.name} ended in a traceback: {done.stderr[-800:]}"
        )
        return done

    def begin(self, workdir: Path, *more: str, module: tuple[str, ...] = ("launch.train",)) -> subprocess.Popen:
        words = self.words(workdir, *more, module=module)
        return subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment
        )

    def wait_for(self, process: subprocess.Popen, workdir: Path, step: int) -> None:
        """Waits until a checkpoint of at least this step is whole."""
        until = time.time() + LIMIT_S
        while max(whole_steps(workdir), default=0) < step:
            require(process.poll() is None and time.time() < until, f"{workdir.name} did not come to step {step}")
            time.sleep(0.005)

    def error(self, done: subprocess.CompletedProcess, code: int = 2) -> str:
        """Returns the one line of a run that ended with a mistake or an injected fault."""
        lines = done.stderr.strip().splitlines()
        require(
            done.returncode == code,
            f"exit code {done.returncode}, not {code}: {done.stdout[-300:]} {done.stderr[-300:]}",
        )
        require(1 <= len(lines) <= 2 and "error: " in lines[-1], f"not one or two lines: {done.stderr[-800:]}")
        return lines[-1].replace(str(self.root), "RUNS")

    # -- judging --------------------------------------------------------------------------------------------------

    def check_same(self, workdir: Path, reference: Path) -> None:
        """Raises Failed unless a run ended with the bits of the reference."""
        same = (workdir / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
        require(same, f"{workdir.name}: metrics.jsonl differs")
        ours, theirs = final_arrays(workdir), final_arrays(reference)
        require(ours.keys() == theirs.keys(), f"{workdir.name}: other arrays")
        for name in theirs:
            require(np.array_equal(ours[name], theirs[name]), f"{workdir.name}: {name} differs")


class Suite(Runs):
    """Runs beside a reference that nothing happened to."""

    def __init__(self, root: Path, seed: int = 0):
        super().__init__(root, seed)
        self.reference = root / "reference"
        done = self.train(self.reference)
        require(done.returncode == 0, f"the reference run failed: {done.stderr[-500:]}")
        begun = time.time()
        done = self.train(root / "again")
        self.whole_s = time.time() - begun
        self.check_same(root / "again", self.reference)

    def go_on(self, workdir: Path, expected: int | None = None, *more: str) -> str:
        """Starts the same run again to its end and judges it; returns what it said of where it continued."""
        done = self.train(workdir, *more)
        require(done.returncode == 0, f"{workdir.name} did not continue: {done.stderr[-500:]}")
        said = [line for line in done.stdout.splitlines() if line.startswith(("resumed", "checkpoint"))]
        if expected is not None:
            require(f"resumed from step {expected}" in said, f"{workdir.name}: {said}, not from {expected}")
        self.check_same(workdir, self.reference)
        return "; ".join(said)


def whole_steps(workdir: Path) -> list[int]:
    """Returns the steps whose checkpoint has its manifest."""
    folder = workdir / "checkpoints"
    return (
        sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / MANIFEST).exists())
        if folder.exists()
        else []
    )


def half_saved(workdir: Path) -> bool:
    """Whether a checkpoint is being written: no whole step, but something of one."""
    folder = workdir / "checkpoints"
    names = [p for p in folder.iterdir() if p.name != "rejected"] if folder.exists() else []
    return any(not (p / MANIFEST).exists() for p in names if p.is_dir())


def final_arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Returns the parameters, statistics and optimizer state of the newest checkpoint."""
    import jax

    from research.train.extraction import Trained

    trained = Trained(workdir)
    leaves = jax.tree_util.tree_flatten_with_path(trained.state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
