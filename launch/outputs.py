"""Flags that name what a command writes: all are defined here, and checked before its work starts."""

import enum
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from absl import flags

from launch.path_flags import path_flag
from research.errors import UserError
from research.files import check_output, check_workdir

flags.disclaim_key_flags()


class Place(enum.Enum):
    """What is written at a path."""

    FILE = enum.auto()
    FOLDER = enum.auto()
    EITHER = enum.auto()
    RUN = enum.auto()
    """The directory of a run, which continues where there is one already."""


@dataclass(frozen=True)
class Output:
    """A flag that names what is written.

    Args:
      place: what is written there.
      reads: flags that name what the command reads.
      beside: flag of a run's directory into which the command may write, under names that no run has.
    """

    flag: flags.FlagHolder
    place: Place
    reads: Sequence[flags.FlagHolder] = ()
    beside: flags.FlagHolder | None = None


OUTPUTS: list[Output] = []
"""Of the command that is running."""


def output_flag(
    name: str,
    place: Place,
    help: str,
    *,
    reads: Sequence[flags.FlagHolder] = (),
    beside: flags.FlagHolder | None = None,
    default: str | None = None,
    **options: Any,
) -> flags.FlagHolder:
    """Defines a flag that names what is written; arguments as of `Output` and `path_flag`."""
    flag = path_flag(name, default, help, **options)
    OUTPUTS.append(Output(flag, place, reads, beside))
    return flag


def check() -> None:
    """Refuses outputs that would harm what is read, a run or a model, or that cannot be written.

    Raises:
      UserError: such an output.
    """
    for output in OUTPUTS:
        path, name = output.flag.value, f"--{output.flag.name}"
        if not path or "://" in path:
            continue
        if output.place is Place.RUN:
            check_workdir(path, flag=name)  # whether it can be written is for the machine to say that trains there
            continue
        if (
            output.beside is None
            or not output.beside.value
            or os.path.realpath(path) != os.path.realpath(output.beside.value)
        ):
            check_output(path, *(read.value for read in output.reads if read.value), flag=name)
        _check_place(path, output.place, name)


def _check_place(path: str, place: Place, name: str) -> None:
    if os.path.lexists(path) and place is not Place.EITHER:
        if place is Place.FILE and os.path.isdir(path):
            raise UserError(f"{name}={path} is a folder; expected a file")
        if place is Place.FILE and os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{name}={path} is not a regular file; give another one")
        if place is not Place.FILE and not os.path.isdir(path):
            raise UserError(f"{name}={path} is no folder; expected one")
    above = os.path.abspath(path)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        if above == os.path.abspath(path):
            return  # a file that is there, or a link, which is replaced
        raise UserError(f"{name}={path} cannot be written: {above} is no folder; give another one")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{name}={path} cannot be written: no right to write in {above}; give another one")
