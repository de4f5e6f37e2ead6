"""The space of sub-networks: named points (`s`, `m`, `full`) and free ones (`width=0.5,depth=0.5`)."""

import difflib
import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from research.errors import Notice, UserError
from research.modules import elastic
from research.modules.state import abstract
from research.nested.slicing import check_nests


def parse_choices(text: str) -> dict[str, Any]:
    """Parses `width=0.5,depth=1:1:3:1,kernel=7,keep=even`: floats are fractions, whole numbers counts.

    Raises:
      UserError: the text is not a list of name=value.
    """
    choices = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, found, value = part.partition("=")
        if not found or not value:
            raise UserError(f"cannot read sub-network {text!r} at {part!r}; write e.g. width=0.5,depth=0.5")
        values = tuple(_number(v) for v in value.split(":"))
        choices[name.strip()] = values if len(values) > 1 else values[0]
    return choices


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def as_choices(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """Returns choices given as text or as a dictionary, whose lists are tuples; errors as `parse_choices`."""
    if isinstance(given, str):
        return parse_choices(given)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


@dataclass(frozen=True)
class Space:
    """Named sub-networks of one model, largest ("full") first; `configs` keeps that order."""

    full: Any
    configs: Mapping[str, Any]

    def names(self) -> list[str]:
        return list(self.configs)

    @functools.cached_property
    def order(self) -> tuple[str, ...]:
        """The names, largest number of parameters first; "full" leads."""
        size = lambda name: abstract(self.configs[name]).num_params()
        return ("full", *sorted((name for name in self.configs if name != "full"), key=size, reverse=True))

    def resolve(self, text: str) -> tuple[str, Any]:
        """Returns (name, config) of a named point or of free choices.

        Raises:
          UserError: unknown name, or choices outside the space.
        """
        if text in self.configs:
            return text, self.configs[text]
        if "=" not in text:
            near = difflib.get_close_matches(text, self.configs, n=3, cutoff=0.3) or self.names()
            raise UserError(
                f"unknown sub-network {text!r}; near: {', '.join(near)}; or choices such as width=0.5,depth=0.5"
            )
        return text, shrink(self.full, parse_choices(text))


def shrink(config: Any, choices: Mapping[str, Any]) -> Any:
    """Returns `config.shrink(**choices)`.

    Raises:
      UserError: an unknown dimension, or a network that is no part of this one because a size that is not elastic
        follows from one that is.
    """
    elastic.check_choices(dict(choices), config.elastic)
    small = config.shrink(**choices)
    try:
        check_nests(abstract(config), abstract(small))
    except ValueError as error:
        made = ",".join(f"{name}={value}" for name, value in choices.items())
        raise UserError(
            f"{made} of {config.family} is no part of the network: {error}; give that size in the model, "
            "or leave the choice out"
        ) from None
    return small


def make_space(config: Any, points: Mapping[str, str | Mapping[str, Any]]) -> Space:
    """Builds the space of `config` with the given named points; "full" is always the first.

    Args:
      points: name -> choices, as text or dictionary.
    """
    configs = {"full": config}
    for name, choices in points.items():
        if name == "full":
            continue
        small = shrink(config, as_choices(choices))
        if (same := next((other for other in configs if configs[other] == small), None)) is not None:
            _tell_same(name, ",".join(f"{k}={v}" for k, v in as_choices(choices).items()), same)
        configs[name] = small
    return Space(config, configs)


@functools.cache
def _tell_same(name: str, choices: str, other: str) -> None:
    """Warns once in a process of a sub-network by which nothing is chosen, such as heads of a mixer that has none."""
    warnings.warn(f"sub-network {name} ({choices}) is the same network as {other}", Notice, stacklevel=3)
