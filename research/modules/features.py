"""Features: values inside a model that methods and users may read by name.

A module names a value where it stands, outside of layers that are scanned or run on each device by themselves. Nobody
pays for a name that nobody reads.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar

from jaxtyping import Array

from research.errors import UserError, near_names

_READ: ContextVar[dict[str, Array] | None] = ContextVar("features that are read", default=None)


def named(name: str, x: Array) -> Array:
    """Returns x, which is a feature of this name of the model.

    Raises:
      ValueError: a model that names two.
    """
    found = _READ.get()
    if found is not None:
        if name in found:
            raise ValueError(f"the model has two features {name!r}")
        found[name] = x
    return x


@contextlib.contextmanager
def reading() -> Iterator[dict[str, Array]]:
    """Gives the dictionary that the features of a model which is run inside come into."""
    found: dict[str, Array] = {}
    token = _READ.set(found)
    try:
        yield found
    finally:
        _READ.reset(token)


def chosen(found: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """Returns the features of these names.

    Raises:
      UserError: one that the model does not have.
    """
    for name in names:
        if name not in found:
            near = ", ".join(near_names(name, found)) or "none"
            raise UserError(f"the model has no feature {name!r}; near: {near} (all: {', '.join(found)})")
    return {name: found[name] for name in names}
