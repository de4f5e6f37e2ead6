"""What a training method is: a small object whose hooks change parts of supervised training; each changes nothing by
default.

A method is a frozen dataclass of its options, derived from `Method` and decorated by `register`, in a file of
`research/methods/` or in one of your own (`--plugin=FILE`). A config names methods in order, `config.methods`, with
options under `config.method.NAME`. Random numbers of a method come from keys that its name is folded into.
"""

import dataclasses
import difflib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
import optax
from jaxtyping import Array, UInt

from research.errors import UserError
from research.modules.axes import Axes, Kind
from research.modules.state import Abstract, Arrays
from research.nested.draws import Draw
from research.nested.space import Space
from research.plugins import import_all
from research.tasks.base import Example, Forward, Outcome, Task
from research.values import fit, not_negative

Objective = Callable[[Forward, Example], Outcome]
Loss = Callable[..., tuple[Array, Any]]
"""loss(params, stream="train") -> (value, auxiliary results) of a microbatch of a stream."""
Gradient = Callable[[Loss, Arrays, Array], tuple[tuple[Array, Any], Arrays]]
"""gradient(loss, params, key) -> ((value, auxiliary results), gradient)."""


def everything(name: str) -> bool:
    """The parameters that a phase trains by default."""
    del name
    return True


@dataclass(frozen=True)
class Phase:
    """One kind of update in a round of updates, which share the batch of each stream.

    Attributes:
      name: unique among the phases of a run.
      trains: whether the phase moves the parameter of a name; the others get the gradient zero.
      streams: whose batches its gradient programs take; the first is the one that is trained on.
      outputs: whether its loss has outputs that other networks can learn from.
      optim: fields of the config's section `optim` that differ in this phase.
    """

    name: str = "all"
    trains: Callable[[str], bool] = everything
    streams: tuple[str, ...] = ("train",)
    outputs: bool = True
    optim: Mapping[str, Any] = field(default_factory=dict)


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
class Clock:
    """When a hook is called, inside a program.

    Attributes:
      update: index of the update.
      part: which part of the batch, counted over all of the update's.
      turn: which gradient program of the update: draw and microbatch.
      phase: of the update.
      base: key of the update.
    """

    update: UInt[Array, ""]
    part: UInt[Array, ""]
    turn: UInt[Array, ""]
    phase: str
    base: Array

    def key(self, stream: int | str, place: Array) -> Array:
        """Returns a key of the update for a stream of random numbers (a method's name, or one of the loop's own numbers)
        and a place in it."""
        number = stream if isinstance(stream, int) else int.from_bytes(stream.encode()[:16], "little") % (2**31) + 16
        return jax.random.fold_in(jax.random.fold_in(self.base, number), place)


@dataclass(frozen=True)
class About:
    """What methods are told of a run before anything is built.

    Attributes:
      config: the resolved config.
      task, space: of the run.
      shapes: of a prepared batch.
      methods: of the run, in order.
    """

    config: Mapping[str, Any]
    task: Task
    space: Space
    shapes: Mapping[str, Any]
    methods: "tuple[Method, ...]"

    def phases(self) -> tuple[Phase, ...]:
        """The phases of a round."""
        return next((found for m in self.methods if (found := m.phases(self.space.full))), (Phase(),))


