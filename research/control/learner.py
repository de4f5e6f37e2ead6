"""Soft actor-critic as a learner of the harness: an update is a number of environment steps, one gradient step each, of
all seeds side by side in one compiled scan."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array

from research.control.environments import ENVIRONMENTS, environment
from research.control.programs import ALL, LEARN, MEASURE, START, Setting
from research.control.runs import Evaluation, Numbers, Run
from research.control.sac import Sac
from research.errors import UserError
from research.modules.state import abstract, apply
from research.report import machine
from research.report.columns import VALUE, Column, told
from research.report.flops import count_flops
from research.seeds import key as key_of
from research.train.compiler import Compiler
from research.train.durations import to_steps
from research.train.learner import Foreseen, Goal, Learner, Reading, Say
from research.train.learner_registry import options_of, register
from research.train.restore import Wanted
from research.train.sections import RunConfig
from research.values import SIZE, Rule


@dataclass(frozen=True)
class Options(Sac):
    """What `config.learner.options` holds: settings of the algorithm, and of the run.

    Attributes:
      task: by name, see research/control/environments.py.
      seeds: runs that are trained side by side, one a number, which is added to `config.seed`.
      steps: of each seed's environment in an update of the harness, one gradient step each.
      episodes: of each seed in an evaluation.
    """

    task: Annotated[str, Rule(choices=tuple(ENVIRONMENTS))] = "bandit"
    seeds: Annotated[tuple[int, ...], Rule(least=0)] = (0, 1, 2)
    steps: Annotated[int, SIZE] = 100
    episodes: Annotated[int, SIZE] = 20

    def __post_init__(self):
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"learner.options.seeds={list(self.seeds)}; valid: different whole numbers, one at least")


class SoftActorCritic(Learner):
    """The learner of a config; its state is the runs of all seeds, see `research.control.runs.Run`, with a leading axis
    of seeds.

    Args:
      config: resolved.
      waiting, waited: as of `research.train.supervised.Supervised`.
      told: called with every evaluation during training.

    Raises:
      UserError: a duration that is none, options that do not fit, or several processes.
    """

    goal = Goal("return", higher_is_better=True)
    unit = "environment_steps"

    def __init__(
        self,
        config: RunConfig,
        waiting: Callable[[], None] = lambda: None,
        waited: Callable[[str, float], None] = lambda title, seconds: None,
        told: Callable[[Evaluation], None] = lambda evaluation: None,
    ):
        if jax.process_count() > 1:
            raise UserError("soft_actor_critic trains in one process; start it once")
        self.config, self._waited, self._told = config, waited, told
        self.options: Options = options_of(config.learner)
        self.seeds = [config.seed + seed for seed in self.options.seeds]
        self._keys = jnp.stack([key_of(seed) for seed in self.seeds])
        self.total = 0
        self.total = self.steps(config.train.duration, "train.duration")
        if self.total < 1:
            raise UserError(f"train.duration={config.train.duration!r} is no update at all")
        self.examples = self.options.steps * len(self.seeds)
        self.title = f"soft actor-critic on {self.options.task}"
        keys = jax.ShapeDtypeStruct(self._keys.shape, self._keys.dtype)
        task = environment(self.options.task)
        self.setting = Setting(self.options, task, keys, self.options.steps, self.options.episodes)
        self.compiler = Compiler(self.setting, jax.default_backend() == "cpu", waiting)

    # -- before the first update -------------------------------------------------------------------------------

    def steps(self, duration: str | int, field: str) -> int:
        if str(duration).strip().endswith("ep"):
            raise UserError(
                f"{field}={duration!r}: there are no epochs here; write updates, '6000ex' (environment steps of "
                "a seed) or '5%'"
            )
        return to_steps(
            duration,
            batch_size=self.options.steps,
            num_examples=0,
            total=self.total or None,
            field=field,
        )

    def adopt(self, run: Mapping[str, Any]) -> None:
        del run  # all shapes are those of the config

    def initial(self, say: Say) -> Run:
        del say
        self.compiler.prefetch(*ALL)
        return self.compiler.get(START)(self._keys)

    def kept(self, state: Run) -> dict[str, Any]:
        return {**state._asdict(), "key": jax.random.key_data(state.key)}

    def wanted(self) -> Wanted:
        shapes = jax.eval_shape(self.kept, self.setting.shapes)
        here = SingleDeviceSharding(jax.devices()[0])
        return Wanted(shapes, jax.tree.map(lambda _: here, shapes))

    def whole(self, found: Mapping[str, Any]) -> Run:
        key = jax.random.wrap_key_data(found["key"], impl=jax.random.key_impl(self._keys))
        return Run(**{**found, "key": key})

    def describe(self) -> dict[str, Any]:
        return {"learner": "soft_actor_critic", "options": dataclasses.asdict(self.options), "seeds": self.seeds}

    def announce(self) -> list[str]:
        actor, critic = self._networks()
        return [
            f"{self.title}: actor of {actor.num_params():,} parameters, two critics of {critic.num_params():,}, "
            f"{len(self.seeds)} seeds, {self.total:,} updates of {self.options.steps:,} environment steps each"
        ]

    def foresee(self) -> Foreseen:
        flops = self.flops * self.total
        networks = [
            {"name": name, "params": network.num_params()}
            for name, network in zip(("actor", "each of two critics"), self._networks(), strict=True)
        ]
        networks[0]["flops"] = self._acting_flops()
        return dataclasses.replace(
            super().foresee(),
            networks=networks,
            programs=[program.title for program in ALL],
            flops=flops,
            floor_s=flops / machine.gemm_rate(),
        )

    def _networks(self) -> tuple[Any, Any]:
        task = self.setting.environment
        return abstract(self.options.actor(task)), abstract(self.options.critic(task))

    def prefetch(self, step: int) -> None:
        self.compiler.prefetch(*([LEARN] if step < self.total else []), MEASURE)

    def batches(self, step: int) -> Iterator[None]:
        del step
        return itertools.repeat(None)  # it makes its own experience

    # -- training ----------------------------------------------------------------------------------------------

    def update(self, step: int, state: Run, batch: None) -> tuple[Run, Numbers]:
        del step, batch
        began = time.perf_counter()
        program = self.compiler.get(LEARN)
        self._waited(LEARN.title, time.perf_counter() - began)
        return program(state)

    def read(self, step: int, numbers: Numbers) -> Reading:
        del step
        losses = tuple((f"seed{seed}", float(loss)) for seed, loss in zip(self.seeds, numbers.loss, strict=True))
        return Reading(losses, True, self.flops, functools.partial(self._record, numbers))

    def _record(self, numbers: Numbers) -> dict[str, float]:
        record = {k: float(np.mean(v)) for k, v in numbers._asdict().items()} | {"lr": self.options.lr}
        return record | self._by_seed("reward", numbers.reward)

    def _by_seed(self, name: str, values: Array | np.ndarray) -> dict[str, float]:
        return {f"{name}/seed{seed}": float(value) for seed, value in zip(self.seeds, values, strict=True)}

    @functools.cached_property
    def flops(self) -> float:
        """FLOPs of an update, of all seeds."""
        one = functools.partial(self.setting.learn, steps=1)
        return float(count_flops(one, self.setting.shapes)) * self.options.steps

    def evaluate(self, state: Run, final: bool) -> tuple[float, dict[str, float]]:
        del final
        found = self._measure(state)
        self._told(found)
        value = float(found.returns.mean())
        record = {"validation/return/full": value, "validation/used/full": float(found.used.mean())}
        record |= self._by_seed("validation/return", found.returns) | self._by_seed("validation/used", found.used)
        return value, record

    def _measure(self, state: Run) -> Evaluation:
        returns, used = jax.device_get(self.compiler.get(MEASURE)(state))
        return Evaluation(int(state.memory.count[0]) - self.options.warmup, returns, used)

    # -- the end -----------------------------------------------------------------------------------------------

    def report(self, state: Run, folder: Path) -> dict[str, Any]:
        found, (actor, critic) = self._measure(state), self._networks()
        row = {"name": "full", "value": float(found.returns.mean()), "params": actor.num_params()}
        row |= {"flops": self._acting_flops(), "least": float(found.returns.min()), "used": float(found.used.mean())}
        return {
            "metric": "validation return",
            "higher_is_better": True,
            "split": "validation",
            "title": self.title,
            "full": "full",
            "subnets": [row],
            "columns": told(dict.fromkeys((VALUE, "least"), Column(higher_is_better=True)) | {"used": Column()}),
            "seeds": len(self.seeds),
            "environment_steps": found.steps,
            "returns": self._by_seed("return", found.returns),
            "critic_params": critic.num_params(),
            "compile_s": sum(self.compiler.seconds.values()),
            "programs": len(self.compiler.seconds),
            "programs_bound": len(ALL),
            "next": [f"python -m launch.report --workdir={folder},OTHER_RUN"],
        }

    def _acting_flops(self) -> int:
        config = self.options.actor(self.setting.environment)
        seen = jax.ShapeDtypeStruct((1, *config.input_shape()), np.float32)
        return count_flops(lambda params, x: apply(config, params, {}, x)[0], dict(abstract(config).params), seen)

    # -- compiling ---------------------------------------------------------------------------------------------

    def busy(self) -> bool:
        return self.compiler.busy()

    def compiling(self) -> str:
        return self.compiler.status()

    def close(self) -> None:
        self.compiler.close()


@register(
    "soft_actor_critic",
    options=Options,
    reads=(),
    instead="launch.train continues its runs, launch.report compares them, and in Python "
    "research.control.trained.actors(WORKDIR) gives their policies",
)
def make(config: RunConfig, waiting: Callable[[], None], waited: Callable[[str, float], None]) -> SoftActorCritic:
    """Makes the learner of a config that names soft_actor_critic.

    Raises:
      UserError: see `SoftActorCritic`.
    """
    return SoftActorCritic(config, waiting, waited)
