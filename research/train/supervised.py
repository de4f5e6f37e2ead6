"""Supervised training, the learner of every task: accumulation, precision, the optimizer, sub-networks and methods."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.errors import UserError
from research.interop.safetensors_io import config_from_json, config_to_json
from research.modules.state import abstract
from research.nested.draws import Draw
from research.optim.build import state_bytes
from research.tasks.base import Task
from research.train import costs, data, dry_run, finish, foreseen, initial, kept, records, reshaping, sharding
from research.train.build import make_programs
from research.train.compiler import Program
from research.train.evaluation import Evaluator, Weights, weights_of
from research.train.hooks import Brought
from research.train.learner import Foreseen, Goal, Learner, Reading, Say
from research.train.learner_registry import register
from research.train.processes import place_whole
from research.train.programs import Programs
from research.train.restore import Wanted
from research.train.sections import RunConfig
from research.train.setup import Setup, make_setup
from research.train.state import State, due
from research.train.turns import LOOK_AHEAD, Execution, make_execution
from research.train.update import Update


def described(model: Any) -> dict[str, Any] | None:
    """Returns a model's config as JSON, None for one that does not survive it."""
    try:
        return config_to_json(model)
    except (TypeError, UserError):
        return None


def goal_of(task: Task) -> Goal:
    """Returns what a task ranks networks by."""
    return Goal(task.metric, task.higher_is_better, task.percent)


