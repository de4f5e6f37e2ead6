"""The optimizers by name, as `config.optim.name` says it. Each registers itself in its own file: those of this package,
and those of a user's own file (`--plugin=FILE`).

Without JAX: the files that hold optimizers are imported when one is first asked for.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from research.errors import Unregistered, UserError, near_names
from research.plugins import import_all
from research.values import check_options, fit_options

CONSTANTS = ("b1", "b2", "b3", "rho", "eps", "momentum", "nesterov")
"""Parameters of factories that are fields of the config's section `optim`, since many optimizers have them."""
TOLD = ("axes", "kinds")
"""Parameters of factories that are not a user's to set: axis names by parameter, and what each parameter does."""


@dataclass(frozen=True)
class Optimizer:
    """An optimizer: the factory of its direction, and what it takes where a recipe leaves it open.

    Attributes:
      name: in configs.
      make: the factory, called by keywords; returns a direction, without learning rate and decay.
      constants: those of `CONSTANTS` that the factory has, with its own values.
      options: the others, `config.optim.options`, with the factory's own values.
      told: those of `TOLD` that the factory has.
      source: the paper.
      lr: its usual learning rate; None where there is none, so that a recipe must set one.
      weight_decay: its usual decay.
    """

    name: str
    make: Callable[..., Any]
    constants: Mapping[str, float | bool]
    options: Mapping[str, Any]
    told: tuple[str, ...]
    source: str
    lr: float | None
    weight_decay: float

    def filled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a user's options, typed by the factory's annotations, and its own values of the others.

        Raises:
          UserError: an unknown option, or a value of another type or out of range.
        """
        where = "config.optim.options."
        for name in options:
            if name in self.constants:
                raise UserError(f"{where}{name} is a field of the section: write config.optim.{name}")
        check_options(options, self.options, where, self.name)
        return {**self.options, **fit_options(options, self.make, where)}


_Factory = TypeVar("_Factory", bound=Callable[..., Any])
_OPTIMIZERS: dict[str, Optimizer] = {}


def register(
    name: str, *, source: str, lr: float | None = 1e-3, weight_decay: float = 0.0
) -> Callable[[_Factory], _Factory]:
    """Makes an optimizer known by a name: decorates the factory of its direction.

    The parameters of the factory say what it takes: `axes` and `kinds` are given to it, those named in `CONSTANTS` are
    fields of `config.optim`, all others are options in `config.optim.options`, typed by their annotations.

    Args:
      name: in `config.optim.name`.
      source: the paper.
      lr: the usual learning rate; None where there is none.
      weight_decay: the usual decay, which the chain adds (`build.py`).

    Raises:
      UserError: another optimizer has this name, or a parameter of the factory has no default or no annotation.
    """

    def add(make: _Factory) -> _Factory:
        if (other := _OPTIMIZERS.get(name)) is not None:
            raise UserError(
                f"optimizer {name} of {make.__module__} is there already, from {other.make.__module__}; choose another "
                "name"
            )
        own = {key: value for key, value in inspect.signature(make).parameters.items() if key not in TOLD}
        for key, parameter in own.items():
            _check_parameter(name, key, parameter)
        defaults = {key: parameter.default for key, parameter in own.items()}
        _OPTIMIZERS[name] = Optimizer(
            name,
            make,
            {key: value for key, value in defaults.items() if key in CONSTANTS},
            {key: value for key, value in defaults.items() if key not in CONSTANTS},
            tuple(key for key in TOLD if key in inspect.signature(make).parameters),
            source,
            lr,
            weight_decay,
        )
        return make

    return add


def _check_parameter(name: str, key: str, parameter: inspect.Parameter) -> None:
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        raise UserError(f"optimizer {name}: its factory is called by keywords, {parameter} takes none of a known name")
    if parameter.default is parameter.empty:
        raise UserError(f"optimizer {name}: {key} has no default; what a recipe leaves open is the optimizer's own")
    if key not in CONSTANTS and parameter.annotation is parameter.empty:
        raise UserError(f"optimizer {name}: {key} has no annotation, by which config.optim.options.{key} is typed")


def known() -> dict[str, Optimizer]:
    """Returns all optimizers by name, sorted.

    All need gradients, their state and the parameters only: line searches and steps from the loss's value are not here.
    """
    import_all("research.optim")
    return dict(sorted(_OPTIMIZERS.items()))


def find(name: str) -> Optimizer:
    """Returns an optimizer.

    Raises:
      UserError: there is none of this name.
    """
    optimizers = known()
    if name not in optimizers:
        near = ", ".join(near_names(name, optimizers))
        raise Unregistered(f"unknown optim.name {name!r}; near: {near} (all: {', '.join(optimizers)})")
    return optimizers[name]
