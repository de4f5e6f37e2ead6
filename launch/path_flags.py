"""Flags that are paths."""

import os
from typing import Any

from absl import flags

from research.errors import UserError
from research.files import printable, user_path

flags.disclaim_key_flags()  # what `path_flag` defines belongs to the command that calls it


class _PathParser(flags.ArgumentParser[str]):
    """A path; a leading ~ is the home folder."""

    syntactic_help = "a path"

    def parse(self, argument: Any) -> str:
        if any(
            "\ud800" <= letter <= "\udfff" for letter in argument
        ):  # a byte that is no UTF-8; the library of checkpoints ends at it
            raise ValueError(f"{printable(argument, 300)} is not UTF-8; give another name")
        try:
            return (
                os.fspath(user_path(argument)) if argument.startswith("~") else argument
            )  # an address has two slashes
        except UserError as error:
            raise ValueError(str(error)) from None


def path_flag(name: str, default: str | None, help: str, **options: Any) -> flags.FlagHolder:
    """Defines a flag that is the path of a file or folder; `~` in it is the home folder, also behind `--name=`."""
    return flags.DEFINE(_PathParser(), name, default, help, serializer=flags.ArgumentSerializer(), **options)
