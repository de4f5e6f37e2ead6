"""From a config to the things that a run is made of: model, space, data, task, schedule, programs."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from research.data.kinds import Transform
from research.errors import UserError
from research.nested.draws import Draw
from research.nested.space import Space, make_space
from research.tasks.base import Task
from research.train import streams
from research.train.data import Data, Facts
from research.train.durations import to_steps
from research.train.examples import Checked, check_labelled
from research.train.hooks import About, Phase
from research.train.learner_registry import check_is
from research.train.methods import Methods, make_methods
from research.train.model import make_model
from research.train.sections import RunConfig
from research.train.stages import Stages, make_stages, updates_of_a_batch
from research.train.used import task_of


@dataclass
class Setup:
    """What a run is made of; built by `make_setup`, without touching a device."""

    config: RunConfig
    data: Data
    task: Task
    space: Space
    methods: Methods
    stages: Stages

    @property
    def total(self) -> int:
        """Updates of the run."""
        return self.stages.updates

    @property
    def splits(self) -> dict[str, Any]:
        """The sources of the splits; they are loaded where they are not yet."""
        return self.data.splits

    def examples(self, split: str) -> int:
        """Returns how many examples a split has."""
        return self.data.facts.examples.get(split, 0)

    @functools.cached_property
    def transform(self) -> Transform:
        """What makes batches of blocks; a batch that the model has no place for is an error."""
        return Checked(self.data.transform, self.task.limits(self.space.full, self.sample), self.data.name)

    @property
    def sample(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """The shapes of a prepared batch of one example."""
        return self.data.facts.shapes

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of updates, in order."""
        return self.stages.phases

    def phase(self, step: int) -> Phase:
        """Returns the phase of an update."""
        return self.stages.phase(step)

    @property
    def parallel(self) -> bool:
        """Whether the networks of an update are trained at the same time, on different devices."""
        return self.config.nested.execution == "parallel"

    @property
    def mean(self) -> bool:
        """Whether the losses of an update's networks are averaged, else summed."""
        return self.config.nested.reduce == "mean"

    @property
    def units(self) -> int:
        """How many of the task's units an example holds."""
        return self.task.units(self.sample)

    def batch_shapes(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch of `size` examples."""
        return {k: jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype) for k, v in self.sample.items()}

    @property
    def about(self) -> About:
        """What methods are told of the run."""
        return About(self.config, self.task, self.space, self.sample, self.methods.items)

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the sub-networks, largest first."""
        return self.space.order

    def steps(self, duration: str | int, field: str) -> int:
        """Returns a duration in updates; `field` is where the config holds it."""
        return to_steps(
            duration,
            batch_size=self.config.data.batch_size,
            num_examples=self.examples("train"),
            total=self.total,
            field=field,
            phases=updates_of_a_batch(self.phases),
        )

    def draw(self, step: int) -> tuple[Draw, ...]:
        """Returns the sub-networks of an update.

        Raises:
          UserError: they do not divide the batch, or the devices, as those of the first update do.
        """
        draws, first = self._drawn(self.stages.round(step)), self._drawn(0)
        cuts = {draw.microbatches for draw in first}
        if (len(draws) != len(first) and self.parallel) or any(draw.microbatches not in cuts for draw in draws):
            raise UserError(
                f"methods={self.methods.names} draw {_counted(draws)} in update {step} and {_counted(first)} in the "
                "first one; valid: the same number of microbatches in all updates, and with nested.execution=parallel "
                "of networks"
            )
        return draws

    def _drawn(self, round: int) -> tuple[Draw, ...]:
        return self.methods.draws(self.space, self.config.seed, round)

    @functools.cached_property
    def microbatches(self) -> int:
        """How many microbatches of a batch are trained on one after the other: those of sub-networks that have their
        own, times `train.accumulate`."""
        return 1 if self.parallel else max(d.microbatches for d in self._drawn(0)) * self.config.train.accumulate

    def reshaped(self, model: Any) -> "Setup":
        """Returns the setup with another full network, of the same kind.

        Raises:
          UserError: a named sub-network that is no part of it.
        """
        return dataclasses.replace(self, space=make_space(model, self.config.nested.points))

    def batches(self, start: int, share: tuple[int, int] = (0, 1)) -> Iterator[streams.Batches]:
        """Returns the iterator of training batches (stream -> batch) from update `start` on; the phases of a round
        share theirs.

        Args:
          start: the first update.
          share: (index, count): the index-th of count shares of each batch.
        """
        return streams.rounds(
            self.splits["train"],
            self.methods.streams(),
            self.stages,
            start,
            batch_size=self.config.data.batch_size,
            seed=self.config.seed,
            augment=self.transform,
            shard_index=share[0],
            shard_count=share[1],
            microbatches=self.microbatches,
        )


def make_setup(
    config: Mapping[str, Any] | RunConfig, known: Facts | None = None, say: Callable[[str], None] = lambda _: None
) -> Setup:
    """Loads the data, unless what is `known` of them suffices, and builds model config and space.

    Args:
      config: of a run, resolved.
      known, say: as of `Data`.

    Raises:
      UserError: whatever in the config does not fit together.
    """
    config = RunConfig.of(config)
    check_is(config, "supervised")
    data = Data(config, known, say)
    source, sample = data.facts.source, data.facts.shapes
    kind = task_of(config)
    model = make_model(config, kind, source, sample)
    space = make_space(model, config.nested.points)
    task, methods = kind.make(config.task, model, source, sample), make_methods(config)
    methods.check(About(config, task, space, sample, methods.items))
    task = methods.wrapped(task, model)
    if known is None:
        check_labelled(data.splits, data.transform, task.limits(model, sample))
    duration, phases = config.train.duration, methods.phases(model)
    each = updates_of_a_batch(phases)
    size, examples = config.data.batch_size, data.facts.examples["train"]
    total = to_steps(duration, batch_size=size, num_examples=examples, total=None, field="train.duration", phases=each)
    if total < 1:
        raise UserError(f"train.duration={duration!r} is no update at all")
    setup = Setup(config, data, task, space, methods, make_stages(phases, total))
    _check_batch(config, setup)
    return setup


def _counted(draws: tuple[Draw, ...]) -> str:
    return f"{len(draws)} networks on {max(draw.microbatches for draw in draws)} microbatches"


def _check_batch(config: RunConfig, setup: Setup) -> None:
    size = config.data.batch_size
    if size % setup.microbatches:
        raise UserError(
            f"data.batch_size={size} does not divide into {setup.microbatches} microbatches (of an update's networks x "
            "train.accumulate)"
        )
