"""The one training loop, top to bottom: evaluate if due, save if due, next batch, step, read the step before.

The device is never waited for, except where numbers must be on disk. A run is a function of its config: killed at
any point and started again it ends with the same bits and the same `metrics.jsonl`.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from research.data.tokenizer_files import save_tokenizer
from research.errors import UserError
from research.files import write_json
from research.modules.state import abstract
from research.nested.schemes import Draw
from research.optim.build import state_bytes
from research.report import machine
from research.report.experts import dead, loads
from research.report.run_card import load_metrics, write_report
from research.tasks.base import shown
from research.train import ahead, costs, experts, initial, processes, records, spread, watch
from research.train.checkpoint import Checkpoints
from research.train.evaluation import Evaluator, place
from research.train.finish import final_report
from research.train.programs import Programs, State
from research.train.rundir import RunDir
from research.train.setup import Setup, make_programs, make_setup
from research.train.watch import Clock

SAVES = 9
"""How often the last save is tried while the clock jumps."""


class Reporter(Protocol):
    """Where a run tells a human what it does."""

    def say(self, line: str) -> None: ...

    def progress(self, done: int, total: int, text: str) -> None: ...


class Preempted(Exception):
    """The run was told to stop (SIGTERM); its state is saved. `step` is where it goes on."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}")
        self.step = step


class NotFinite(UserError):
    """The loss became NaN or Inf."""


