"""The registry: names of published and small models, how to build them, where they come from.

A family registers its models in its own file; all files of this package are imported when a name is first asked for.
"""

import dataclasses
import difflib
import fnmatch
import functools
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from research.errors import Unregistered, UserError
from research.files import printable
from research.models.base import ModelConfig
from research.modules.renamed import Renamed, refuse_former
from research.modules.state import abstract
from research.plugins import import_all
from research.values import fit, not_negative


@dataclasses.dataclass(frozen=True)
class Entry:
    """One named model.

    Attributes:
      paper: where it was published, e.g. "arXiv 2311.15599".
      source: where its reference implementation or weights are.
      tiny: config overrides that give a shrunken twin with every kind of layer, for tests.
      counts: published number of parameters at the default number of classes, None where there is none.
    """

    name: str
    config: ModelConfig
    paper: str
    source: str
    tiny: dict[str, Any]
    counts: int | None = None


LARGEST = 2**24
"""Largest whole number that a field of a model takes: far above all sizes, and below those that are only found out when
arrays are made."""
_ENTRIES: dict[str, Entry] = {}


def register(entry: Entry) -> None:
    """Adds a model; names are unique."""
    if entry.name in _ENTRIES:
        raise ValueError(f"model {entry.name} is registered twice")
    _ENTRIES[entry.name] = entry


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names that match a shell pattern, sorted."""
    import_all(__package__)
    return sorted(fnmatch.filter(_ENTRIES, pattern))


def entry(name: str) -> Entry:
    """Returns the registry's entry.

    Raises:
      UserError: no model has this name.
    """
    import_all(__package__)
    if name not in _ENTRIES:
        near = difflib.get_close_matches(name, _ENTRIES, n=5, cutoff=0.4) or list_models()
        raise Unregistered(f"unknown model {name!r}; near: {', '.join(near)} (all: python -m launch.models)")
    return _ENTRIES[name]


def model_config(name: str, **overrides) -> Any:
    """Returns the config of a named model with some of its fields replaced.

    Raises:
      UserError: unknown model or field, or a value that the model refuses.
    """
    config = entry(name).config
    fields = _known_fields(config, name, overrides)
    for field, sources in config.derived.items():
        if not overrides.keys().isdisjoint(sources):
            overrides.setdefault(field, fields[field].default)
    return replaced(config, name, overrides)


def check_fields(name: str, fields: Mapping[str, Any]) -> None:
    """Judges fields of a named model each by itself, by name, type and range; whether they fit together shows when the
    model is built.

    Raises:
      UserError: unknown model or field, or a value of another type or out of range.
    """
    config = entry(name).config
    _known_fields(config, name, fields)
    _fitted(config, name, fields, "model.")


def _known_fields(config: Any, name: str, given: Iterable[str]) -> dict[str, Any]:
    """Returns the fields of a model's config; each of those that are given must be one of them."""
    fields = {f.name: f for f in dataclasses.fields(config)}
    refuse_former(type(config), given, "model.")
    for field in given:
        if field not in fields:
            near = difflib.get_close_matches(field, fields, n=3, cutoff=0.4) or sorted(fields)[:8]
            raise Unregistered(f"model {name} has no field {field!r}; near: {', '.join(near)}")
    return fields


def replaced(config: Any, name: str, fields: dict[str, Any], where: str = "model.") -> Any:
    """Returns the dataclass with some fields replaced; a dictionary replaces fields of a dataclass inside.

    A field that is a model itself takes the name of one, or a dictionary with `name` and fields of it.

    Raises:
      UserError: a field that the inner dataclass does not have, or a value of another type than its annotation.
    """
    values = _fitted(config, name, fields, where)
    try:
        return dataclasses.replace(config, **values)
    except WRONG as error:
        raise _unfit(name, where, fields, error) from None


def _fitted(config: Any, name: str, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the values that fields get, each of the type of its annotation."""
    values, kinds = {}, typing.get_type_hints(type(config), include_extras=True)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for field, value in fields.items():
        inner = vars(config)[field]
        if kinds[field] is ModelConfig and not isinstance(value, ModelConfig):
            value = {"name": value} if isinstance(value, str) else fit(value, dict, f"{where}{field}")
        if kinds[field] is ModelConfig and isinstance(value, Mapping) and "name" in value:
            own = fit(value["name"], str, f"{where}{field}.name")
            values[field] = model_config(own, **{k: v for k, v in value.items() if k != "name"})
        elif isinstance(value, ModelConfig):
            values[field] = value
        elif dataclasses.is_dataclass(inner) and not isinstance(value, type(inner)):
            value = fit(value, dict, f"{where}{field}")
            if isinstance(inner, Renamed):
                refuse_former(type(inner), value, f"{where}{field}.")
            valid = [f.name for f in dataclasses.fields(inner)]
            unknown = sorted(set(value) - set(valid))
            if unknown:
                former = f"; a former name of one stands in {type(inner).__name__}.renamed"
                raise Unregistered(f"model {name} has no field {field}.{unknown[0]}; valid: {', '.join(valid)}{former}")
            values[field] = replaced(inner, name, value, f"{where}{field}.")
        else:
            values[field] = fit(
                value, kinds[field], f"{where}{field}", not_negative(defaults[field], kinds[field], LARGEST)
            )
    return values


WRONG = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, AssertionError)
"""What building a model from sizes that do not fit may raise where no check of the family was before it."""


def _unfit(name: str, where: str, fields: Mapping[str, Any], error: Exception) -> UserError:
    told = printable((str(error).strip().splitlines() or [""])[0], 500)
    cause = told if isinstance(error, ValueError) else f"{type(error).__name__}: {told}"
    given = printable(", ".join(f"{where}{k}={v!r}" for k, v in fields.items()), 200)
    return UserError(f"model {name} cannot be built: {cause}; given: {given}")


def check_buildable(config: Any, name: str, fields: Mapping[str, Any]) -> None:
    """Judges a model by the shapes of its arrays.

    Args:
      fields: those that were given, for the message.

    Raises:
      UserError: it cannot be built, has an array without an entry, or a part that does not keep its contract.
    """
    config.check_parts()
    try:
        shapes = abstract(config)
    except WRONG as error:
        raise _unfit(name, "model.", fields, error) from None
    if empty := [key for key, array in {**shapes.params, **shapes.stats}.items() if 0 in array.shape]:
        raise _unfit(name, "model.", fields, ValueError(f"{empty[0]} would have no entry"))


@functools.lru_cache
def model_info(name: str) -> dict[str, Any]:
    """Returns name, family, params, those that a token meets, stats, input shape, paper and source of a named model; no
    arrays are made."""
    e = entry(name)
    shapes = abstract(e.config)
    return {
        "name": name,
        "family": e.config.family,
        "params": shapes.num_params(),
        "active_params": e.config.active_params(),
        "stats": shapes.num_stats(),
        "input": e.config.input_shape(),
        "elastic": tuple(e.config.elastic),
        "paper": e.paper,
        "source": e.source,
    }
