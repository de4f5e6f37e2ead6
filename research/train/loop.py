"""The harness: one loop, top to bottom: reshape if due, save if due, evaluate if due, next batch, update, read the
update before.

It drives a `Learner` and knows no method. The device is never waited for, except where numbers must be on disk. A run
is a function of its config: killed at any point and started again it ends with the same bits and the same
`metrics.jsonl`.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from research import stopping
from research.errors import UserError
from research.files import write_json
from research.report.run_card import write_report
from research.stopping import Preempted
from research.train import finish, learner_registry, processes, watch
from research.train.journal import Journal, NotFinite, Pending
from research.train.learner import Make, Reporter
from research.train.parts import make_parts
from research.train.restore import whole_steps
from research.train.sections import RunConfig
from research.train.watch import Clock

__all__ = ["NotFinite", "Preempted", "Reporter", "Run", "train"]


class Run:
    """One run in its directory; `run()` trains and reports.

    Attributes:
      step, state: updates that were made, and what they made.
      first: the update that this start began with.
      pending: the update whose numbers are not read yet.
      lines: of the journals, when the step was saved that the run continues from.
    """

    def __init__(self, config: dict[str, Any], workdir: str, reporter: Reporter, make: Make = learner_registry.make):
        self.config, self.reporter = RunConfig.of(config), reporter
        self.step, self.first, self.stop = 0, 0, stopping.Stop()
        self.state: Any = None
        self.lines: dict[str, int] = {}
        self.clock = Clock()
        self.pending: Pending | None = None
        with contextlib.ExitStack() as closing:
            # A stop while a program is waited for finds the state of the last whole update.
            own = lambda config: make(config, self._tick, self._waited)
            parts = make_parts(config, Path(workdir), reporter, own, closing)
            self.heart, self.learner, self.rundir = parts.heart, parts.learner, parts.rundir
            self.evaluations, self.checkpoints, self.saves = parts.evaluations, parts.checkpoints, parts.saves
            self.profile, self.total, self.step = parts.profile, parts.learner.total, parts.saves.newest()
            status, safe = self._status, self.saves.safe
            self.journal = Journal(self.learner, self.config, self.rundir, reporter, status=status, safe=safe)
            self.closing = closing.pop_all()

    def begin(self, state: Any) -> None:
        """Sets the run to update 0 of a state, whatever its folder holds, for whoever makes its updates himself."""
        self.step, self.first, self.state, self.clock = 0, 0, state, Clock()

    # -- state -------------------------------------------------------------------------------------------------

    def _start(self) -> tuple[int, Any, Clock]:
        """Restores the newest valid checkpoint, or makes the initial state."""
        newest = processes.agree(self.saves.newest())
        if not newest:
            clock = Clock()
            return 0, self.learner.initial(self.reporter.say), clock
        self.learner.adopt(self.checkpoints.about(newest))
        found, run = self.checkpoints.restore(newest, self.learner.wanted())
        self.reporter.say(f"resumed from step {newest}")
        self.saves.step, self.lines = newest, run.get("lines", {})
        self.journal.flops, self.journal.skipped = run["flops"], run.get("skipped", 0)
        return newest, self.learner.whole(found), Clock(before=run["wall_s"])

    def _tick(self) -> None:
        if self.stop and jax.process_count() == 1:
            raise Preempted(self.step, self.stop.told)

    def _tick_step(self) -> None:
        """Between updates: several processes stop where all of them have come to."""
        if jax.process_count() > 1 and processes.told_to_stop(self.step):
            raise Preempted(self.step, self.stop.told or "SIGTERM")
        self._tick()

    # -- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Trains to the end, writes the report and returns it.

        Raises:
          Preempted: SIGTERM, Ctrl-C or a closed terminal; the state is saved.
          UserError: NaN, a full disk, or a config that does not fit.
        """
        with processes.listening() as self.stop, contextlib.ExitStack() as heeding:
            self.stop.last = self._last_words
            try:
                self._prepare()
                heeding.enter_context(self.stop.heeded())
                report = self._run()
                self._status("finished")
                return report
            except BaseException as error:
                heeding.enter_context(self.stop.heeded())  # closing is not interrupted
                stopped = isinstance(error, Preempted | stopping.Told)
                with contextlib.suppress(OSError, UserError):
                    why: dict[str, str] = {} if stopped else {"error": str(error) or type(error).__name__}
                    self._status("stopped" if stopped else "failed", **why)
                with contextlib.suppress(OSError):  # of the disk that was told of already
                    self.closing.close()
                if isinstance(error, stopping.Told):  # before the first update
                    raise Preempted(self.step, error.by) from None
                raise
            finally:
                self.stop.last = lambda: None
                self.closing.close()

    def _run(self) -> dict[str, Any]:
        try:
            self._tick()
            self._train()
            self._settle()
            if not self.saves.done(self.step):  # first: whatever becomes of the evaluation, the training is not lost
                self.saves.surely(self.step, self.save)
            if self.learner.validates and not self.evaluations.ended:
                self._evaluate(final=True)
            self.checkpoints.close()
            return self._finish()
        except Preempted as stop:
            self._settle()
            if self.step and not self.saves.done(self.step):
                self.reporter.say(f"told to stop: saving step {self.step} (a second Ctrl-C ends at once)")
                self.saves.surely(self.step, self.save)
            self.checkpoints.close()
            raise Preempted(self.step, self.stop.told or "SIGTERM") from stop

    def _prepare(self) -> None:
        """All that comes before the first update; a signal ends it anywhere."""
        self._tick()
        with self.heart.at(lambda: "comparing the data with those that the run knows"):
            self.learner.keep(self.rundir.path, bool(self.checkpoints.steps()))
        with self.heart.at(lambda: "making the state"):
            self.step, self.state, self.clock = self._start()
        self.first = self.step
        for line in self.rundir.cut_back(self.step, self.lines):
            self.reporter.say(line)
        self.evaluations.recall(self.rundir.path, self.step, self.total, reads=self.rundir.writes)
        for line in self.learner.announce():
            self.reporter.say(line)
        self._write_layout()
        self.learner.prefetch(self.step)
        self.journal.begin(self.step, self.clock)

    def _write_layout(self) -> None:
        if self.rundir.writes:
            write_json(self.rundir.path / "layout.json", self.learner.layout())

    def _train(self) -> None:
        eval_every = self.learner.steps(self.config.eval.every, "eval.every") if self.learner.validates else 0
        save_every = self.learner.steps(self.config.checkpoint.every, "checkpoint.every")
        due: Callable[[int], bool] = lambda every: bool(every and self.step and self.step % every == 0)
        batches = self.learner.batches(self.step)
        while self.step < self.total and not self.evaluations.reached:
            self._reshape()
            if due(save_every) and self.step != self.saves.step:
                self._settle()
                with self.clock.pause():
                    self.save()
            if due(eval_every) and self.step != self.evaluations.last:
                self._settle()
                with self.clock.pause():
                    self._evaluate()
                if self.evaluations.reached:
                    self.reporter.say(self.evaluations.told(self.step, self.total))
                    break
            self._tick_step()
            self.profile.before(self.step, self.state)
            with self.journal.parts.of("data"):
                batch = watch.timely(batches, self.step, self.config.data, self.rundir.path, self.saves.safe)
            with self.journal.parts.of("dispatch"), self.heart.at(self._at_work):
                self.state, numbers = self.learner.update(self.step, self.state, batch)
            self.step += 1
            if self.step == self.first + 1 and (line := self.learner.memory()):
                self.reporter.say(line)
            previous, self.pending = self.pending, (self.step, numbers)
            self.journal.read(previous)

    def _reshape(self) -> None:
        """Takes another shape where a method asks for it, and saves it, so that a resumed run need not be asked."""
        if self.step == self.saves.step or not self.learner.reshape_due(self.step):
            return  # what is saved has its shape
        self._settle()
        if (state := self.learner.reshape(self.step, self.state, self.reporter.say)) is not None:
            self.state = state
            with self.clock.pause():
                if self.step:  # before the first update there is nothing to lose, and 0 stands for no checkpoint
                    self.save()
                self._write_layout()
                self.learner.prefetch(self.step)

    def _at_work(self) -> str:
        return self.learner.compiling() if self.learner.busy() else f"update {self.step + 1}"

    def _settle(self) -> None:
        """Reads the numbers of the last update: after it, what is on disk is whole up to this step."""
        pending, self.pending = self.pending, None
        self.journal.read(pending)

    def _last_words(self) -> None:
        """Where a second Ctrl-C ends the process."""
        self._status("stopped")
        self.reporter.say(f"ended at once by a second Ctrl-C; {self.saves.on_disk()}")

    def _waited(self, title: str, seconds: float) -> None:
        """Told where training waits for a program that was not compiled ahead."""
        self.journal.waited(seconds)
        if seconds > 1 and self.step > self.first + self.learner.round:
            self.reporter.say(f"step {self.step}: waited {seconds:.1f} s while the {title} program was compiled")

    # -- evaluation and saving ---------------------------------------------------------------------------------

    def _status(self, state: str, **more: Any) -> None:
        self.rundir.status(watch.status(state, self.step, self.total, checkpoint=self.saves.newest(), **more))

    def _evaluate(self, final: bool = False) -> None:
        self._status("evaluating")
        goal = self.learner.goal
        with self.heart.at(lambda: self.learner.compiling() if self.learner.busy() else "evaluating"):
            value, record = self.learner.evaluate(self.state, final)
        self.rundir.metrics(self.step, record)
        self.evaluations.note(self.step, value, final=final)
        self.reporter.say(f"step {self.step}: validation {goal.name} of the full network {goal.shown(value)}")

    def save(self) -> None:
        """Starts saving the state; the updates that follow do not wait for the disk."""
        self._status("saving")
        run: dict[str, Any] = {"step": self.step, "wall_s": self.clock.wall(), "flops": self.journal.flops}
        run |= {"skipped": self.journal.skipped, "lines": dict(self.rundir.lines), **self.learner.describe()}
        self.saves.start(self.step, self.learner.kept(self.state), run)

    def _finish(self) -> dict[str, Any]:
        """Makes and writes the report: only then the run is finished."""
        learner = self.learner
        self.journal.judge(self.step, {"validation": self.evaluations.values[self.step]} if learner.validates else {})
        with self.heart.at(lambda: learner.compiling() if learner.busy() else "making the report"):
            report = learner.report(self.state, self.rundir.path)
        report |= finish.facts(self.rundir.path, self.clock.wall(), self.journal, self.step)
        self.journal.judge(self.step, {report["metric"]: report["subnets"][0]["value"]} if report["split"] else {})
        for line in finish.remarks(report, self.rundir.path):
            self.reporter.say(line)
        if self.rundir.writes:
            write_report(self.rundir.path, report)
        processes.barrier("the report is written")
        return report


def train(
    config: dict[str, Any], workdir: str, reporter: Reporter, make: Make = learner_registry.make
) -> dict[str, Any]:
    """Runs a config in a directory (again: resumes) and returns the report, written as report.json, report.md and
    pareto.png.

    Args:
      config: a resolved config, see `research.train.config`.
      workdir: the run's folder.
      reporter: where lines for humans go.
      make: the learner; by default the one that the config names.

    Raises:
      UserError: a config, a folder or data that do not fit, a full disk, NaN.
      Preempted: SIGTERM, Ctrl-C or a closed terminal; the state is saved.
    """
    try:
        with processes.listening():
            if jax.process_count() == 1:
                stopping.heed()
            return Run(config, workdir, reporter, make).run()
    except stopping.Told as told:
        raise Preempted(max(whole_steps(Path(workdir) / "checkpoints"), default=0), told.by) from None
