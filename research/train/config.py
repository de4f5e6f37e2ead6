"""The fields of a run's config with their defaults, and what is checked before anything starts.

A recipe in configs/ starts from `base_config()` and changes what it needs; a field that is not here is an error.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from research.errors import UserError
from research.optim import section as optim
from research.sections import defaults, read
from research.train.sections import FREE, LearnerSection, RunConfig
from research.train.upgrade import MOVED, upgraded


def base_config() -> ml_collections.ConfigDict:
    """Returns every field of a run with its default; what each means stands in research/train/sections.py and the
    sections that it names."""
    return ml_collections.ConfigDict(defaults(RunConfig))


def check(config: ml_collections.ConfigDict) -> None:
    """Judges every field by its type, range and choices.

    Raises:
      UserError: an unknown or missing field, or a value that is none of its field's.
    """
    given = config.to_dict()
    _refuse_moved_within(given, "")
    RunConfig.of(given)


def value_of(config: Mapping[str, Any], name: str) -> Any:
    """Returns the value of a dotted field."""
    value: Any = config
    for key in name.split("."):
        value = value[key]
    return value


def refuse_moved(name: str) -> None:
    """Raises UserError for a field that has another name today, with that name."""
    for former, today in MOVED.items():
        if name == former or name.startswith(f"{former}."):
            raise UserError(f"config.{name} is said otherwise now: {today}")


def _refuse_moved_within(given: Mapping[str, Any], prefix: str) -> None:
    for name, value in given.items():
        refuse_moved(f"{prefix}{name}")
        if isinstance(value, Mapping) and prefix + name not in FREE:
            _refuse_moved_within(value, f"{prefix}{name}.")


def resolved(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the config as plain JSON types, with the optimizer's, the learner's and the methods' own values where the
    recipe leaves them open; options of methods that are not in use are left out.

    Raises:
      UserError: an unknown learner or method, or option of one.
    """
    given = config.to_dict()
    filled = {**given, "optim": optim.resolve(given["optim"]), "method": _options(given)}
    filled["learner"] = _learner(given)
    return _plain(filled)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(values, default=list))
    return plain


def _learner(given: Mapping[str, Any]) -> dict[str, Any]:
    from research.train.learner_registry import options_of

    section = read(LearnerSection, given["learner"], "config.learner")
    return _plain({"name": section.name, "options": dataclasses.asdict(options_of(section))})


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    from research.train.method_registry import make

    return {name: dataclasses.asdict(make(name, given["method"].get(name, {}))) for name in given["methods"]}


RESUMABLE = (
    "mesh",
    "data.stall_s",
    "train.log_every",
    "train.norms",
    "train.profile",
    "checkpoint",
    "report",
    "expect",
    "eval.batch_size",
)
"""Fields that may differ when a run continues in its workdir: they do not change the numbers."""


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config in which fields that an older version did not have yet are there, with their defaults."""

    def fill(given: dict[str, Any], known: dict[str, Any], prefix: str) -> dict[str, Any]:
        if prefix.removesuffix(".") in FREE or not isinstance(given, dict):
            return given  # what is no group is for `check` to refuse
        inner = {
            k: fill(given[k], v, f"{prefix}{k}.") if isinstance(v, dict) else given[k]
            for k, v in known.items()
            if k in given
        }
        return {**known, **given, **inner}

    filled = fill(upgraded(config), resolved(base_config()), "")
    if isinstance(filled["method"], dict):
        filled["method"] = json.loads(json.dumps(_options(filled)))  # lists, as files have them
    filled["learner"] = _learner(filled) if isinstance(filled["learner"], dict) else filled["learner"]
    return {**filled, "optim": optim.stored(filled["optim"])}


def _trained_by(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config without the methods that change the report alone."""
    from research.train.method_registry import find

    kept = [name for name in config["methods"] if not find(name).reports]
    return {**config, "methods": kept, "method": {name: config["method"].get(name, {}) for name in kept}}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "", ignored: Collection[str] = ()) -> list[str]:
    """Returns `field: old -> new` for every field that differs and may not; those in `ignored` may."""
    out = []
    if not prefix:
        old, new = _trained_by(old), _trained_by(new)
    for key in sorted(set(old) | set(new)):
        name = prefix + key
        if name in RESUMABLE or name in ignored:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, name + ".", ignored)
        elif a != b:
            out.append(f"{name}: {a!r} -> {b!r}")
    return out
