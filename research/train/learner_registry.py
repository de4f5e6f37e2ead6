"""The learners by name, as `config.learner.name` says it. Each registers itself in its own file: supervised training
here, all of `research/control/`, and those of a user's own file (`--plugin=FILE`)."""

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from research.errors import Unregistered, UserError, near_names
from research.plugins import import_all
from research.train.learner import Learner, Make
from research.train.sections import LearnerSection, RunConfig
from research.values import made_of


@dataclass(frozen=True)
class NoOptions:
    """Options of a learner that has none of its own."""


@dataclass(frozen=True)
class Entry:
    """A learner.

    Attributes:
      make: returns the one of a run.
      options: dataclass of what `config.learner.options` holds.
      reads: sections and fields of the config that it goes by, beside those of the harness; None: all.
      opening: says what makes one take long, of a config; None: nothing does.
      instead: what is done with its runs where a command wants networks of supervised training.
    """

    make: Make
    options: type[Any]
    reads: Collection[str] | None
    opening: Callable[[RunConfig], str] | None = None
    instead: str = "launch.train continues its runs, launch.report compares them"

    def goes_by(self, field: str) -> bool:
        """Whether a run of it goes by a dotted field of the config."""
        read = None if self.reads is None else (*HARNESS, *self.reads)
        return read is None or any(field == name or field.startswith(f"{name}.") for name in read)


HARNESS = (
    "seed",
    "learner",
    "data.stall_s",
    "train.duration",
    "train.log_every",
    "train.profile",
    "eval.every",
    "eval.stop_at",
    "checkpoint",
    "report.chosen",
    "expect",
)
"""Sections and fields that a run goes by whatever its learner."""
_LEARNERS: dict[str, Entry] = {}
_Factory = TypeVar("_Factory", bound=Make)


def register(
    name: str,
    *,
    options: type[Any] = NoOptions,
    reads: Collection[str] | None = None,
    opening: Callable[[RunConfig], str] | None = None,
    instead: str = Entry.instead,
) -> Callable[[_Factory], _Factory]:
    """Makes a factory `make(config, waiting, waited) -> Learner` known by a name; the rest as of `Entry`."""

    def add(make: _Factory) -> _Factory:
        if name in _LEARNERS:
            raise ValueError(f"learner {name} is registered twice")
        _LEARNERS[name] = Entry(make, options, reads, opening, instead)
        return make

    return add


def known() -> dict[str, Entry]:
    """Returns all learners by name, sorted."""
    importlib.import_module("research.train.supervised")  # which is made of what is checked by this file
    import_all("research.control")
    return dict(sorted(_LEARNERS.items()))


def find(name: str) -> Entry:
    """Returns a learner's entry.

    Raises:
      UserError: no learner has this name.
    """
    if name not in (learners := known()):
        near = near_names(name, learners)
        raise Unregistered(
            f"learner.name: unknown learner {name!r}; near: {', '.join(near)} (all: {', '.join(learners)})"
        )
    return learners[name]


def options_of(section: LearnerSection) -> Any:
    """Returns the options of a learner, typed and checked.

    Raises:
      UserError: an unknown learner or option, or a value of another type or out of range.
    """
    return made_of(find(section.name).options, section.options, "learner.options.", section.name)


def opening(config: RunConfig) -> str:
    """Returns a line on what is done while the learner of a config is made."""
    name = config.learner.name
    said = find(name).opening
    return f"making the learner {name}" if said is None else said(config)


def check_is(config: RunConfig, name: str) -> None:
    """Raises UserError where a config's learner is another than what is asked of it needs."""
    if (own := config.learner.name) != name:
        raise UserError(f"this is for runs of the learner {name}; the run's is {own}: {find(own).instead}")


def make(config: RunConfig, waiting: Callable[[], None], waited: Callable[[str, float], None]) -> Learner:
    """Makes the learner that a config names.

    Raises:
      UserError: whatever in the config does not fit together.
    """
    return find(config.learner.name).make(config, waiting, waited)
