"""Options that had another name in earlier versions: saved runs and models may hold it, what a user writes may not.

A dataclass of options declares its former names beside its fields. Whoever reads what users write calls
`refuse_former`, whoever reads what was saved `with_present_names`.
"""

import functools
import typing
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from research.errors import Notice, UserError


class Renamed:
    """Base of the dataclasses of options."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Name of a field in earlier versions -> its name today, beside those of the bases."""

    @classmethod
    def former(cls) -> dict[str, str]:
        """Returns all former names of the options -> those of today."""
        own = [base.renamed for base in reversed(cls.__mro__) if issubclass(base, Renamed)]
        return {old: new for names in own for old, new in names.items()}


def refuse_former(kind: type[Renamed], names: Iterable[str], where: str) -> None:
    """Raises UserError for an option that has another name today, with that name.

    Args:
      kind: class of the options.
      names: those that a user gave.
      where: what stands before them in the message, such as "model.attention.".
    """
    for name in names:
        if name in (former := kind.former()):
            raise UserError(f"{where}{name} is called {where}{former[name]} now")


def with_present_names(kind: type[Renamed], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns saved options, groups of them inside included, with today's names; a `Notice` tells those that changed.

    Args:
      kind: class of the options, a dataclass.
      saved: option -> value, which nobody has checked yet; a group of options is a dictionary.
    """
    found: dict[str, str] = {}
    options = _present(kind, saved, "", found)
    if found:
        _tell(", ".join(f"{former} is {present}" for former, present in found.items()))
    return options


def _present(kind: type[Renamed], saved: Mapping[str, Any], prefix: str, found: dict[str, str]) -> dict[str, Any]:
    """As `with_present_names`; puts former and present name of each that changed into `found`."""
    options, names, kinds = {}, kind.former(), typing.get_type_hints(kind)
    for former, value in saved.items():
        present = names.get(former, former)
        if present != former:
            found[prefix + former] = prefix + present
        inner = kinds.get(present)
        if isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, Renamed):
            value = _present(inner, value, f"{prefix}{present}.", found)
        options[present] = value
    return options


@functools.cache
def _tell(names: str) -> None:
    """Warns once in a process, however often the same run is opened."""
    warnings.warn(f"saved by an earlier version, whose options have other names now: {names}", Notice, stacklevel=3)
