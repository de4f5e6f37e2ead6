"""The methods by name. Each registers itself in its own file; all files of `research/methods/` are imported when one is
first asked for."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from research.errors import Unregistered, UserError, near_names
from research.plugins import import_all
from research.train.method import Method
from research.values import made_of

M = TypeVar("M", bound=type[Method])
_METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[M], M]:
    """Makes a method known by its name, in `config.methods` and `config.method.NAME`."""

    def add(method: M) -> M:
        if name in _METHODS:
            raise UserError(f"method {name} is registered twice; give yours another name")
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no name of a method: letters, digits and _")
        method.name = name
        _METHODS[name] = method
        return method

    return add


def known() -> dict[str, type[Method]]:
    """Returns all methods by name, sorted."""
    import_all("research.methods")
    return dict(sorted(_METHODS.items()))


def find(name: str, where: str = "methods") -> type[Method]:
    """Returns a method's class.

    Raises:
      UserError: no method has this name.
    """
    methods = known()
    if name not in methods:
        near = near_names(name, methods)
        raise Unregistered(f"{where}: unknown method {name!r}; near: {', '.join(near)} (all: {', '.join(methods)})")
    return methods[name]


def make(name: str, options: Mapping[str, Any]) -> Method:
    """Returns a method with its options.

    Raises:
      UserError: an unknown method or option, or a value of another type or out of range.
    """
    return made_of(find(name), options, f"method.{name}.", name)
