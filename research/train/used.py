"""Which fields of a config are read: a setting that nothing goes by is refused instead of ignored.

Whoever reads fields that others do not says so: tasks and data sets, parts of the report. A
field that nobody claims is read in every run.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from research.data.augment import PARTS_OF
from research.data.section import goes_by
from research.data.sources import kind_of_examples
from research.errors import UserError
from research.files import printable
from research.sections import Only
from research.tasks import registry as tasks
from research.tasks.base import Task
from research.train import learner_registry
from research.train.config import base_config, resolved, value_of
from research.train.method_registry import find
from research.train.sections import FIELDS, FREE, RunConfig

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Reader:
    """What goes by a field that not every run reads: `only` says which runs do."""

    field: str
    only: Only


def task_of(config: RunConfig) -> type[Task]:
    """Returns the class of a config's task.

    Raises:
      UserError: an unknown data set or task, or a task for other examples.
    """
    return tasks.find(config.task.name, kind_of_examples(config.data.name).name, config.data.name)


def _has(task: type[Task]) -> Callable[[RunConfig], bool]:
    """Whether a config has this task."""
    return lambda config: task_of(config) is task


def _augments(option: str, config: RunConfig) -> bool:
    """Whether a config's augmentation has an option."""
    return bool(config.data.augment.get(option))


def _chooses(config: RunConfig) -> bool:
    """Whether a method of a config chooses sub-networks."""
    return any(find(name).chooses for name in config.methods)


@functools.cache
def readers() -> tuple[Reader, ...]:
    """Returns everything that goes by fields of its own."""
    found = [Reader(name, field.only) for name, field in FIELDS.items() if field.only is not None]
    for task in tasks.known().values():
        only = Only(task.name, _has(task), option=False)
        found += [Reader(f"task.{field}", only) for field in task.reads]
        found += [Reader(field, only) for field in task.reads_elsewhere]
    chooses = Only("methods that choose sub-networks", _chooses)
    found += [Reader(field, chooses) for field in ("nested.reduce", "nested.execution")]
    images = Only("data sets of labelled images", goes_by("data.augment"), option=False)
    found.append(Reader("data.augment", images))
    for option, whole in PARTS_OF.items():
        only = Only(f"data.augment.{whole}", functools.partial(_augments, whole), option=False)
        found.append(Reader(f"data.augment.{option}", only))
    return tuple(found)


def unread(config: Config) -> set[str]:
    """Returns the fields that nothing in a run of a config goes by, whatever they are set to.

    Raises:
      UserError: an unknown data set.
    """
    typed = RunConfig.of(config)
    read = {reader.field for reader in readers() if reader.only.here(typed)}
    others = {reader.field for reader in readers()} - read
    learner = learner_registry.find(typed.learner.name)
    return others | {field for field in (*FIELDS, *FREE) if not learner.goes_by(field)}


def ignored(old: Config, new: Config) -> set[str]:
    """Returns the fields that neither of two configs goes by: they may differ when a run continues."""
    return unread(old) & unread(new)


def check_new(config: Config) -> None:
    """Judges what only a run that begins is held to: older runs open and continue with what they were trained with.

    Raises:
      UserError: a name of a sub-network that is none, or choices of the task that mean nothing together.
    """
    typed = RunConfig.of(config)
    typed.nested.check_names()
    task_of(typed).check_new(typed.task)


def check_used(config: Config, recipe: Config | None = None, given: Collection[str] = ()) -> None:
    """Judges whether what a resolved config sets is read.

    Args:
      recipe: the config before a command line changed it; by default the same.
      given: the fields that the command line set.

    Raises:
      UserError: a field that nothing goes by is not at its default.
    """
    for field in given:
        section, _, option = field.partition(".")
        name = option.partition(".")[0]
        if section == "method" and name not in config["methods"]:
            raise UserError(f"config.{field} is not read in this run; name {name!r} in config.methods")
    defaults, before = resolved(base_config()), unread(recipe or config)
    for field in sorted(unread(config)):
        value, default = _get(config, field), _get(defaults, field)
        owners = _owners(field, config)
        left_over = field not in before and field not in given and all(owner.option for owner in owners)
        if value != default and not left_over:
            names = " or ".join(dict.fromkeys(owner.name for owner in owners))
            remedy = "leave it out" if default is None else f"leave it at {default!r}"
            raise UserError(
                f"config.{field}={printable(repr(value))} is not read in this run, only by {names}; {remedy}"
            )


def _owners(field: str, config: Config) -> list[Only]:
    """Returns who goes by a field that a run does not go by: other learners, where its own is none that does."""
    learners = learner_registry.known()
    if learners[config["learner"]["name"]].goes_by(field):
        return [reader.only for reader in readers() if field == reader.field]
    others = [name for name, learner in learners.items() if learner.goes_by(field)]
    return [Only(f"the learner {name}", lambda config: False, option=False) for name in others]


def _get(config: Config, field: str) -> Any:
    *parents, name = field.split(".")
    return (value_of(config, ".".join(parents)) if parents else config).get(name)
