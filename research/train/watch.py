"""What a run tells of itself while it runs: where its time goes, a live status file, a profiler trace, who is slow."""

import contextlib
import datetime
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.data.section import DataSection
from research.errors import UserError
from research.files import make_folder, write_text

SLOW = 1.5
"""A process whose own time a step is this many times the median of all is a straggler."""
PARTS = ("data", "dispatch", "wait")


@dataclass
class Clock:
    """Wall time of a run over all its starts, and what was spent in steps since the last log line."""

    before: float = 0.0
    start: float = field(default_factory=time.perf_counter)
    mark: float = field(default_factory=time.perf_counter)
    paused: float = 0.0

    def wall(self) -> float:
        return self.before + time.perf_counter() - self.start

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves evaluation and saving out of the step's time."""
        began = time.perf_counter()
        yield
        self.paused += time.perf_counter() - began

    def lap(self) -> float:
        """Seconds since the last lap, pauses left out."""
        now = time.perf_counter()
        seconds, self.mark, self.paused = now - self.mark - self.paused, now, 0.0
        return max(seconds, 1e-9)


class Breakdown:
    """Seconds of a step's parts since the last log line: waiting for data, handing programs to the device, waiting for
    its numbers."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began

    def lap(self, steps: int) -> dict[str, float]:
        """Returns "PART_ms" -> milliseconds a step since the last lap."""
        out = {f"{part}_ms": 1e3 * seconds / max(steps, 1) for part, seconds in self.seconds.items()}
        self.seconds = dict.fromkeys(PARTS, 0.0)
        return out


def timely(batches: Iterator[Any], step: int, data: DataSection, folder: Path, safe: Callable[[], str]) -> Any:
    """Returns the next batch; a source that fails or stalls ends the run in one line.

    Args:
      batches: the source.
      step: whose batch it is.
      data: the config's section.
      folder: of the run, where the traceback of a source that fails is kept, in error.txt.
      safe: says what the run continues from.

    Raises:
      UserError: it failed, or took longer.
    """
    limit = data.stall_s
    try:
        with deadline(limit):
            return next(batches)
    except UserError:
        raise
    except Late:
        lost = f"gave no batch for step {step} in {limit:g} s (data.stall_s)"
    except Exception as error:
        write_text(folder / "error.txt", traceback.format_exc())
        first = (str(error).strip().splitlines() or ["no message"])[0][:200]
        lost = f"failed at step {step}: {type(error).__name__}: {first} (all of it in {folder / 'error.txt'})"
    raise UserError(f"data {data.name} {lost}; {safe()}")


def stragglers(own_ms: float) -> list[str]:
    """Returns a line for each process whose own time a step is far above the median's. All processes must call it."""
    if jax.process_count() == 1:
        return []
    from jax.experimental import multihost_utils

    return slow_ones(np.asarray(multihost_utils.process_allgather(np.float32(own_ms))).reshape(-1))


def slow_ones(every: np.ndarray) -> list[str]:
    """Returns a line for each of the processes whose ms a step are `SLOW` times their median, and 5 ms above it."""
    median = float(np.median(every))
    slow = [(i, ms) for i, ms in enumerate(every) if ms > SLOW * median and ms > median + 5]
    return [
        f"process {i} is slow: {ms:.0f} ms a step for data and host work, the median {median:.0f} ms" for i, ms in slow
    ]


class Profile:
    """A profiler trace of some updates, for TensorBoard or Perfetto, in the run's folder.

    Args:
      text: "START:COUNT", the first update and how many; "" for none.
      folder: where the trace goes.

    Raises:
      UserError: the text is not of this implementation.
    """

    def __init__(self, text: str, folder: Path):
        self.folder, self.on = folder, False
        self.first = self.last = -1
        if text:
            start, _, count = text.partition(":")
            if not (start.isdigit() and (count or "1").isdigit() and int(count or 1)):
                raise UserError(
                    f"train.profile={text!r}; valid: START:COUNT, e.g. 20:5 for five updates from update 20 on"
                )
            self.first, self.last = int(start), int(start) + int(count or 1)

    def before(self, step: int, state: Any) -> None:
        """Starts or ends the trace, as update `step` is about to run."""
        if self.on and step >= self.last:
            jax.block_until_ready(state)
            self.close()
        elif not self.on and self.first <= step < self.last:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(make_folder(self.folder)))
            self.on = True

    def close(self) -> None:
        if self.on:
            jax.profiler.stop_trace()
            self.on = False
            self.first = self.last = -1


def status(state: str, step: int, total: int, **more: Any) -> dict[str, Any]:
    """Returns what status.json holds: the state (starting, training, evaluating, saving, finished, stopped, failed),
    step, total, time, pid."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"state": state, "step": step, "total": total, "time": now, "pid": os.getpid(), **more}


class Late(Exception):
    """A deadline has passed."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises Late in the main thread when the body takes longer; 0: never, and not in other threads."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: Any) -> None:
        raise Late

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
