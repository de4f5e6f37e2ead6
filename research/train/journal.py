"""What a run reads of its updates and writes down: lines of metrics, speed, the time that is left, and an end where
numbers are no numbers."""

from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from research.errors import UserError
from research.report import machine
from research.train import records, watch
from research.train.learner import Learner, Reading, Reporter
from research.train.rundir import RunDir
from research.train.sections import RunConfig
from research.train.watch import Clock

LEAST_UPDATES = 20
"""Skipped updates are judged over at least so many, or over the whole run."""
SPEED_LAPS = 5
"""Lines of the log whose speed the time left is told by."""


class NotFinite(UserError):
    """The loss, too many gradients or the last validation are NaN or Inf."""


Pending = tuple[int, Any]
"""(updates made, the numbers of the last one, on the device)."""


class Journal:
    """Reads the numbers of finished updates.

    Args:
      learner, config: of the run.
      rundir: where lines go.
      reporter: told when a line is due.
      status: called with what status.json holds beside the step.
      safe: returns what a run that ends here continues from.

    Attributes:
      flops: of the run so far.
      skipped: updates of the run so far whose gradient was not finite, with train.nan=skip.
    """

    def __init__(
        self,
        learner: Learner,
        config: RunConfig,
        rundir: RunDir,
        reporter: Reporter,
        *,
        status: Callable[..., None],
        safe: Callable[[], str],
    ):
        self.learner, self.config, self.rundir = learner, config, rundir
        self._reporter, self._status, self._safe = reporter, status, safe
        self.gemm = machine.gemm_rate()  # measured now, before compiling threads share the cores
        self.parts = watch.Breakdown()
        self.log_every = max(learner.steps(config.train.log_every, "train.log_every"), 1)
        self.flops, self.skipped = 0.0, 0
        self.clock, self._first, self._logged = Clock(), 0, 0
        self._interval_flops, self._window = 0.0, (0, 0)
        self._laps: deque[tuple[int, float]] = deque(maxlen=SPEED_LAPS)
        self._quiet = False

    def begin(self, step: int, clock: Clock) -> None:
        """Starts at a step; what came before does not count for speed."""
        self.clock, self._first, self._logged, self._quiet = clock, step, step, False
        clock.lap()

    def waited(self, seconds: float) -> None:
        """Leaves the time that an update waited for its program out of its speed."""
        self.clock.paused += seconds
        self.parts.seconds["dispatch"] -= seconds

    def read(self, pending: Pending | None) -> None:
        """Reads the metrics of a finished update, None for none: writes a line when one is due.

        Raises:
          NotFinite: a loss or gradient is no number, or most updates are skipped.
        """
        if pending is None:
            return
        step, numbers = pending
        with self.parts.of("wait"):
            host = jax.device_get(numbers)
        reading = self.learner.read(step - 1, host)
        self.flops += reading.flops
        self._interval_flops += reading.flops
        self._check(step, reading)
        if step % self.log_every >= self.learner.round and step != self.learner.total:  # a line for each of a round
            if step == self._first + 1:  # it loads programs and starts threads: no measure of what comes
                self._logged, self._interval_flops = step, 0.0
                self.clock.lap()
            return
        record = reading.record()
        self.rundir.metrics(step, record)
        self._log_speed(step, record)

    def _check(self, step: int, reading: Reading) -> None:
        if self.config.train.nan == "stop":
            for name, loss in reading.losses:
                if not np.isfinite(loss):
                    self._stop_at(step, name, "loss")
            if not reading.finite:
                self._stop_at(step, ",".join(sorted({name for name, _ in reading.losses})), "gradient")
            return
        skipped, seen = self._window
        self.skipped += not reading.finite
        self._window = skipped, seen = skipped + (not reading.finite), seen + 1
        if seen < max(LEAST_UPDATES, self.log_every):
            return
        self._window = 0, 0
        if 2 * skipped > seen:
            raise NotFinite(
                f"{skipped} of the last {seen} updates were skipped, whose gradients were not finite, at step "
                f"{step}; {self._tell()}"
            )

    def _stop_at(self, step: int, name: str, what: str) -> None:
        raise NotFinite(f"{what} is not finite at step {step}, sub-network {name}; {self._tell()}, or train.nan=skip")

    def _tell(self) -> str:
        return f"{self._safe()}. Lower optim.lr, set optim.clip_norm"

    def judge(self, step: int, values: dict[str, float]) -> None:
        """Judges a whole run.

        Args:
          step: its last.
          values: split -> the full network's metric.

        Raises:
          NotFinite: more than half of its updates were skipped, or a metric of the full network is no number.
        """
        if 2 * self.skipped > step:
            raise NotFinite(
                f"{self.skipped} of {step} updates were skipped, whose gradients were not finite: this is no "
                f"training; {self._tell()}"
            )
        for split, value in values.items():
            if not np.isfinite(value):
                raise NotFinite(
                    f"{split} {self.learner.goal.name} of the full network is {value} at step {step}; {self._tell()}"
                )

    def _log_speed(self, step: int, record: dict[str, float]) -> None:
        since = max(step - self._logged, 1)
        self._logged = step
        seconds = self.clock.lap()
        rate = since * self.learner.examples / seconds
        mfu = self._interval_flops / seconds / self.gemm / jax.device_count()
        self._interval_flops = 0.0
        eta, sure = self._time_left(step, since, seconds)
        unit = self.learner.unit
        timing = {f"{unit}_per_s": rate, "mfu": mfu, "wall_s": self.clock.wall(), "step_ms": 1e3 * seconds / since}
        parts = self.parts.lap(since)
        self.rundir.timings(step, timing | parts)
        for line in watch.stragglers(parts["data_ms"] + parts["dispatch_ms"]):
            self._reporter.say(f"step {step}: {line}")
        self._status("training", loss=record["loss"], eta_s=round(eta), **timing)
        line = records.progress(record, self.learner.headings, rate, unit, mfu, eta, sure)
        self._reporter.progress(step, self.learner.total, line)

    def _time_left(self, step: int, updates: int, seconds: float) -> tuple[float, bool]:
        """Seconds of the updates that are left, and whether these are of updates beside which no program was compiled,
        which slows them."""
        quiet, self._quiet = self._quiet, not self.learner.busy()
        if quiet and self._quiet:
            self._laps.append((updates, seconds))
        laps = self._laps or ((updates, seconds),)
        return (self.learner.total - step) * sum(s for _, s in laps) / sum(n for n, _ in laps), bool(self._laps)
