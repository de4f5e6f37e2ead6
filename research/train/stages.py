"""The stages of a run, one after the other, in each of which some phases alternate: which phase an update belongs to,
and which batch it takes."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Array

from research.train.hooks import Phase


@dataclass(frozen=True)
class Stage:
    """A part of a run in rounds of one update of each of its phases, which share a batch.

    Attributes:
      phases: in the order of a round.
      first: its first update.
      rounds: how many it has.
      before: rounds of the stages before it.
    """

    phases: tuple[Phase, ...]
    first: int
    rounds: int
    before: int

    @property
    def stop(self) -> int:
        """The first update after it."""
        return self.first + self.rounds * len(self.phases)

    def own(self, step: Array) -> Array:
        """Returns how many updates of its own the phase of an update of this stage has had."""
        return (step - self.first if self.first else step) // len(self.phases)


@dataclass(frozen=True)
class Stages:
    """All stages of a run, in order; there is one at least."""

    items: tuple[Stage, ...]

    @property
    def updates(self) -> int:
        return self.items[-1].stop

    @property
    def rounds(self) -> int:
        """Rounds of the whole run, each of which takes a batch."""
        last = self.items[-1]
        return last.before + last.rounds

    @property
    def phases(self) -> tuple[Phase, ...]:
        return tuple(phase for stage in self.items for phase in stage.phases)

    def at(self, step: int) -> Stage:
        """Returns the stage of an update."""
        return next(stage for stage in self.items if step < stage.stop or stage is self.items[-1])

    def of(self, phase: str) -> Stage:
        """Returns the stage of a phase."""
        return next(stage for stage in self.items if any(own.name == phase for own in stage.phases))

    def phase(self, step: int) -> Phase:
        """Returns the phase of an update."""
        stage = self.at(step)
        return stage.phases[(step - stage.first) % len(stage.phases)]

    def round(self, step: int) -> int:
        """Returns the round of an update, counted over the run."""
        stage = self.at(step)
        return stage.before + (step - stage.first) // len(stage.phases)


def updates_of_a_batch(phases: Sequence[Phase]) -> float:
    """Returns how many updates a batch gets, the mean over the run."""
    shares, start = [], 0.0
    for until, own in _grouped(phases):
        shares.append((until - start) * len(own))
        start = until
    return sum(shares)


def make_stages(phases: Sequence[Phase], updates: int) -> Stages:
    """Returns the stages of a run of so many updates, rounded up to whole rounds; a stage has one at least.

    Args:
      phases: of which those with the same `until` alternate.
    """
    rounds, items = math.ceil(updates / updates_of_a_batch(phases) - 1e-9), []
    first = before = 0
    for until, own in _grouped(phases):
        count = max(1, round(until * rounds) - before)
        items.append(Stage(own, first, count, before))
        first, before = items[-1].stop, before + count
    return Stages(tuple(items))


def _grouped(phases: Sequence[Phase]) -> list[tuple[float, tuple[Phase, ...]]]:
    """The phases of each stage, by the share of the run at which it ends."""
    ordered = sorted(phases, key=lambda phase: phase.until)
    return [(until, tuple(own)) for until, own in itertools.groupby(ordered, key=lambda phase: phase.until)]