@dataclass(frozen=True)
class Method:
    """Base of the methods; every hook changes nothing.

    Attributes:
      name: of the registry.
      paper: where it comes from.
      chooses: whether it decides which sub-networks an update trains; two that do are refused together.
      replaces: whether its objective never calls the one inside; two that do so are refused together.
      teaches: whether its objective has outputs that other networks can learn from.
      reports: whether it changes the report alone, so that a run may go on with other options of it.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    chooses: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    teaches: ClassVar[bool] = True
    reports: ClassVar[bool] = False

    def check(self, about: About) -> None:
        """Judges whether the method fits the run.

        Raises:
          UserError: it does not; with the reason.
        """

    def wrapped(self, task: Task, model: Any) -> Task:
        """Returns the task as it is evaluated under the method."""
        del model
        return task

    def draws(self, names: Sequence[str], seed: int, step: int) -> tuple[Draw, ...]:
        """Returns which sub-networks round `step` trains, and who learns from the full one; of methods that `choose`.

        Args:
          names: of the space, the largest first, the smallest last.
        """
        raise NotImplementedError

    def phases(self, model: Any) -> tuple[Phase, ...]:
        """Returns the phases of a round, () where all updates are alike."""
        del model
        return ()

    def streams(self) -> tuple[Stream, ...]:
        """Returns the parts of the training examples that phases take batches of, () where there is one."""
        return ()

    def arrays(self, model: Abstract) -> Mapping[str, Extra]:
        """Returns the arrays that the method adds, by name."""
        del model
        return {}

    def brings(self) -> Brought | None:
        """Returns the network that the method brings, loaded once at the start; `forward(x, params=NAME)` runs it."""
        return None

    def weights(self, params: Arrays, arrays: Arrays, clock: Clock | None) -> Arrays:
        """Returns the effective weights of a sub-network, in float32; what this does is baked into exports.

        Args:
          params: the sub-network's parameters, and what methods train.
          arrays: the method's own, cut to the sub-network.
          clock: None outside of training.
        """
        del arrays, clock
        return params

    def objective(self, inner: Objective, task: Task) -> Objective:
        """Returns the objective that takes the place of the one of the methods before it."""
        del task
        return inner

    def gradients(self, inner: Gradient, phase: Phase) -> Gradient:
        """Returns how gradients are made, from how they are made inside."""
        del phase
        return inner

    def transform(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation | None:
        """Returns what gradients go through before the optimizer, None for nothing."""
        del axes
        return None

    def after_update(self, params: Arrays, arrays: Arrays, clock: Clock) -> tuple[Arrays, Arrays]:
        """Returns (parameters, the method's own arrays) after the optimizer has moved the parameters. Traced."""
        del clock
        return params, arrays

    def evaluated(self, params: Arrays, arrays: Arrays) -> Arrays:
        """Returns the full network's parameters that are evaluated, extracted and exported."""
        del arrays
        return params

    def reshape_due(self, step: int) -> bool:
        """Whether `reshape` is to be asked before update `step`."""
        del step
        return False

    def reshape(self, step: int, config: Any, params: Arrays, arrays: Arrays) -> Reshape | None:
        """Returns a plan for another shape of the full network, None for none; on the host, equal in all processes.

        Args:
          config: of the full network.
          params, arrays: the parameters and the method's own arrays, on the host.
        """
        del step, config, params, arrays
        return None

    def work(self) -> float:
        """Returns what an update costs, in those of plain training, the mean over the phases of a round."""
        return 1.0

    def evaluations(self) -> tuple["Evaluation", ...]:
        """Returns further columns of the final report."""
        return ()


class Evaluation:
    """Columns of the final report."""

    def check(self, about: About) -> None:
        """Judges at the start what the end would fail at.

        Raises:
          UserError: it cannot be carried out.
        """

    def columns(self, evaluator: Any, weights: Arrays, statistics: Mapping[str, Arrays], split: str) -> dict[str, dict]:
        """Returns network -> {column: value} of a split.

        Args:
          evaluator: the run's.
          weights: of the full network.
          statistics: of each network.
        """
        raise NotImplementedError


M = TypeVar("M", bound=type[Method])
_METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[M], M]:
    """Makes a method known by its name, in `config.methods` and `config.method.NAME`."""

    def add(method: M) -> M:
        if name in _METHODS:
            raise ValueError(f"method {name} is registered twice")
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no name of a method: letters, digits and _")
        method.name = name
        _METHODS[name] = method
        return method

    return add


def known() -> dict[str, type[Method]]:
    """Returns all methods by name, sorted."""
    import_all("research.methods")
    return dict(sorted(_METHODS.items()))


def find(name: str, where: str = "methods") -> type[Method]:
    """Returns a method's class.

    Raises:
      UserError: no method has this name.
    """
    methods = known()
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=3, cutoff=0.4) or list(methods)
        raise UserError(f"{where}: unknown method {name!r}; near: {', '.join(near)} (all: {', '.join(methods)})")
    return methods[name]


def make(name: str, options: Mapping[str, Any]) -> Method:
    """Returns a method with its options.

    Raises:
      UserError: an unknown method or option, or a value of another type or out of range.
    """
    method = find(name)
    fields = {f.name: f for f in dataclasses.fields(method)}
    kinds = typing.get_type_hints(method, include_extras=True)
    values = {}
    for option, value in options.items():
        if option not in fields:
            near = difflib.get_close_matches(option, fields, n=3, cutoff=0.4) or sorted(fields)
            raise UserError(f"method.{name}.{option} is unknown; near: {', '.join(near) or 'it has no options'}")
        rule = not_negative(fields[option].default, kinds[option])
        values[option] = fit(value, kinds[option], f"method.{name}.{option}", rule)
    return method(**values)
