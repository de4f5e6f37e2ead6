"""The methods of a run, composed: in the order of the config, each around those before it."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jaxtyping import Array

from research.errors import UserError
from research.modules.axes import Axes
from research.modules.state import Abstract, Arrays
from research.nested.draws import Draw, checked
from research.nested.space import Space
from research.tasks.base import Task
from research.train.hooks import About, Brought, Clock, Extra, Gradient, Loss, Made, Objective, Phase, Stream
from research.train.method import Evaluation, Method
from research.train.method_registry import make
from research.train.sections import RunConfig


def plain_gradient(loss: Loss, params: Arrays, key: Array) -> tuple[tuple[Array, Any], Arrays]:
    """The gradient of backpropagation."""
    del key
    return jax.value_and_grad(loss, has_aux=True)(params)


@dataclass(frozen=True)
class Methods:
    """What the methods of a run make of its parts together."""

    items: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        for what, such in (
            ("decide which sub-networks an update trains", [m.name for m in self.items if m.chooses]),
            (
                "put an objective of their own in the place of the one before",
                [m.name for m in self.items if m.replaces],
            ),
        ):
            if len(such) > 1:
                raise UserError(f"methods {such[0]} and {such[1]} both {what}; choose one of them")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(method.name for method in self.items)

    @property
    def headings(self) -> dict[str, str]:
        """What the line of progress calls the numbers that the methods' objectives measure."""
        return {name: heading for method in self.items for name, heading in method.headings.items()}

    def check(self, about: About) -> None:
        """Raises UserError where a method does not fit the run, or two do not go together."""
        for place, method in enumerate(self.items):
            for before in self.items[:place] if method.replaces else ():
                if type(before).objective is not Method.objective:
                    raise UserError(
                        f"method {method.name} puts an objective in the place of that of {before.name}, which is named "
                        f"before it; name {method.name} first"
                    )
        if len(of := [m.name for m in self.items if m.phases(about.space.full)]) > 1:
            raise UserError(f"methods {of[0]} and {of[1]} both have phases of their own; choose one of them")
        self._check_phases(about.space.full)
        for method in self.items:
            method.check(about)
            for evaluation in method.evaluations():
                evaluation.check(about)

    def _check_phases(self, model: Any) -> None:
        names, streams = [phase.name for phase in self.phases(model)], [stream.name for stream in self.streams()]
        if len(set(names)) < len(names):
            raise UserError(f"phases {names} of the methods {self.names} do not have different names")
        if len(of := [m.name for m in self.items if m.streams()]) > 1:
            raise UserError(
                f"methods {of[0]} and {of[1]} both have streams of batches of their own; choose one of them"
            )
        untils = {phase.until for phase in self.phases(model)}
        if max(untils) != 1 or min(untils) <= 0:
            raise UserError(
                f"phases {names} end at {sorted(untils)}; valid: shares of the run above 0, the last of them 1"
            )
        for phase in self.phases(model):
            if unknown := sorted(set(phase.streams) - set(streams)):
                raise UserError(f"phase {phase.name} takes batches of the stream {unknown[0]!r}; valid: {streams}")

    def wrapped(self, task: Task, model: Any) -> Task:
        """Returns the task as it is evaluated."""
        for method in self.items:
            task = method.wrapped(task, model)
        return task

    def draws(self, space: Space, seed: int, step: int) -> tuple[Draw, ...]:
        """Returns the sub-networks of round `step`; the full network where no method chooses.

        Raises:
          UserError: a network that is not in the space, or one that distils without a teacher.
        """
        for method in self.items:
            if method.chooses:
                return checked(method.draws(space, seed, step), space, method.name, step)
        return (Draw("full"),)

    def phases(self, model: Any) -> tuple[Phase, ...]:
        """Returns the phases of a round, one at least."""
        return next((found for m in self.items if (found := m.phases(model))), (Phase(),))

    def streams(self) -> tuple[Stream, ...]:
        """Returns the streams of batches, "train" at least."""
        return next((found for m in self.items if (found := m.streams())), (Stream("train"),))

    def extras(self, model: Abstract) -> dict[str, dict[str, Extra]]:
        """Returns the arrays of each method that has any; methods see what those before them train."""
        found: dict[str, dict[str, Extra]] = {}
        for method in self.items:
            if own := dict(method.arrays(model)):
                found[method.name] = own
                model = extended(model, model, {method.name: own})
        return found

    def brought(self, about: About) -> dict[str, Brought]:
        """Loads the networks that methods bring."""
        return {m.name: network for m in self.items if (network := m.brings(about)) is not None}

    def start(self, model: Any, key: Array, say: Callable[[str], None]) -> tuple[Arrays, Arrays]:
        """Returns the (params, stats) that methods give a run to start from, those of later ones in the place of
        earlier ones'.

        Raises:
          UserError: a method does not fit the model.
        """
        params: Arrays = {}
        stats: Arrays = {}
        for method in self.items:
            if (given := method.start(model, key, say)) is not None:
                params, stats = {**params, **given[0]}, {**stats, **given[1]}
        return params, stats

    def weights(self, params: Arrays, arrays: Mapping[str, Arrays], clock: Clock | None) -> Arrays:
        """Returns the effective weights of a sub-network."""
        for method in self.items:
            params = method.weights(params, arrays.get(method.name, {}), clock)
        return params

    def objective(self, task: Task) -> Objective:
        """Returns what training minimises."""
        objective: Objective = task.objective
        for method in self.items:
            objective = method.objective(objective, task)
        return objective

    def gradient(self, phase: Phase) -> Gradient:
        """Returns how gradients are made."""
        gradient: Gradient = plain_gradient
        for method in self.items:
            gradient = method.gradients(gradient, phase)
        return gradient

    def optimizer(self, inner: optax.GradientTransformation, axes: Mapping[str, Axes]) -> Any:
        """Returns the optimizer behind the methods' transforms."""
        parts = [part for method in self.items if (part := method.transform(axes)) is not None]
        return optax.chain(*parts, inner) if parts else inner

    def after_update(
        self, params: Arrays, arrays: Mapping[str, Arrays], made: Made, clock: Clock
    ) -> tuple[Arrays, dict[str, Arrays]]:
        """Returns (parameters, arrays of the methods) after an update."""
        own = dict(arrays)
        for method in self.items:
            params, moved = method.after_update(params, own.get(method.name, {}), made, clock)
            if method.name in own:
                own[method.name] = moved
        return params, own

    def evaluated(self, params: Arrays, arrays: Mapping[str, Arrays]) -> Arrays:
        """Returns the full network's parameters that are evaluated."""
        for method in self.items:
            params = method.evaluated(params, arrays.get(method.name, {}))
        return params

    def work(self) -> float:
        """Returns what an update costs, in plain ones."""
        out = 1.0
        for method in self.items:
            out *= method.work()
        return out

    def evaluations(self) -> tuple[Evaluation, ...]:
        return tuple(e for method in self.items for e in method.evaluations())