class Supervised(Learner):
    """The learner of a setup.

    Args:
      setup: of the run.
      waiting: called again and again while a program is waited for, and between batches of an evaluation; may raise.
      waited: told of every program: (title, seconds that it was waited for, and by which update).
    """

    def __init__(
        self,
        setup: Setup,
        waiting: Callable[[], None] = lambda: None,
        waited: Callable[[str, float], None] = lambda title, seconds: None,
    ):
        self.config, self._waiting, self._waited = setup.config, waiting, waited
        self.goal = goal_of(setup.task)
        self.total, self.round = setup.total, max(len(stage.phases) for stage in setup.stages.items)
        self.examples, self.unit = self.config.data.batch_size * setup.units, setup.task.unit
        self.validates = setup.examples("validation") > 0
        self.title = self.config.model["name"]
        self.headings = {**setup.task.headings, **setup.methods.headings}
        self._brought: Mapping[str, Brought] | None = None
        self._compiled = finish.Compiled()  # for shapes that the network had before
        self._take(setup)

    def _take(self, setup: Setup) -> None:
        """Builds what depends on the shape of the network."""
        self.setup = setup
        self.programs = make_programs(setup, self._waiting, self._brought)
        self._brought = self.programs.networks
        self.evaluator = Evaluator(setup, self.programs, tick=self._waiting)
        self.execution: Execution = make_execution(setup, self.programs)
        work = setup.methods.work() * setup.task.work
        self.flops = {name: work * costs.training_flops(c) for name, c in setup.space.configs.items()}
        self._grads: Any = None

    def _leave(self, programs: Programs) -> None:
        """Ends the programs of a shape that the network has no longer."""
        programs.close()
        self._compiled += finish.compiled(programs)

    # -- before the first update -------------------------------------------------------------------------------

    def steps(self, duration: str | int, field: str) -> int:
        return self.setup.steps(duration, field)

    def adopt(self, run: Mapping[str, Any]) -> None:
        for name, digest in run.get("brought", {}).items():
            if (network := self.programs.networks.get(name)) is not None and network.digest != digest:
                raise UserError(
                    f"method {name} brings another network than the run began with ({network.digest[:12]}, not "
                    f"{digest[:12]}); give it the same one"
                )
        if "model" in run and (model := config_from_json(run["model"])) != self.setup.space.full:
            self._leave(self.programs)
            self._take(self.setup.reshaped(model))

    def initial(self, say: Say) -> State:
        params, stats = initial.arrays(self.setup, self.config, say)
        return self.programs.state_from(params, stats) if params else self.programs.init_state()

    def wanted(self) -> Wanted:
        return kept.wanted(self.programs.shapes, self.programs.shardings, self.programs.full, optimizer=True)

    def whole(self, found: Mapping[str, Any]) -> State:
        return kept.whole(found, self.programs.full, self.programs.layout.stats)

    def kept(self, state: State) -> State:
        return kept.kept(state, self.programs.full)

    def describe(self) -> dict[str, Any]:
        model = described(self.setup.space.full)
        return {
            **({} if model is None else {"model": model}),
            "brought": {name: network.digest for name, network in self.programs.networks.items()},
        }

    def keep(self, folder: Path, resumed: bool) -> None:
        data.keep(self.setup.data, folder, resumed)

    def announce(self) -> list[str]:
        shapes, config, setup = abstract(self.setup.space.full), self.config, self.setup
        size = state_bytes(self.programs.shapes.opt_state)
        lines = [
            f"{config.model['name']}: {shapes.num_params():,} parameters, {len(setup.order)} networks, "
            f"{self.total:,} updates of {config.data.batch_size} examples, {jax.device_count()} device(s)",
            f"optimizer {config.optim.name}: {size:,} bytes of state, params {4 * shapes.num_params():,} bytes",
        ]
        for name, missed in list(self.programs.layout.refused.items())[:5]:
            lines.append(f"layout: {name} could not be split: {'; '.join(missed)}")
        if not self.validates:
            lines.append(f"{config.data.name} has no validation split: nothing is evaluated during training")
        return lines

    def layout(self) -> dict[str, str]:
        return sharding.dump({**self.programs.layout.params, **self.programs.layout.stats})

    def foresee(self) -> Foreseen:
        wanted = list(dict.fromkeys(self.needed(0)))
        wanted += [program for name in self.setup.order for program in self.evaluator.needed(name)]
        ahead = min(self.total, LOOK_AHEAD)
        flops = sum(self.flops_of(draw) for step in range(ahead) for draw in self.setup.draw(step)) / ahead
        return dry_run.foresee(self.setup, self.programs, self.execution, wanted, flops * self.total)

    def prefetch(self, step: int) -> None:
        self.programs.prefetch(*dict.fromkeys(self.needed(step)))
        self.evaluator.prefetch(self.setup.order)

    def needed(self, step: int) -> Iterator[Program]:
        """Yields the programs of the updates that come next, in the order of need."""
        for later in range(step, min(self.total, step + LOOK_AHEAD)):
            phase = self.setup.phase(later)
            yield from self.execution.programs(self.setup.draw(later), phase)
            yield Update(phase.name)

    def batches(self, step: int) -> Iterator[Any]:
        return self.setup.batches(step, self.programs.layout.share)

    # -- training ----------------------------------------------------------------------------------------------

    def reshape_due(self, step: int) -> bool:
        return any(method.reshape_due(step) for method in self.setup.methods.items)

    def reshape(self, step: int, state: State, say: Say) -> State | None:
        plan = reshaping.plan(self.setup.methods, step, self.setup.space.full, state)
        if plan is None:
            return None
        if described(plan.config) is None:
            raise UserError(
                f"step {step}: the config of this model does not survive JSON, so a run whose network changes its "
                "shape could not be resumed; its fields must be numbers, words, tuples or dataclasses of such"
            )
        setup, before = self.setup.reshaped(plan.config), self.programs
        self._take(setup)
        state = reshaping.apply(plan, step, state, before, self.programs)
        self._leave(before)
        say(f"step {step}: the network has {abstract(plan.config).num_params():,} parameters from here on")
        return state

    def update(self, step: int, state: State, batch: Any) -> tuple[State, Any]:
        if self._grads is None:
            self._grads = self.programs.zero_grads()
        draws = self.setup.draw(step)
        grads, stats, numbers = self.execution.gradients(self._get, step, state, batch, draws, self._grads)
        bare, *rest = due(state, place_whole(np.int32(step), self.programs.layout.replicated), stats)
        state, self._grads, measured = self._get(Update(self.setup.phase(step).name))(bare, grads, *rest)
        return state, (numbers, measured)

    def _get(self, program: Any) -> Any:
        """A compiled program; told where training waits for it."""
        began = time.perf_counter()
        executable = self.programs.get(program)
        self._waited(program.title, time.perf_counter() - began)
        return executable

    def read(self, step: int, numbers: Any) -> Reading:
        draws, (losses, measured) = self.setup.draw(step), numbers
        named = self.execution.read(losses, draws)
        record = lambda: records.of_update(named, measured, self.setup.space.full)
        flops = sum(self.flops_of(draw) for draw in draws)
        return Reading(tuple((name, float(v["loss"])) for name, v in named), bool(measured["finite"]), flops, record)

    def flops_of(self, draw: Draw) -> float:
        """FLOPs of training one sub-network in one update."""
        size: int = self.config.data.batch_size
        return self.flops[draw.name] * size / draw.microbatches

    def evaluate(self, state: State, final: bool) -> tuple[float, dict[str, float]]:
        if final:
            self._grads = None  # training is over
        names = self.setup.order if final or self.config.eval.subnets == "all" else ["full"]
        weights = self.weights(state)
        results = self.evaluator(names, weights, "validation")
        record = {f"validation/{key}/{name}": v for name, metrics in results.items() for key, v in metrics.items()}
        record |= self.setup.space.full.observations(weights.params, weights.stats)
        return results["full"][self.goal.name], record

    def weights(self, state: State) -> Weights:
        """The parameters and statistics that are evaluated."""
        return weights_of(self.programs, state)

    # -- the end -----------------------------------------------------------------------------------------------

    def report(self, state: State, folder: Path) -> dict[str, Any]:
        self._grads = None
        weights = self.weights(state)
        report = finish.final_report(self.setup, self.programs, self.evaluator, weights, folder, self._compiled)
        report |= {"full": "full", "title": self.title, "training_data_sha256": self.setup.splits["train"].digest}
        return report | {"optimizer_state_bytes": state_bytes(self.programs.shapes.opt_state)}

    # -- compiling ---------------------------------------------------------------------------------------------

    def busy(self) -> bool:
        return self.programs.busy()

    def compiling(self) -> str:
        return self.programs.compiling()

    def memory(self) -> str:
        return self.programs.memory()

    def close(self) -> None:
        self.programs.close()


@register("supervised", opening=lambda config: f"loading data set {config.data.name}")
def make(config: RunConfig, waiting: Callable[[], None], waited: Callable[[str, float], None]) -> Supervised:
    """Makes the learner of a recipe: supervised training of its model on its data.

    Raises:
      UserError: whatever in the config does not fit together.
    """
    setup = make_setup(config)
    foreseen.check(setup)
    return Supervised(setup, waiting, waited)
