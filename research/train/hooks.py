"""What the hooks of methods take and give, see `research.train.method`."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from jaxtyping import Array, UInt

from research.modules.axes import Axes, Kind
from research.modules.state import Arrays
from research.nested.space import Space
from research.tasks.base import Example, Forward, Outcome, Task
from research.train.sections import RunConfig

Objective = Callable[[Forward, Example], Outcome]
Loss = Callable[..., tuple[Array, Any]]
"""loss(params, stream="train", trains=phase.trains) -> (value, auxiliary results) of a microbatch of a stream;
parameters that `trains` does not name have no gradient."""
Gradient = Callable[[Loss, Arrays, Array], tuple[tuple[Array, Any], Arrays]]
"""gradient(loss, params, key) -> ((value, auxiliary results), gradient)."""


def everything(name: str) -> bool:
    """The parameters that a phase trains by default."""
    del name
    return True


@dataclass(frozen=True)
class Phase:
    """One kind of update. Those that end at the same time alternate: a round has one of each, which share the batch of
    each stream.

    Attributes:
      name: unique among the phases of a run.
      trains: whether the phase moves the parameter of a name; the others get the gradient zero.
      streams: whose batches its gradient programs take; the first is the one that is trained on.
      outputs: whether its loss has outputs that other networks can learn from.
      optim: fields of the config's section `optim` that differ in this phase; not `warmup`.
      until: share of the run at which its updates end; they begin where those of the phases with the next smaller
        share end. The last phases have 1.
    """

    name: str = "all"
    trains: Callable[[str], bool] = everything
    streams: tuple[str, ...] = ("train",)
    outputs: bool = True
    optim: Mapping[str, Any] = field(default_factory=dict)
    until: float = 1.0


def alternates(phases: Iterable[Phase]) -> bool:
    """Whether an optimizer must know the phase: there are several, or one that does not train everything."""
    several = list(phases)
    return len(several) > 1 or any(phase.trains is not everything for phase in several)


@dataclass(frozen=True)
class Stream:
    """A part of the training examples with an order of its own, a function of (seed, step).

    Attributes:
      name: as phases call it.
      start, stop: the part, as fractions of all examples in an order drawn once from the seed.
    """

    name: str
    start: float = 0.0
    stop: float = 1.0


@dataclass(frozen=True)
class Extra:
    """Arrays that a method adds to a run, sliced and sharded by the names of their axes like the model's own.

    Attributes:
      shape: in the full network.
      axes: a name for each; of names that the model has the sizes are the model's, others stay whole.
      initial: returns the array of the full network from (key, the model's parameters).
      kind: of trained ones, what they do (decay follows); None: not trained, but moved by `Method.after_update`.
      dtype: of the array.
    """

    shape: tuple[int, ...]
    axes: Axes
    initial: Callable[[Array, Arrays], Array]
    kind: Kind | None = None
    dtype: Any = np.float32


@dataclass(frozen=True)
class Brought:
    """A trained network that a method brings and nothing moves; a checkpoint holds its digest, not its arrays.

    Attributes:
      config: of the model.
      params, stats: its arrays.
      digest: of them, which a resumed run must find again.
    """

    config: Any
    params: Arrays
    stats: Arrays
    digest: str


@dataclass(frozen=True)
class Reindex:
    """What becomes of an axis in a reshape.

    Attributes:
      index: for each place along the new axis the old place that it is copied from, or -1 for what is new.
      fill: what is new: "zero", or "fresh" for the initial values of the new network.
    """

    index: tuple[int, ...]
    fill: str = "zero"


@dataclass(frozen=True)
class Reshape:
    """A plan for a network of another shape: the new config of the full network, and by axis name what stays.

    Axes that are not named and whose size changes keep their first indices; what is new in them is filled by "zero".
    """

    config: Any
    axes: Mapping[str, Reindex] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """What an update was made of, as methods see it after the optimizer.

    Attributes:
      before: parameters before the update.
      grads: of what the update minimises, by the parameters; sums over its sub-networks and microbatches.
      stats: the model's statistics after the gradients.
    """

    before: Arrays
    grads: Arrays
    stats: Arrays


def number_of(name: str) -> int:
    """Returns the number that a method's name is folded into keys as; the loop's own streams have those below 16."""
    return zlib.crc32(name.encode()) | 16


@dataclass(frozen=True)
class Clock:
    """When a hook is called, inside a program.

    Attributes:
      update: index of the update.
      microbatch: which of the batch, counted over all of the update's.
      turn: which gradient program of the update, counted over its draws and their microbatches.
      draw: which of the update's sub-networks.
      phase: of the update.
      base: key of the update.
    """

    update: UInt[Array, ""]
    microbatch: UInt[Array, ""]
    turn: UInt[Array, ""]
    draw: UInt[Array, ""]
    phase: str
    base: Array

    def key(self, stream: int | str, place: Array) -> Array:
        """Returns a key of the update for a stream of random numbers (a method's name, or one of the loop's own
        numbers) and a place in it."""
        number = stream if isinstance(stream, int) else number_of(stream)
        return jax.random.fold_in(jax.random.fold_in(self.base, number), place)


class Other(Protocol):
    """What a method asks of the others of its run; attributes and hooks of `research.train.method.Method`."""

    name: ClassVar[str]
    teaches: ClassVar[bool]

    def evaluated(self, params: Arrays, arrays: Arrays) -> Arrays: ...


@dataclass(frozen=True)
class About:
    """What methods are told of a run before anything is built.

    Attributes:
      config: the resolved config.
      task, space: of the run.
      shapes: of a prepared batch.
      methods: of the run, in order.
    """

    config: RunConfig
    task: Task
    space: Space
    shapes: Mapping[str, Any]
    methods: tuple[Other, ...]
