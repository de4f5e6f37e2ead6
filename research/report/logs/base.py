"""Readers of metrics.jsonl by heading: what a report says about HEADING/LAYER/NAME, the numbers that layers log.

A reader registers itself in its own file; files of this package are imported when the readers are first asked for, a
user's own comes by `--plugin`. Headings without a reader are logged, and the report says nothing about them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from research.plugins import import_all

Rows = Sequence[Mapping[str, Any]]
"""The lines of metrics.jsonl."""


class LogReader:
    """What a report says about a heading; all of it is nothing by default, as it must be of rows without the heading.

    Attributes:
      heading: what comes first in the names of its numbers, see `research.modules.axes.Log`.
      files: names of all figures that it may draw.
      counts: those of its facts that are numbers, the fewer the better: recipes may expect bounds of them, sweeps
        compare them.
    """

    heading: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[tuple[str, ...]] = ()

    def facts(self, rows: Rows) -> dict[str, Any]:
        """Returns entries of report.json."""
        del rows
        return {}

    def remarks(self, rows: Rows) -> list[str]:
        """Returns lines that people should see at the end of the run."""
        del rows
        return []

    def figures(self, rows: Rows) -> dict[str, Callable[[Path], object]]:
        """Returns, of `files`, those that these rows give: name -> what writes the figure to a path."""
        del rows
        return {}

    def sections(self, rows: Rows) -> list[str]:
        """Returns parts of report.md."""
        del rows
        return []


R = TypeVar("R", bound=type[LogReader])
_READERS: dict[str, LogReader] = {}


def register(reader: R) -> R:
    """Makes a class of readers known.

    Raises:
      ValueError: another one reads this heading.
    """
    if reader.heading in _READERS:
        raise ValueError(f"the heading {reader.heading} has a reader already")
    _READERS[reader.heading] = reader()
    return reader


def readers() -> list[LogReader]:
    """Returns all readers, by heading."""
    import_all(__package__ or "")
    return [reader for _, reader in sorted(_READERS.items())]


def facts(rows: Rows) -> dict[str, Any]:
    """Returns what all readers tell report.json."""
    return {key: value for reader in readers() for key, value in reader.facts(rows).items()}


def counts() -> tuple[str, ...]:
    """Returns the names of all readers' `counts`."""
    return tuple(name for reader in readers() for name in reader.counts)


def remarks(rows: Rows) -> list[str]:
    """Returns the remarks of all readers."""
    return [line for reader in readers() for line in reader.remarks(rows)]


def sections(rows: Rows) -> list[str]:
    """Returns what all readers add to report.md."""
    return [text for reader in readers() for text in reader.sections(rows)]


def figures(rows: Rows) -> tuple[dict[str, Callable[[Path], object]], list[str]]:
    """Returns (name -> what writes the figure, names of figures that earlier rows may have given and these do not)."""
    drawn = {name: draw for reader in readers() for name, draw in reader.figures(rows).items()}
    return drawn, [name for reader in readers() for name in reader.files if name not in drawn]
