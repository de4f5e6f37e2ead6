"""What readers and writers of foreign `config.json`s share: fields that must hold one value, and errors by the name of the field."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from research.errors import UserError


def check_source(source: str, valid: Sequence[str]) -> None:
    """Raises UserError unless the source is one of those that a module reads."""
    if source not in valid:
        raise UserError(f"unknown source {source!r}; valid: {', '.join(valid)}")


def check_object(source: str, data: Any) -> None:
    """Raises UserError unless the content of a config.json is an object of fields."""
    if not isinstance(data, Mapping):
        raise UserError(f"{source}: the config is a {type(data).__name__}, not an object of fields")


def need(source: str, data: Mapping[str, Any], needs: Mapping[str, Any]) -> None:
    """Raises UserError when a field is there and holds another value than the one of `needs`; [] also stands for nothing."""
    for name, value in needs.items():
        given = data.get(name, value)
        if given != value and not (value == [] and not given):
            refuse(source, name, given, json.dumps(value))


def refuse(source: str, name: str, given: Any, valid: str) -> None:
    """Raises the UserError that a field asks for a model that we do not have."""
    raise UserError(f"{source}: {name}={json.dumps(given)} is a model that we do not have; valid: {valid}")


@contextlib.contextmanager
def reading(source: str) -> Iterator[None]:
    """Turns what goes wrong while fields are read into a UserError: an absent field, or one of a wrong type."""
    try:
        yield
    except KeyError as e:
        raise UserError(f"{source}: the config has no field {e.args[0]!r}") from None
    except (TypeError, ValueError, OverflowError) as e:
        raise UserError(f"{source}: the config holds a field of a wrong type: {e}") from None


def no_place(target: str, held: Any, needs: Mapping[str, Any], prefix: str = "") -> None:
    """Raises UserError when a field of a config of ours holds what the foreign class cannot be."""
    for name, needed in needs.items():
        if getattr(held, name) != needed:
            raise UserError(f"{target} has no place for {prefix}{name}={getattr(held, name)!r}; valid: {needed!r}")
