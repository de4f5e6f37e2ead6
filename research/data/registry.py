"""The named data sets. Each registers itself in its own file; all files of this package are imported when a name is
first asked for."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from research.data.kinds import Kind
from research.errors import Unregistered, UserError
from research.plugins import import_all

Loader = TypeVar("Loader", bound=Callable[..., Any])
Prepare = Callable[[str, Path | None, str | None], str]


@dataclass(frozen=True)
class DataSet:
    """One named data set, or many of which a name tells which: "tfds:" stands for every name that begins so.

    Attributes:
      examples: what an example is, see `research.data.kinds`.
      loader: called with what follows the colon and with options as keywords, whose annotations type them; `data_dir`
        and `seed` where it takes them.
      prepare: puts the files of the data set in place, and returns a sentence that says where they lie; called with
        what follows the colon, else the name, then with a folder of files that are on disk already or None, and the
        folder where to put the result or None for the usual place. None: there is nothing to be prepared.
      ready: whether it gives the splits "train", "validation" and "test" by name; otherwise (train, test) or (train,
        validation, test), and validation examples are taken from the training data where there are none.
    """

    name: str
    examples: Kind
    loader: Callable[..., Any]
    ready: bool
    prepare: Prepare | None = None


_SETS: dict[str, DataSet] = {}


def register(
    name: str, examples: Kind, *, ready: bool = True, prepare: Prepare | None = None
) -> Callable[[Loader], Loader]:
    """Makes the loader that is decorated known as a data set; see `DataSet`.

    Raises:
      ValueError: another one has this name.
      UserError: `examples` is no kind.
    """

    if not isinstance(examples, Kind):
        raise UserError(
            f"data set {name}: examples={examples!r} is no kind; give IMAGE, TOKENS or another of research.data.kinds, "
            "or a Kind of your own"
        )

    def known(loader: Loader) -> Loader:
        if name in _SETS:
            raise ValueError(f"data set {name} is registered twice")
        _SETS[name] = DataSet(name, examples, loader, ready, prepare)
        return loader

    return known


def find(name: str) -> tuple[DataSet, tuple[str, ...]]:
    """Returns the data set of a name and what its loader takes before the options.

    Raises:
      UserError: no data set has this name.
    """
    import_all(__package__ or "")
    head, colon, rest = name.partition(":")
    if head + colon in _SETS:
        return _SETS[head + colon], (rest,) if colon else ()
    valid = sorted(key + "NAME" if key.endswith(":") else key for key in _SETS)
    near = difflib.get_close_matches(name, valid, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise Unregistered(
        f"Unknown data set {name!r}.{hint} Valid: {', '.join(valid)} (tfds: TFDS data sets in array_record format)."
    )


def prepared() -> list[str]:
    """Returns the names of the data sets that something is to be prepared for, in alphabetical order."""
    import_all(__package__ or "")
    return sorted(name for name, known in _SETS.items() if known.prepare)
