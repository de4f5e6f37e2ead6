"""Which fields of a config are read: a setting that nothing goes by is refused instead of ignored.

Whoever reads fields that others do not says so: tasks and data sets, parts of the report. A
field that nobody claims is read in every run.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from research.data.augment import PARTS_OF
from research.data.sources import kind_of_examples, settings_read
from research.errors import UserError
from research.files import printable
from research.tasks import registry as tasks
from research.tasks.base import Task
from research.train import learner_registry
from research.train.config import FREE, NAME, base_config, resolved, value_of
from research.train.fields import FIELDS
from research.train.method_registry import find
from research.values import Rule, fit

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Reader:
    """What goes by fields that others do not read.

    Attributes:
      name: in words, for messages.
      reads: the fields, dotted.
      here: whether a run of a config has it.
      option: whether it is a choice within a recipe, such as a scheme: what belongs to another choice may stay in the
        recipe when a command line makes this one. Data and their task are none: what they do not use would be missed.
    """

    name: str
    reads: tuple[str, ...]
    here: Callable[[Config], bool]
    option: bool = False


def task_of(config: Config) -> type[Task]:
    """Returns the class of a config's task.

    Raises:
      UserError: an unknown data set or task, or a task for other examples.
    """
    data = config["data"]["name"]
    return tasks.find(config["task"]["name"], kind_of_examples(data), data)


def _on(config: Config, *fields: str) -> bool:
    """Whether fields are set, to neither nothing nor a duration of 0."""
    values = [value_of(config, field) for field in fields]
    return all(
        bool(value) and not (isinstance(value, str) and re.fullmatch(r"\s*0+(\.0+)?\s*(ep|ex|%|)\s*", value))
        for value in values
    )


def _beside(switch: str, *fields: str) -> Reader:
    """What goes by fields where another one is on."""
    return Reader(f"runs with {switch}", fields, lambda config: _on(config, switch), option=True)


def _has(task: type[Task]) -> Callable[[Config], bool]:
    """Whether a config has this task."""
    return lambda config: task_of(config) is task


def _of_tasks() -> Iterator[Reader]:
    for task in tasks.known().values():
        reads = tuple(f"task.{field}" for field in task.reads)
        yield Reader(task.name, reads + task.reads_elsewhere, _has(task))
    both = lambda config: _on(config, "task.mixup", "task.cutmix")
    yield Reader("task.mixup together with task.cutmix", ("task.switch",), both)


def _of_methods() -> Iterator[Reader]:
    chooses = lambda config: any(find(name).chooses for name in config["methods"])
    yield Reader("methods that choose sub-networks", ("nested.reduce", "nested.execution"), chooses, option=True)


def _reads(field: str, config: Config) -> bool:
    """Whether a config's data set goes by a field."""
    return field in settings_read(config["data"]["name"])


def _augments(option: str, config: Config) -> bool:
    """Whether a config's augmentation has an option."""
    return bool(config["data"]["augment"].get(option))


def _of_data() -> Iterator[Reader]:
    for field, name in (
        ("data.dir", "data sets that are read from files"),
        ("data.validation_fraction", "data sets without a validation split of their own"),
        ("data.augment", "data sets of labelled images"),
    ):
        yield Reader(name, (field,), functools.partial(_reads, field))
    for option, whole in PARTS_OF.items():
        yield Reader(
            f"data.augment.{whole}",
            (f"data.augment.{option}",),
            functools.partial(_augments, whole),
        )


@functools.cache
def readers() -> tuple[Reader, ...]:
    """Returns everything that goes by fields of its own."""
    return (
        *_of_tasks(),
        *_of_methods(),
        *_of_data(),
        Reader(
            "optim.schedule=cosine_power",
            ("optim.order",),
            lambda config: config["optim"]["schedule"] == "cosine_power",
            option=True,
        ),
        Reader(
            "schedules that fall",
            ("optim.final_lr",),
            lambda config: config["optim"]["schedule"] != "constant",
            option=True,
        ),
        _beside("train.init_from", "nested.sort_importance"),
        _beside("eval.every", "eval.stop_at"),
        _beside("report.latency", "report.latency_batches"),
    )


def unread(config: Config) -> set[str]:
    """Returns the fields that nothing in a run of a config goes by, whatever they are set to.

    Raises:
      UserError: an unknown data set.
    """
    read = {field for reader in readers() if reader.here(config) for field in reader.reads}
    others = {field for reader in readers() for field in reader.reads} - read
    learner = learner_registry.find(config["learner"]["name"])
    return others | {field for field in (*FIELDS, *FREE) if not learner.goes_by(field)}


def ignored(old: Config, new: Config) -> set[str]:
    """Returns the fields that neither of two configs goes by: they may differ when a run goes on."""
    return unread(old) & unread(new)


def check_new(config: Config) -> None:
    """Judges what only a run that begins is held to: older runs open and go on with what they were trained with.

    Raises:
      UserError: a name of a sub-network that is none, or choices of the task that mean nothing together.
    """
    for name in config["nested"]["points"]:
        fit(name, str, "a name in config.nested.points", Rule(pattern=NAME, says="of letters, digits and _ + = -"))
    task_of(config).check_new(config["task"])


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
        left_over = field not in before and field not in given and all(reader.option for reader in owners)
        if value != default and not left_over:
            names = " or ".join(dict.fromkeys(reader.name for reader in owners))
            remedy = "leave it out" if default is None else f"leave it at {default!r}"
            raise UserError(
                f"config.{field}={printable(repr(value))} is not read in this run, only by {names}; {remedy}"
            )


def _owners(field: str, config: Config) -> list[Reader]:
    """Returns who goes by a field that a run does not go by: other learners, where its own is none that does."""
    learners = learner_registry.known()
    if learners[config["learner"]["name"]].goes_by(field):
        return [reader for reader in readers() if field in reader.reads]
    others = [name for name, learner in learners.items() if learner.goes_by(field)]
    return [Reader(f"the learner {name}", (field,), lambda config: False) for name in others]


def _get(config: Config, field: str) -> Any:
    *parents, name = field.split(".")
    return (value_of(config, ".".join(parents)) if parents else config).get(name)
