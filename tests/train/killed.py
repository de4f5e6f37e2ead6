"""Runs in processes of their own, which SIGKILL ends: what is tested is what a kill leaves on disk.

A process imports everything once, and forks for each run before JAX starts: a run costs no import.
"""

import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from research.train.restore import whole_steps
from tests.train.reporter import Lines

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120
IMPORTED = ("research.train.loop", "research.train.supervised", "research.control.learner", "tests.methods.cases")
"""What runs import is imported before the forks; the last registers methods of the tests."""


class Killing(Lines):
    """Ends the process by SIGKILL once an update's numbers are read and a checkpoint is whole."""

    def __init__(self, workdir: str, at: int, saved: int):
        super().__init__()
        self.folder, self.at, self.saved = Path(workdir) / "checkpoints", at, saved

    def progress(self, done, total, text):
        super().progress(done, total, text)
        if done < self.at:
            return
        until = time.monotonic() + PATIENCE_S
        while max(whole_steps(self.folder), default=0) < self.saved and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)


def train(config: dict[str, Any], workdir: str, at: int = 0, saved: int = 0) -> list[str]:
    """Trains a run to its end, or to update `at` where it is killed; returns what it said."""
    from research.train import loop

    lines = Killing(workdir, at, saved) if at else Lines()
    loop.train(config, workdir, lines)
    return lines.said


def arrays(workdir: str) -> dict[str, Any]:
    """Returns the arrays that a run ended with, as NumPy's: parameters, statistics, those of methods."""
    import jax

    from research.train.extraction import Trained

    trained = Trained(Path(workdir))
    trained.programs.close()
    state = trained.state
    return jax.device_get({"params": state.params, "stats": state.stats, "methods": state.methods})


class Processes:
    """Calls functions, each in a process of its own that was forked for it.

    Args:
      modules: that are imported beside `IMPORTED`, e.g. a plug-in's.
      environment: variables beside those of this process.
    """

    def __init__(self, *modules: str, **environment: str):
        paths = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.killed", *modules],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(timeout=PATIENCE_S)
        self.process.stdout.close()

    def call(self, function: Callable, *args: Any) -> Any:
        """Returns what the function returns in a process of its own."""
        code, result = self._ended(function, *args)
        assert code == 0, result
        return result

    def train(self, config: dict[str, Any], workdir: Path) -> list[str]:
        """Trains to the end; returns what was said."""
        return self.call(train, config, str(workdir))

    def kill(self, config: dict[str, Any], workdir: Path, *, at: int, saved: int) -> None:
        """Trains until the numbers of update `at` are read and the checkpoint `saved` is whole: the newest, then."""
        code, result = self._ended(train, config, str(workdir), at, saved)
        assert code == -signal.SIGKILL, result
        assert max(whole_steps(workdir / "checkpoints")) == saved

    def _ended(self, function: Callable, *args: Any) -> tuple[int, Any]:
        pickle.dump((function, args), self.process.stdin)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)


def _call(function: Callable, args: tuple, out: int) -> int:
    """Writes what a function returns, or its traceback; returns the exit code."""
    try:
        code, result = 0, function(*args)
    except BaseException:
        code, result = 1, traceback.format_exc()
    with os.fdopen(out, "wb") as file:
        pickle.dump(result, file)
    return code


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what runs print is no answer
    while True:
        try:
            function, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.close(read)
            os._exit(_call(function, args, write))
        os.close(write)
        with os.fdopen(read, "rb") as file:
            told = file.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        pickle.dump((code, pickle.loads(told) if told else "nothing was returned"), answers)
        answers.flush()


if __name__ == "__main__":
    from research.process import set_allocator, set_dispatch, set_xla_flags

    set_allocator()
    set_dispatch()
    set_xla_flags()
    for module in (*IMPORTED, *sys.argv[1:]):
        importlib.import_module(module)
    _serve()