def make_methods(config: RunConfig) -> Methods:
    """Builds the methods that a config names.

    Raises:
      UserError: an unknown one, one named twice, or options that do not fit.
    """
    names = list(config.methods)
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"methods={tuple(names)} names {name} twice")
    return Methods(tuple(make(name, config.method.get(name, {})) for name in names))


def extended(model: Abstract, full: Abstract, extras: Mapping[str, Mapping[str, Extra]]) -> Abstract:
    """Returns a network's abstract state with what methods train among its parameters, as METHOD/NAME.

    Args:
      model: of the network.
      full: of the full network.
      extras: of each method.
    """
    trained = {f"{method}/{name}": extra for method, own in extras.items() for name, extra in own.items() if extra.kind}
    if not trained:
        return model
    shapes = shapes_in(trained, model, full)
    return dataclasses.replace(
        model,
        params={**model.params, **shapes},
        axes={**model.axes, **{name: extra.axes for name, extra in trained.items()}},
        kinds={**model.kinds, **{name: extra.kind for name, extra in trained.items() if extra.kind}},
    )


def shapes_in(extras: Mapping[str, Extra], model: Abstract, full: Abstract) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of methods' arrays in a network: axes that the network cuts have the network's sizes."""
    coupled = {} if model is full else axis_sizes(full)
    sizes = {axis: size for axis, size in axis_sizes(model).items() if axis in coupled} if coupled else {}

    def of(extra: Extra) -> jax.ShapeDtypeStruct:
        shape = tuple(sizes.get(axis, size) for axis, size in zip(extra.axes, extra.shape, strict=True))
        return jax.ShapeDtypeStruct(shape, extra.dtype)

    return {name: of(extra) for name, extra in extras.items()}


def axis_sizes(model: Abstract) -> dict[str, int]:
    """Returns the size of every axis of a model by its name; names that stand for several sizes (windows of kernels,
    which nothing couples) are left out."""
    shapes: dict[str, Any] = {**model.params, **model.stats}
    sizes: dict[str, set[int]] = {}
    for name, shape in shapes.items():
        for axis, size in zip(model.axes[name], shape.shape, strict=True):
            sizes.setdefault(axis, set()).add(size)
    return {axis: next(iter(several)) for axis, several in sizes.items() if len(several) == 1}
