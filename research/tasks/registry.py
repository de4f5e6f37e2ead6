"""The tasks by name. Each registers itself in its own file; all files of this package are imported when one is first
asked for."""

from collections.abc import Callable
from typing import Any, TypeVar

from research.errors import Unregistered, UserError, near_names
from research.plugins import import_all
from research.tasks.base import Task
from research.tasks.section import TaskSection
from research.values import made_of

T = TypeVar("T", bound=type[Task])
_TASKS: dict[str, type[Task]] = {}


def register(name: str) -> Callable[[T], T]:
    """Makes a task known by its name, `config.task.name`; of several tasks for the same kind of examples the first one
    is taken where a config names none."""

    def add(task: T) -> T:
        if name in _TASKS:
            raise UserError(f"task {name} is registered twice; give yours another name")
        _TASKS[name] = task
        return task

    return add


def known() -> dict[str, type[Task]]:
    """Returns all tasks by name."""
    import_all("research.tasks")
    return dict(_TASKS)


def find(name: str, examples: str, data: str) -> type[Task]:
    """Returns the class of a task.

    Args:
      name: of the task; "" for the one of the data's examples.
      examples: what an example of the data is, see `research.data.registry`.
      data: name of the data set, for messages.

    Raises:
      UserError: no such task, or one for other examples.
    """
    tasks = known()
    if not name:
        fitting = [task for task in tasks.values() if examples in task.takes]
        fitting.sort(key=lambda task: not task.__module__.startswith("research.tasks."))  # ours first
        if not fitting:
            raise UserError(f"no task takes examples of {examples!r}, which data set {data} gives; set task.name")
        return fitting[0]
    if name not in tasks:
        near = near_names(name, tasks)
        raise Unregistered(f"unknown task.name={name!r}; near: {', '.join(near)}")
    if tasks[name].takes and examples not in tasks[name].takes:
        fits = [other for other, task in tasks.items() if examples in task.takes]
        raise UserError(f"task.name={name!r} does not take what data set {data} gives; valid: {', '.join(fits)}")
    return tasks[name]


def from_options(task: type[Task], section: TaskSection, **given: Any) -> Task:
    """Returns a task that is a dataclass of its options, `config.task.options`.

    Args:
      section: the config's section `task`.
      given: fields that the data decide.

    Raises:
      UserError: an unknown option, or a value of another type.
    """
    made: Task = made_of(task, section.options, "task.options.", task.name, **given)
    return made