class Run:
    """One run in its directory; `run()` trains and reports."""

    def __init__(self, config: dict[str, Any], workdir: str, reporter: Reporter):
        self.config, self.reporter = config, reporter
        self.setup: Setup = make_setup(config)
        self.programs: Programs = make_programs(self.setup)
        self.total = self.setup.total
        self.rundir = RunDir(workdir, config, machine.environment(), writes=processes.is_first())
        processes.barrier("the run's folder is there")
        keep = config["checkpoint"]
        self.checkpoints = Checkpoints(
            Path(workdir) / "checkpoints",
            keep_last=keep["keep_last"],
            keep_every=keep["keep_every"],
            keep_best=keep["keep_best"],
            higher_is_better=self.setup.task.higher_is_better,
            say=reporter.say,
        )
        self.evaluator = Evaluator(self.setup, self.programs, tick=self._tick)
        work = getattr(self.setup.task, "work", 1)  # of an update, in plain ones
        self.flops = {name: work * costs.training_flops(c) for name, c in self.setup.space.configs.items()}
        self.gemm = machine.gemm_rate()  # measured now, before compiling threads share the cores
        self.flag = {"set": False}
        self.parts = watch.Breakdown()
        self.profile = watch.Profile(config["train"]["profile"], Path(workdir) / "profile")
        self.step, self.saved = 0, -1
        self.reached = self.ended = False
        self.evaluated = -1  # the last step whose evaluation is done
        self.last_metric: float | None = None  # what it gave, in this process
        self.spent_flops = 0.0
        self.interval_flops = 0.0

    # -- state -------------------------------------------------------------------------------------------------

    def _start(self) -> tuple[int, State, Clock]:
        """Restores the newest valid checkpoint, or makes the initial state."""
        newest = processes.agree(max(self.checkpoints.steps(), default=0))
        if newest:
            state, run = self.checkpoints.restore(newest, self.programs.state_shapes, self.programs.state_shardings)
            self.reporter.say(f"resumed from step {newest}")
            self.saved = newest
            self.spent_flops = run["flops"]
            self.ended = run.get("ended", newest == self.total)
            self.evaluated, self.reached = run.get("evaluated", newest), run.get("reached", False)
            return newest, state, Clock(before=run["wall_s"])
        if self.config["train"]["init_from"]:
            return 0, self.programs.state_from(*initial.arrays(self.setup, self.config, self.reporter.say)), Clock()
        return 0, self.programs.init_state(), Clock()

    def _tick(self) -> None:
        if self.flag["set"]:
            raise Preempted(self.step)

    def _tick_step(self) -> None:
        """Between updates: several processes stop where all of them have come to."""
        if jax.process_count() > 1 and processes.told_to_stop(self.step):
            raise Preempted(self.step)
        self._tick()

    # -- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the report.

        Raises:
          Preempted: SIGTERM came; the state is saved.
          UserError: NaN, a full disk, or a config that does not fit.
        """
        with processes.sigterm_flag() as self.flag:
            try:
                report = self._run()
                self._status("finished")
                return report
            except Preempted:
                self._status("stopped")
                raise
            except UserError as error:
                with contextlib.suppress(OSError):
                    self._status("failed", error=str(error))
                raise
            finally:
                self.checkpoints.abandon()
                self.profile.close()
                self.programs.close()
                self.rundir.close()

    def _run(self) -> dict[str, Any]:
        self.step, self.state, self.clock = self._start()
        self._announce()
        self.rundir.cut_back(self.step)
        tokenizer = getattr(self.setup.splits["train"], "tokenizer", None)
        if self.rundir.writes:
            write_json(self.rundir.path / "layout.json", self._layout())
            if tokenizer is not None:
                save_tokenizer(tokenizer, self.rundir.path)
        eval_every, save_every = self.setup.steps("eval", "every"), self.setup.steps("checkpoint", "every")
        log_every = max(self.setup.steps("train", "log_every"), 1)
        due = lambda every: every and self.step and self.step % every == 0  # noqa: E731
        ahead.compile_ahead(self.config, self.setup, self.programs, self.evaluator, self.step)
        grads, pending = self.programs.zero_grads(), None
        batches = self.setup.batches(self.step, self.programs.share)
        try:
            while self.step < self.total and not self.ended and not self.reached:
                if due(eval_every) and self.step != self.evaluated:
                    self._read(pending, log_every)
                    pending = None
                    with self.clock.pause():
                        self._evaluate()
                    if self.reached:
                        self.reporter.say(f"eval.stop_at={self.config['eval']['stop_at']} is reached at step {self.step} of {self.total}")
                        break
                if due(save_every) and self.step != self.saved:
                    self._read(pending, log_every)
                    pending = None
                    with self.clock.pause():
                        self._save()
                self._tick_step()
                self.profile.before(self.step, self.state)
                with self.parts.of("data"):
                    batch = self._next(batches)
                draws = self.setup.draw(self.step)
                with self.parts.of("dispatch"):
                    grads, metrics = self.update(batch, draws, grads)
                self.step += 1
                if self.step == self.first + 1:
                    self.reporter.say(self.programs.memory())
                previous, pending = pending, (self.step, draws, metrics)
                self._read(previous, log_every)
            self._read(pending, log_every)
            pending = None
            if self.saved != self.step or not self.ended:
                self._evaluate(final=True)
                self.ended = True
                if self.saved != self.step:  # SIGTERM came after the last update: the state is there
                    self._save_surely()
            self.checkpoints.close()
            return self._finish()
        except Preempted:
            self._read(pending, log_every)
            if self.saved != self.step and self.step:
                self._save_surely()
            self.checkpoints.close()
            raise Preempted(self.step) from None

    def _next(self, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The next batch; a source that fails or stalls ends the run in one line."""
        data = self.config["data"]
        try:
            return watch.timely(batches, self.step, data["stall_s"], self.rundir.path / "error.txt")
        except watch.DataLost as lost:
            raise UserError(f"data {data['name']} {lost}; {self._safe()}") from None

    def _safe(self) -> str:
        """What a run that ends here goes on from; waits for a save that is under way."""
        with contextlib.suppress(UserError):
            self.checkpoints.wait()
        steps = self.checkpoints.steps()
        return f"last good checkpoint: step {steps[-1]} in {self.checkpoints.folder}" if steps else "no checkpoint was written yet"

    def update(self, batch: dict[str, np.ndarray], draws: tuple[Draw, ...], grads: Any) -> tuple[Any, dict[str, Any]]:
        """One update: a gradient program per drawn sub-network, then the update program."""
        nested, accumulate = self.config["nested"], self.config["train"]["accumulate"]
        share = 1.0 / accumulate / (len(draws) if nested["reduce"] == "mean" else 1)
        state, losses, flops, phase = self.state, [], 0.0, self.setup.phase(self.step)
        if nested["spread"]:
            return self._update_spread(batch, draws, grads)
        placed: dict[tuple[int, int], Any] = {}
        teachers: dict[tuple[int, int], Any] = {}
        for order, draw in enumerate(draws):
            for micro in range(accumulate):
                slot, slots = draw.part * accumulate + micro, draw.parts * accumulate
                if (slot, slots) not in placed:
                    placed[slot, slots] = place(part_of(batch, slot, slots), self.programs)
                clock = np.array([self.step, slot, order * accumulate + micro], np.uint32)
                teacher = teachers.get((slot, slots)) if draw.distill else np.float32(0)
                args = (state.params, state.stats, grads, placed[slot, slots], clock, np.float32(share), teacher)
                program = self._program("gradient", draw.name, *args, distill=draw.distill, phase=phase)
                self._tick_compile()
                grads, stats, metrics, outputs = program(*args)
                if draw.name == "full":
                    state = State(state.params, stats, state.opt_state, state.ema)
                    teachers[slot, slots] = outputs
                losses.append((draw.name, metrics))
            examples = self.config["data"]["batch_size"] / draw.parts
            flops += self.flops[draw.name] * examples
        return self._apply(state, grads, losses, flops, phase)

    def _apply(self, state: State, grads: Any, losses: Any, flops: float, phase: str) -> tuple[Any, dict[str, Any]]:
        program = self._program("update", "", state, grads, np.int32(self.step), phase=phase)
        self.state, grads, metrics = program(state, grads, np.int32(self.step))
        self.spent_flops += flops
        return grads, {"losses": losses, "flops": flops, **metrics}

    def _update_spread(self, batch: dict[str, np.ndarray], draws: tuple[Draw, ...], grads: Any) -> tuple[Any, dict[str, Any]]:
        """One update whose networks are trained at the same time, each on its own devices."""
        state, programs = self.state, self.programs
        clock, places = spread.places(programs, self.step, draws)
        args = (state.params, state.stats, grads, place(batch, programs), clock, places)
        program = self._program("spread", "full", *args)
        self._tick_compile()
        grads, metrics = program(*args)
        flops = sum(self.flops[draw.name] for draw in draws) * self.config["data"]["batch_size"] / len(draws)
        return self._apply(state, grads, metrics, flops, "")

    def _program(self, kind: str, name: str, *args: Any, **which: Any) -> Any:
        """A compiled program; told where training waits for one that was not compiled ahead."""
        began = time.perf_counter()
        program = self.programs.get(kind, name, *args, **which)
        seconds = time.perf_counter() - began
        if seconds > 1 and self.step > self.first + len(self.setup.phases):
            self.reporter.say(f"step {self.step}: waited {seconds:.1f} s while the {kind} program of {name or 'all'} was compiled")
        return program

    def _tick_compile(self) -> None:
        """A stop while the first programs compile, before any step is done, has nothing to save."""
        if self.flag["set"] and self.step == 0:
            raise Preempted(0)

    # -- numbers -----------------------------------------------------------------------------------------------

    def _read(self, pending: tuple[int, tuple[Draw, ...], dict[str, Any]] | None, log_every: int) -> None:
        """Reads the metrics of a finished update: stops at NaN, writes a line when one is due."""
        if pending is None:
            return
        step, draws, metrics = pending
        with self.parts.of("wait"):
            host = jax.device_get(metrics)
        if self.config["nested"]["spread"]:
            host["losses"] = spread.per_network(host["losses"], draws)
        self.interval_flops += float(host["flops"])
        for name, values in host["losses"]:
            if not np.isfinite(values["loss"]) and self.config["train"]["nan"] == "stop":
                self._not_finite(step, name, "loss")
        if not host["finite"] and self.config["train"]["nan"] == "stop":
            self._not_finite(step, ",".join(sorted({n for n, _ in host["losses"]})), "gradient")
        if step % log_every >= len(self.setup.phases) and step != self.total:  # a line for each phase of a round
            return
        record = records.of_update(host, self.setup.space.full)
        self.rundir.metrics(step, record)
        self._log_speed(step, record)

    def _log_speed(self, step: int, record: dict[str, float]) -> None:
        since = step - getattr(self, "_logged", self.first)
        self._logged = step
        seconds = self.clock.lap()
        rate = since * self.config["data"]["batch_size"] * self.setup.units / seconds
        mfu = self.interval_flops / seconds / self.gemm / jax.device_count()
        self.interval_flops = 0.0
        eta = (self.total - step) * seconds / max(since, 1)
        unit = self.setup.task.unit
        timing = {f"{unit}_per_s": rate, "mfu": mfu, "wall_s": self.clock.wall(), "step_ms": 1e3 * seconds / max(since, 1)}
        parts = self.parts.lap(since)
        self.rundir.timings(step, timing | parts)
        for line in watch.stragglers(parts["data_ms"] + parts["dispatch_ms"]):
            self.reporter.say(f"step {step}: {line}")
        self._status("training", loss=record["loss"], eta_s=round(eta), **timing)
        text = records.progress(record, rate, unit, mfu, eta)
        self.reporter.progress(step, self.total, text)

    def _not_finite(self, step: int, name: str, what: str) -> None:
        raise NotFinite(
            f"{what} is not finite at step {step}, sub-network {name}; {self._safe()}. Lower optim.lr, set optim.clip_norm, or train.nan=skip"
        )

    # -- evaluation and saving ---------------------------------------------------------------------------------

    def weights(self) -> Any:
        """The parameters that are evaluated: their EMA when it is on."""
        return self.state.params if self.state.ema is None else self.state.ema

    def _status(self, state: str, **more: Any) -> None:
        self.rundir.status(watch.status(state, self.step, self.total, checkpoint=max(self.checkpoints.steps(), default=0), **more))

    def _evaluate(self, final: bool = False) -> None:
        self._status("evaluating")
        names = self.setup.order if final or self.config["eval"]["subnets"] == "all" else ["full"]
        results = self.evaluator(names, self.weights(), self.state.stats, "validation")
        record = {f"validation/{key}/{name}": value for name, metrics in results.items() for key, value in metrics.items()}
        record |= experts.similarity_records(self.setup.space.full, self.weights(), self.state.stats)
        self.rundir.metrics(self.step, record)
        full = results["full"][self.setup.task.metric]
        self.evaluated, self.last_metric = self.step, full
        goal = self.config["eval"]["stop_at"]
        self.reached = goal is not None and (full >= goal if self.setup.task.higher_is_better else full <= goal)
        task = self.setup.task
        self.reporter.say(f"step {self.step}: validation {task.metric} of the full network {shown(task, full)}")

    def _save(self) -> None:
        self._status("saving")
        metric = self.last_metric if self.evaluated == self.step else None
        run = {"step": self.step, "wall_s": self.clock.wall(), "flops": self.spent_flops, "ended": self.ended}
        run |= {"evaluated": self.evaluated, "reached": self.reached}
        self.checkpoints.save(self.step, self.state, run, metric)
        self.saved = self.step

    def _save_surely(self) -> None:
        """The last save of a process: there is no next one that would make up for it."""
        for _ in range(SAVES):
            self._save()
            if self.checkpoints.wait():
                return
        raise UserError(f"the state could not be saved in {SAVES} tries, because the clock keeps jumping; {self._safe()}")

    # -- before and after --------------------------------------------------------------------------------------

    def _announce(self) -> None:
        self.first = self.step
        shapes = abstract(self.setup.space.full)
        state = self.programs.state_shapes
        self.optimizer_bytes = state_bytes(state.opt_state)
        self.reporter.say(
            f"{self.config['model']['name']}: {shapes.num_params():,} parameters, {len(self.setup.order)} networks, "
            f"{self.total:,} updates of {self.config['data']['batch_size']} examples, {jax.device_count()} device(s)"
        )
        self.reporter.say(
            f"optimizer {self.config['optim']['name']}: {self.optimizer_bytes:,} bytes of state, params {4 * shapes.num_params():,} bytes"
        )
        for name, missed in list(self.programs.refused.items())[:5]:
            self.reporter.say(f"layout: {name} could not be split: {'; '.join(missed)}")

    def _layout(self) -> dict[str, str]:
        from research.train.sharding import dump

        return dump({**self.programs.param_shardings, **self.programs.stat_shardings})

    def _finish(self) -> dict[str, Any]:
        report = final_report(self.setup, self.programs, self.evaluator, self.weights(), self.state.stats, self.rundir.path)
        wall = self.clock.wall()
        report |= {
            "wall_s": wall,
            "train_flops": self.spent_flops,
            "updates": self.step,
            "optimizer_state_bytes": self.optimizer_bytes,
            "gemm_gflops": self.gemm / 1e9,
            "mfu": self.spent_flops / wall / self.gemm / jax.device_count(),
        }
        digest = getattr(self.setup.splits["train"], "digest", None)
        if digest is not None:
            report["training_text_sha256"] = digest
        layers = {layer: dead(load) for layer, (_, load) in loads(load_metrics(self.rundir.path)).items()}
        for layer, names in layers.items():
            if names:
                self.reporter.say(f"experts of {layer} that got no token in the last quarter of the log: {', '.join(map(str, names))}")
        if layers:
            report["dead_experts"] = sum(map(len, layers.values()))
        self.reporter.say(
            f"{report['programs']} programs compiled in {report['compile_s']:.1f} s (at most {report['programs_bound']} allowed)"
        )
        return report


def part_of(batch: dict[str, np.ndarray], slot: int, slots: int) -> dict[str, np.ndarray]:
    if slots == 1:
        return batch
    size = len(batch["index"]) // slots
    return {k: v[slot * size : (slot + 1) * size] for k, v in batch.items()}


def train(config: dict[str, Any], workdir: str, reporter: Reporter) -> dict[str, Any]:
    """Runs a config in a directory (again: resumes) and returns the report, written as report.json, report.md and pareto.png.

    Args:
      config: a resolved config, see `research.train.config`.
      workdir: the run's folder.
      reporter: where lines for humans go.

    Raises:
      UserError: a config, a folder or data that do not fit, a full disk, NaN.
      Preempted: SIGTERM came; the state is saved.
    """
    run = Run(config, workdir, reporter)
    report = run.run()
    if processes.is_first():
        write_report(workdir, {**report, "full": "full", "title": config["model"]["name"]})
    processes.barrier("the report is written")
    return report
