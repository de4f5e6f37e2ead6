"""The one training loop, top to bottom: save if due, evaluate if due, next batch, step, read the step before.

The device is never waited for, except where numbers must be on disk. A run is a function of its config: killed at
any point and started again it ends with the same bits and the same `metrics.jsonl`.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from research import stopping
from research.errors import UserError
from research.files import write_json
from research.modules.state import abstract
from research.nested.schemes import Draw
from research.optim.build import state_bytes
from research.report import machine
from research.report.run_card import write_report
from research.stopping import Preempted
from research.tasks.base import shown
from research.train import (
    ahead,
    costs,
    data,
    experts,
    finish,
    foreseen,
    initial,
    kept,
    processes,
    records,
    sharding,
    watch,
)
from research.train.checkpoint import Checkpoints
from research.train.evaluation import Evaluator
from research.train.heartbeat import Heartbeat
from research.train.journal import Journal, NotFinite, Pending
from research.train.programs import Programs
from research.train.restore import whole_steps
from research.train.rundir import RunDir
from research.train.setup import Setup, make_programs, make_setup
from research.train.state import State
from research.train.update import Updater
from research.train.watch import Clock

__all__ = ["NotFinite", "Preempted", "Reporter", "Run", "train"]

SAVES = 9
"""How often the last save is tried while the clock jumps."""


class Reporter(Protocol):
    """Where a run tells a human what it does."""

    def say(self, line: str) -> None: ...

    def progress(self, done: int, total: int, text: str) -> None: ...


class Run:
    """One run in its directory; `run()` trains and reports."""

    def __init__(self, config: dict[str, Any], workdir: str, reporter: Reporter):
        self.config, self.reporter = config, reporter
        with contextlib.ExitStack() as closing:
            self._make(Path(workdir), closing)
            self.closing = closing.pop_all()

    def _make(self, workdir: Path, closing: contextlib.ExitStack) -> None:
        """Makes the parts; `closing` is told how they end."""
        config, reporter = self.config, self.reporter
        self.heart = Heartbeat(reporter.say)
        closing.callback(self.heart.close)
        with self.heart.at(lambda: f"loading data {config['data']['name']}"):
            self.setup: Setup = make_setup(config)
            foreseen.check(self.setup)
        # A stop while a program is waited for finds the state of the last whole update.
        self.programs: Programs = make_programs(self.setup, waiting=self._tick)
        closing.callback(self.programs.close)
        self.total = self.setup.total
        self.rundir = RunDir(workdir, config, machine.environment(), writes=processes.is_first())
        closing.callback(self.rundir.close)
        processes.barrier("the run's folder is there")
        keep = config["checkpoint"]
        self.metrics: dict[int, float] = {}  # step -> the full network's metric on validation
        self.checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep_last=keep["keep_last"],
            keep_every=keep["keep_every"],
            keep_best=keep["keep_best"],
            metrics=self.metrics,
            higher_is_better=self.setup.task.higher_is_better,
            say=reporter.say,
        )
        closing.callback(self.checkpoints.abandon)
        self.evaluator = Evaluator(self.setup, self.programs, tick=self._tick)
        self.updater = Updater(self.setup, self.programs, self._program)
        self.validates = self.setup.examples("validation") > 0
        work = getattr(self.setup.task, "work", 1)  # of an update, in plain ones
        self.flops = {name: work * costs.training_flops(c) for name, c in self.setup.space.configs.items()}
        self.profile = watch.Profile(config["train"]["profile"], workdir / "profile")
        closing.callback(self.profile.close)
        self.stop = stopping.Stop()
        self.step, self.saved, self.first = max(self.checkpoints.steps(), default=0), -1, 0
        self.lines: dict[str, int] = {}  # of the journals, when the step was saved that the run goes on from
        self.reached = self.ended = False
        self.evaluated = -1  # the last step whose evaluation is done
        self.pending: Pending | None = None  # the update whose numbers are not read yet
        self.journal = Journal(
            self.setup,
            self.rundir,
            progress=reporter.progress,
            say=reporter.say,
            status=self._status,
            safe=self._safe,
            compiling=self.programs.busy,
        )

    # -- state -------------------------------------------------------------------------------------------------

    def _start(self) -> tuple[int, State, Clock]:
        """Restores the newest valid checkpoint, or makes the initial state."""
        newest = processes.agree(max(self.checkpoints.steps(), default=0))
        if newest:
            places = self.programs.state_shapes, self.programs.state_shardings
            state, run = self.checkpoints.restore(newest, kept.wanted(*places, self.programs.full, optimizer=True))
            state = kept.whole(state, self.programs.full, self.programs.stat_shardings)
            self.reporter.say(f"resumed from step {newest}")
            self.saved, self.lines = newest, run.get("lines", {})
            self.journal.flops, self.journal.skipped = run["flops"], run.get("skipped", 0)
            return newest, state, Clock(before=run["wall_s"])
        clock = Clock()
        if self.config["train"]["init_from"]:
            return 0, self.programs.state_from(*initial.arrays(self.setup, self.config, self.reporter.say)), clock
        return 0, self.programs.init_state(), clock

    def _recall(self) -> None:
        """Learns from metrics.jsonl which evaluations are done: they come after the save of their step, which does not
        know of them.

        The first process tells the others, which could read an older file or none.
        """
        own = records.evaluations(self.rundir.path, self.setup.task.metric) if self.rundir.writes else {}
        done = {int(step): values for step, values in json.loads(processes.texts(json.dumps(own))[0]).items()}
        self.metrics.update({step: values[-1] for step, values in done.items()})
        here = done.get(self.step, [])
        self.evaluated = self.step if here else -1
        self.reached = self.step < self.total and bool(here) and self._good_enough(here[0])
        self.ended = len(here) > int(self.reached)  # the evaluation that reached the goal is not the last one
        self.ended = self.ended and (self.reached or self.step == self.total)

    def _good_enough(self, value: float) -> bool:
        goal = self.config["eval"]["stop_at"]
        return goal is not None and (value >= goal if self.setup.task.higher_is_better else value <= goal)

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
                    self._status(
                        "stopped" if stopped else "failed",
                        **({} if stopped else {"error": str(error) or type(error).__name__}),
                    )
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
            if not self._is_saved():  # before the evaluation: whatever becomes of that, the training is not lost
                self._save_surely()
            if self.validates and not self.ended:
                self._evaluate(final=True)
            self.checkpoints.close()
            return self._finish()
        except Preempted as stop:
            self._settle()
            if self.step and not self._is_saved():
                self.reporter.say(f"told to stop: saving step {self.step} (a second Ctrl-C ends at once)")
                self._save_surely()
            self.checkpoints.close()
            raise Preempted(self.step, self.stop.told or "SIGTERM") from stop

    def _prepare(self) -> None:
        """All that comes before the first update; a signal ends it anywhere."""
        self._tick()
        with self.heart.at(lambda: "comparing the data with those that the run knows"):
            data.keep(self.setup.data, self.rundir.path, bool(self.checkpoints.steps()))
        with self.heart.at(lambda: "making the state"):
            self.step, self.state, self.clock = self._start()
        self.first = self.step
        for line in self.rundir.cut_back(self.step, self.lines):
            self.reporter.say(line)
        self._recall()
        self._announce()
        ahead.compile_ahead(self.config, self.setup, self.programs, self.evaluator, self.step)
        self.journal.begin(self.step, self.clock)

    def _train(self) -> None:
        eval_every = self.setup.steps("eval", "every") if self.validates else 0
        save_every = self.setup.steps("checkpoint", "every")
        due = lambda every: every and self.step and self.step % every == 0  # noqa: E731
        grads = self.programs.zero_grads()
        batches = self.setup.batches(self.step, self.programs.share)
        while self.step < self.total and not self.reached:
            if due(save_every) and self.step != self.saved:
                self._settle()
                with self.clock.pause():
                    self._save()
            if due(eval_every) and self.step != self.evaluated:
                self._settle()
                with self.clock.pause():
                    self._evaluate()
                if self.reached:
                    self.reporter.say(
                        f"eval.stop_at={self.config['eval']['stop_at']} is reached at step {self.step} of {self.total}"
                    )
                    break
            self._tick_step()
            self.profile.before(self.step, self.state)
            with self.journal.parts.of("data"):
                batch = self._next(batches)
            draws = self.setup.draw(self.step)
            with self.journal.parts.of("dispatch"):
                grads, metrics = self.update(batch, draws, grads)
            self.step += 1
            if self.step == self.first + 1:
                self.reporter.say(self.programs.memory())
            previous, self.pending = self.pending, (self.step, draws, metrics)
            self.journal.read(previous)

    def _settle(self) -> None:
        """Reads the numbers of the last update: after it, what is on disk is whole up to this step."""
        pending, self.pending = self.pending, None
        self.journal.read(pending)

    def _next(self, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The next batch; a source that fails or stalls ends the run in one line."""
        name, patience = self.config["data"]["name"], self.config["data"]["stall_s"]
        try:
            return watch.timely(batches, self.step, patience, self.rundir.path / "error.txt")
        except watch.DataLost as lost:
            raise UserError(f"data {name} {lost}; {self._safe()}") from None

    def _safe(self) -> str:
        """What a run that ends here goes on from; waits for a save that is under way."""
        with contextlib.suppress(UserError):
            self.checkpoints.wait()
        return self._on_disk()

    def _on_disk(self) -> str:
        steps = self.checkpoints.steps()
        return (
            f"last good checkpoint: step {steps[-1]} in {self.checkpoints.folder}"
            if steps
            else "no checkpoint was written yet"
        )

    def _last_words(self) -> None:
        """Where a second Ctrl-C ends the process."""
        self._status("stopped")
        self.reporter.say(f"ended at once by a second Ctrl-C; {self._on_disk()}")

    def update(self, batch: dict[str, np.ndarray], draws: tuple[Draw, ...], grads: Any) -> tuple[Any, dict[str, Any]]:
        """One update: a gradient program per drawn sub-network, then the update program."""
        self.state, grads, metrics = self.updater(self.step, self.state, batch, draws, grads)
        flops = sum(self.flops[draw.name] * self.config["data"]["batch_size"] / draw.parts for draw in draws)
        self.journal.flops += flops
        return grads, {"flops": flops, **metrics}

    def _program(self, kind: str, name: str, *args: Any, **which: Any) -> Any:
        """A compiled program; told where training waits for one that was not compiled ahead."""
        began = time.perf_counter()
        with self.heart.at(self.programs.compiling):
            program = self.programs.get(kind, name, *args, **which)
        seconds = time.perf_counter() - began
        self.journal.waited(seconds)
        if seconds > 1 and self.step > self.first + len(self.setup.phases):
            self.reporter.say(
                f"step {self.step}: waited {seconds:.1f} s while the {kind} program of {name or 'all'} was compiled"
            )
        return program

    # -- evaluation and saving ---------------------------------------------------------------------------------

    def weights(self) -> Any:
        """The parameters that are evaluated: their EMA when it is on."""
        return self.state.params if self.state.ema is None else self.state.ema

    def _status(self, state: str, **more: Any) -> None:
        self.rundir.status(
            watch.status(state, self.step, self.total, checkpoint=max(self.checkpoints.steps(), default=0), **more)
        )

    def _evaluate(self, final: bool = False) -> None:
        self._status("evaluating")
        names = self.setup.order if final or self.config["eval"]["subnets"] == "all" else ["full"]
        with self.heart.at(lambda: self.programs.compiling() if self.programs.busy() else "evaluating"):
            results = self.evaluator(names, self.weights(), self.state.stats, "validation")
        record = {
            f"validation/{key}/{name}": value for name, metrics in results.items() for key, value in metrics.items()
        }
        record |= experts.similarity_records(self.setup.space.full, self.weights(), self.state.stats)
        self.rundir.metrics(self.step, record)
        task = self.setup.task
        full = results["full"][task.metric]
        self.evaluated, self.metrics[self.step] = self.step, full
        self.reached, self.ended = self.reached or (not final and self._good_enough(full)), final
        self.reporter.say(f"step {self.step}: validation {task.metric} of the full network {shown(task, full)}")

    def _save(self) -> None:
        self._status("saving")
        run = {
            "step": self.step,
            "wall_s": self.clock.wall(),
            "flops": self.journal.flops,
            "skipped": self.journal.skipped,
        }
        run["lines"] = dict(self.rundir.lines)
        self.checkpoints.save(self.step, kept.kept(self.state, self.programs.full), run)
        self.saved = self.step

    def _is_saved(self) -> bool:
        """Whether this step is on disk, everywhere; waits for a save that is under way, which may yet be given up."""
        return self.saved == self.step and processes.everywhere(self.checkpoints.wait())

    def _save_surely(self) -> None:
        """The last save of a process: there is no next one that would make up for it."""
        for _ in range(SAVES):
            self._save()
            if self._is_saved():
                return
        raise UserError(
            f"the state could not be saved in {SAVES} tries, because the clock keeps jumping; {self._safe()}"
        )

    # -- before and after --------------------------------------------------------------------------------------

    def _announce(self) -> None:
        """Says what is about to be trained, and writes what explains it."""
        shapes = abstract(self.setup.space.full)
        say, size = self.reporter.say, state_bytes(self.programs.state_shapes.opt_state)
        say(
            f"{self.config['model']['name']}: {shapes.num_params():,} parameters, {len(self.setup.order)} networks, "
            f"{self.total:,} updates of {self.config['data']['batch_size']} examples, {jax.device_count()} device(s)"
        )
        say(
            f"optimizer {self.config['optim']['name']}: {size:,} bytes of state, params {4 * shapes.num_params():,} bytes"
        )
        for name, missed in list(self.programs.refused.items())[:5]:
            say(f"layout: {name} could not be split: {'; '.join(missed)}")
        if not self.validates:
            say(f"{self.config['data']['name']} has no validation split: nothing is evaluated during training")
        if self.rundir.writes:
            layout = {**self.programs.param_shardings, **self.programs.stat_shardings}
            write_json(self.rundir.path / "layout.json", sharding.dump(layout))

    def _finish(self) -> dict[str, Any]:
        """Makes and writes the report: only then the run is finished."""
        self.journal.judge(self.step, {"validation": self.metrics[self.step]} if self.validates else {})
        with self.heart.at(lambda: self.programs.compiling() if self.programs.busy() else "making the report"):
            report = finish.final_report(
                self.setup, self.programs, self.evaluator, self.weights(), self.state.stats, self.rundir.path
            )
        report |= finish.facts(self.setup, self.programs, self.rundir.path, self.clock.wall(), self.journal, self.step)
        self.journal.judge(self.step, {report["metric"]: report["subnets"][0]["value"]} if report["split"] else {})
        for line in finish.remarks(report, self.rundir.path):
            self.reporter.say(line)
        report |= {"full": "full", "title": self.config["model"]["name"]}
        if self.rundir.writes:
            write_report(self.rundir.path, report)
        processes.barrier("the report is written")
        return report


def train(config: dict[str, Any], workdir: str, reporter: Reporter) -> dict[str, Any]:
    """Runs a config in a directory (again: resumes) and returns the report, written as report.json, report.md and
    pareto.png.

    Args:
      config: a resolved config, see `research.train.config`.
      workdir: the run's folder.
      reporter: where lines for humans go.

    Raises:
      UserError: a config, a folder or data that do not fit, a full disk, NaN.
      Preempted: SIGTERM, Ctrl-C or a closed terminal; the state is saved.
    """
    try:
        with processes.listening():
            if jax.process_count() == 1:
                stopping.heed()
            return Run(config, workdir, reporter).run()
    except stopping.Told as told:
        raise Preempted(max(whole_steps(Path(workdir) / "checkpoints"), default=0), told.by) from None
