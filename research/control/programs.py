"""The compiled programs of soft actor-critic, each over all seeds side by side."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

from research.control import runs
from research.control.environments import Environment
from research.control.runs import Numbers, Run
from research.control.sac import Sac


@dataclass(frozen=True)
class Setting:
    """What the programs are made of.

    Attributes:
      config: of the algorithm.
      environment: the task.
      keys: shape and type of the seeds' keys.
      steps: of the environment in an update.
      episodes: of an evaluation.
    """

    config: Sac
    environment: Environment
    keys: jax.ShapeDtypeStruct
    steps: int
    episodes: int

    def start(self, keys: Array) -> Run:
        """Returns the runs of some keys [S] after their warm-up."""

        def one(key: Array) -> Run:
            run = runs.start(self.config, self.environment, key)
            return runs.advance_all(self.config, self.environment, run, self.config.warmup, learning=False)[0]

        return jax.vmap(one)(keys)

    def learn(self, states: Run, steps: int | None = None) -> tuple[Run, Numbers]:
        """Returns (the runs after an update, its numbers [S]); `steps`: another number of them."""
        count = self.steps if steps is None else steps
        one = functools.partial(runs.advance_all, self.config, self.environment, count=count, learning=True)
        return jax.vmap(one)(states)

    def measure(self, states: Run) -> tuple[Array, Array]:
        """Returns (mean returns [S], primitives in use [S])."""
        return jax.vmap(lambda run: runs.measure(self.config, self.environment, run, self.episodes))(states)

    @functools.cached_property
    def shapes(self) -> Run:
        """The shapes of the runs."""
        return jax.eval_shape(self.start, self.keys)


@dataclass(frozen=True)
class Program:
    """One of the programs, see `research.train.compiler`.

    Attributes:
      title: what messages call it.
      function: of a setting, that it runs.
      begins: whether it takes keys, else the runs.
      donates: whether it takes the memory of the runs that it is given.
      measures: whether it changes nothing: what trains is compiled in one way whatever the machine, since its bits
        grow apart with the steps.
    """

    title: str
    function: Callable[..., Any]
    begins: bool = False
    donates: bool = False
    measures: bool = False

    def lower(self, context: Setting) -> jax.stages.Lowered:
        program = jax.jit(functools.partial(self.function, context), donate_argnums=(0,) if self.donates else ())
        return program.lower(context.keys if self.begins else context.shapes)

    def rarely(self, context: Setting) -> bool:
        del context
        return self.measures


START = Program("start", Setting.start, begins=True)
LEARN = Program("update", Setting.learn, donates=True)
MEASURE = Program("evaluation", Setting.measure, measures=True)
ALL = (START, LEARN, MEASURE)
