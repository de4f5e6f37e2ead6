"""Sections of a run's config: frozen dataclasses, each in a file of the component that reads it.

Recipes and command lines change an `ml_collections.ConfigDict` made of the defaults; `read` makes of it what code goes
by, every value judged by its annotation and its rule. Without JAX: recipes are read before anything heavy is imported.
"""

import dataclasses
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from research.errors import UserError, near_names
from research.values import ANYTHING, Rule, fit


@dataclass(frozen=True)
class Only:
    """Which runs go by a field that others do not read.

    Attributes:
      name: those runs, or what reads the field in them, in words for messages.
      here: whether a run is one of them, from its `research.train.sections.RunConfig`.
      option: whether that is a choice within a recipe: the field may stay set in the recipe when a command line makes
        another choice.
    """

    name: str
    here: Callable[[Any], bool]
    option: bool = True


@dataclass(frozen=True)
class Field:
    """One field of a config.

    Attributes:
      kind: the annotation of its type, see `research.values.fit`.
      meaning: in one line.
      rule: what its values keep.
      only: which runs read it; None: all whose task, learner and data do.
    """

    kind: Any
    meaning: str
    rule: Rule = ANYTHING
    only: Only | None = None


class Section:
    """Base of the sections; derived ones are frozen dataclasses whose fields are made by `setting`, `group` and
    `free`."""

    def check(self) -> None:
        """Judges values that depend on one another, or are in a free group.

        Raises:
          UserError: they mean nothing together.
        """


S = TypeVar("S", bound=Section)
_META = "nestax"


def setting(default: Any, meaning: str, rule: Rule = ANYTHING, only: Only | None = None) -> Any:
    """Returns a dataclass field of a section: one value of a config."""
    return dataclasses.field(default=default, metadata={_META: (meaning, rule, only)})


def group(section: Callable[[], Section]) -> Any:
    """Returns a dataclass field that is a section of its own."""
    return dataclasses.field(default_factory=section)


def free(default: Callable[[], Mapping[str, Any]] = dict) -> Any:
    """Returns a dataclass field that is a group of any names, checked by whoever reads it."""
    return dataclasses.field(default_factory=default, metadata={_META: None})


def _parts(section: type[Section]) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Yields (field, annotation) of a section."""
    kinds = typing.get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(typing.cast(Any, section)):
        yield field, kinds[field.name]


def fields_of(section: type[Section], prefix: str = "") -> dict[str, Field]:
    """Returns dotted name -> field of a section and those within it, without the free groups."""
    found: dict[str, Field] = {}
    for field, kind in _parts(section):
        if _META not in field.metadata:
            found |= fields_of(kind, f"{prefix}{field.name}.")
        elif field.metadata[_META] is not None:
            found[prefix + field.name] = Field(kind, *field.metadata[_META])
    return found


def free_groups(section: type[Section], prefix: str = "") -> tuple[str, ...]:
    """Returns the dotted names of the groups of any names in a section and those within it."""
    found: tuple[str, ...] = ()
    for field, kind in _parts(section):
        if _META not in field.metadata:
            found += free_groups(kind, f"{prefix}{field.name}.")
        elif field.metadata[_META] is None:
            found += (prefix + field.name,)
    return found


def defaults(section: type[Section]) -> dict[str, Any]:
    """Returns a section's defaults as nested dictionaries."""
    return {
        field.name: defaults(kind)
        if _META not in field.metadata
        else dict(field.default_factory())
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for field, kind in _parts(section)
    }


def read(section: type[S], given: Mapping[str, Any], prefix: str = "config") -> S:
    """Returns a section made of plain values.

    Args:
      section: its class.
      given: all of its fields by name.
      prefix: what messages call it.

    Raises:
      UserError: an unknown or missing field, or a value of another type or against its rule.
    """
    parts = {field.name: (field, kind) for field, kind in _parts(section)}
    check_names(given, parts, prefix)
    values = {}
    for name, (field, kind) in parts.items():
        where = f"{prefix}.{name}"
        if _META not in field.metadata:
            values[name] = read(kind, fit(given[name], dict, where), where)
        elif field.metadata[_META] is None:
            values[name] = fit(given[name], dict, where)
        else:
            values[name] = fit(given[name], kind, where, field.metadata[_META][1])
    made = section(**values)
    made.check()
    return made


def check_names(given: Collection[str], known: Collection[str], prefix: str) -> None:
    """Raises UserError for a name that is not known, with the near ones, or for one that is missing."""
    for name in given:
        if name not in known:
            near = near_names(name, known)
            group = "".join(f"{part}." for part in prefix.split(".")[1:])
            raise UserError(f"unknown config field {group + name!r}; near: {', '.join(group + n for n in near)}")
    if missing := sorted(name for name in known if name not in given):
        raise UserError(
            f"{prefix}.{missing[0]} is missing; change a group by {prefix}.update(...), which keeps its other fields"
        )
