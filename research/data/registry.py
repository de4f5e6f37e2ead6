"""The named data sets. Each registers itself in its own file; all files of this package are imported when a name is
first asked for."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from research.errors import Unregistered
from research.plugins import import_all

Loader = TypeVar("Loader", bound=Callable[..., Any])


@dataclass(frozen=True)
class DataSet:
    """One named data set, or many of which a name tells which: "tfds:" stands for every name that begins so.

    Attributes:
      examples: what an example is: "image" (with a label), "density" (an image with a map), "tokens", "pairs" (of
        texts) or "vectors".
      loader: called with what follows the colon and with options as keywords, whose annotations type them; `data_dir`
        and `seed` where it takes them.
      ready: whether it gives the splits "train", "validation" and "test" by name; otherwise (train, test) or (train,
        validation, test), and validation examples are taken from the training data where there are none.
    """

    name: str
    examples: str
    loader: Callable[..., Any]
    ready: bool


_SETS: dict[str, DataSet] = {}


def register(name: str, examples: str, *, ready: bool = True) -> Callable[[Loader], Loader]:
    """Makes the loader that is decorated known as a data set; see `DataSet`.

    Raises:
      ValueError: another one has this name.
    """

    def known(loader: Loader) -> Loader:
        if name in _SETS:
            raise ValueError(f"data set {name} is registered twice")
        _SETS[name] = DataSet(name, examples, loader, ready)
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
