"""What readers and writers of foreign `config.json`s share: sizes and numbers within bounds, fields that must hold one
value, errors by name.

Nothing is built of a size before it is known to be one: a file of a kilobyte may ask for more layers than memory holds.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from research.errors import UserError
from research.files import printable, read_json
from research.values import Rule, fit

LARGEST_CONFIG = 2**26
"""Bytes of a config.json, or of an index of weights."""
WIDTH, DEPTH, EXPERTS, VOCABULARY, TOKENS = 2**20, 2**14, 2**16, 2**26, 2**31 - 1
"""The largest sizes that are believed: of channels and the like, of layers, of experts, of tokens there are, of tokens
in a row."""


def read_object(path: str | os.PathLike) -> Any:
    """Returns the content of a JSON file of a model's folder.

    Raises:
      UserError: as `research.files.read_json`, or too large for a description.
    """
    if os.path.isfile(path) and os.path.getsize(path) > LARGEST_CONFIG:
        raise UserError(
            f"{path} has {os.path.getsize(path):,} bytes; a description of a model has at most {LARGEST_CONFIG:,}"
        )
    return read_json(path)


def whole(source: str, data: Mapping[str, Any], name: str, high: int = WIDTH, low: int = 1) -> int:
    """Returns a field that holds a whole number in low..high.

    Raises:
      KeyError: there is no such field (`reading` tells it).
      UserError: anything else.
    """
    return fit(
        data[name], int, f"{source}: {name}", Rule(least=low, most=high, says=f"whole numbers from {low} to {high}")
    )


def positive(source: str, data: Mapping[str, Any], name: str, *, zero: bool = False) -> float:
    """Returns a field that holds a finite number above 0, or also 0; errors as `whole`."""
    rule = Rule(least=0, says="finite numbers from 0") if zero else Rule(above=0, says="finite numbers above 0")
    return fit(data[name], float, f"{source}: {name}", rule)


def flag(source: str, data: Mapping[str, Any], name: str) -> bool:
    """Returns a field that holds true or false; errors as `whole`."""
    return fit(data[name], bool, f"{source}: {name}")


def check_arrays(source: str, needed: int, found: int) -> None:
    """Raises UserError when a config asks for so many more arrays than the file holds that they are not even listed."""
    if needed > found:
        raise UserError(
            f"{source}: the weights do not fit their config: it needs {needed:,} arrays or more, "
            f"the file holds {found:,}"
        )


def _shown(value: Any) -> str:
    try:
        return printable(json.dumps(value))
    except (TypeError, ValueError, RecursionError):
        return type(value).__name__


def check_source(source: str, valid: Sequence[str]) -> None:
    """Raises UserError unless the source is one of those that a module reads."""
    if source not in valid:
        raise UserError(f"unknown source {printable(source)!r}; valid: {', '.join(valid)}")


def check_object(source: str, data: Any) -> None:
    """Raises UserError unless the content of a config.json is an object of fields."""
    if not isinstance(data, Mapping):
        raise UserError(f"{source}: the config is a {type(data).__name__}, not an object of fields")


def need(source: str, data: Mapping[str, Any], needs: Mapping[str, Any]) -> None:
    """Raises UserError when a field is there and holds another value than the one of `needs`; [] also stands for
    nothing."""
    for name, value in needs.items():
        given = data.get(name, value)
        if given != value and not (value == [] and not given):
            refuse(source, name, given, json.dumps(value))


def refuse(source: str, name: str, given: Any, valid: str) -> None:
    """Raises the UserError that a field asks for a model that we do not have."""
    raise UserError(f"{source}: {name}={_shown(given)} is a model that we do not have; valid: {valid}")


@contextlib.contextmanager
def reading(source: str) -> Iterator[None]:
    """Turns what goes wrong while fields are read into a UserError: an absent field, or one of a wrong type."""
    try:
        yield
    except KeyError as e:
        raise UserError(f"{source}: the config has no field {e.args[0]!r}") from None
    except (TypeError, ValueError, OverflowError) as e:
        raise UserError(f"{source}: the config holds a field of a wrong type: {printable(e)}") from None


def no_place(target: str, held: Any, needs: Mapping[str, Any], prefix: str = "") -> None:
    """Raises UserError when a field of a config of ours holds what the foreign class cannot be."""
    for name, needed in needs.items():
        if vars(held)[name] != needed:
            raise UserError(f"{target} has no place for {prefix}{name}={vars(held)[name]!r}; valid: {needed!r}")
