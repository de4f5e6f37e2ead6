"""The fields of a run's config with their defaults, and what is checked before anything starts.

A recipe in configs/ starts from `base_config()` and changes what it needs; a field that is not here is an error.
"""

import dataclasses
import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from research.errors import UserError
from research.optim import fields as optim_fields
from research.train.fields import FIELDS
from research.train.upgrade import MOVED, upgraded
from research.values import fit

CONTRASTIVE = {"loss": "mnr_plus", "temperature": 1.0, "normalize": False}
"""Of pairs of texts: mnr, symmetric or mnr_plus, what products are divided by, whether vectors are scaled to length 1
before them."""


def base_config() -> ml_collections.ConfigDict:
    """Returns every field of a run with its default."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "learner": {"name": "supervised", "options": {}},  # see research/train/learner_registry.py
            "model": {"name": "unireplknet_a"},
            "data": {
                "name": "digits",
                "dir": "",
                "validation_fraction": 0.1,
                "batch_size": 128,
                "augment": {},
                "options": {},
                "stall_s": 600.0,  # a batch that takes longer ends the run; 0: wait for ever
            },
            "task": {
                "name": "",  # by default the task of the data's examples
                "options": {},  # of a task of one's own
                "label_smoothing": 0.0,
                "mixup": 0.0,
                "cutmix": 0.0,
                "switch": 0.5,
                "metric": "",
                "contrastive": dict(CONTRASTIVE),
                "local_counting": 0.0,
            },
            "methods": (),  # of training, in order, see research/methods/
            "method": {},  # options of methods by name
            "nested": {
                "points": {},
                "reduce": "mean",  # mean or sum of the losses of an update's sub-networks
                "sort_importance": False,  # permute channels by importance before the first step (needs init_from)
                "execution": "sliced",  # one after the other on all devices; parallel: on different devices
                "tensor_shards": 1,  # parts from each of which a leading slice is taken
            },
            "optim": optim_fields.defaults(),
            "train": {
                "duration": "10ep",
                "accumulate": 1,
                "precision": "float32",
                "remat": "none",
                "nan": "stop",  # stop or skip
                "log_every": "2%",
                "norms": False,  # log norms of gradients and parameters by the roles of their axes
                "profile": "",  # START:COUNT, updates whose profiler trace goes to WORKDIR/profile
                "init_from": "",
            },
            "eval": {
                "every": "20%",
                "subnets": "full",
                "batch_size": 500,
                "calibrate_batches": 8,
                "stop_at": None,  # end the run when the full network's validation metric is this good
            },
            "checkpoint": {"every": "25%", "keep_last": 2, "keep_every": 0, "keep_best": True},
            "mesh": {
                "data": -1,
                "fsdp": 1,
                "tensor": 1,
                "expert": 1,
                "context": 1,
                "across": "data",
                "min_size": 2**14,
            },
            "report": {
                "latency": True,
                "latency_batches": (1, 32),
                "test": True,
                "chosen": "",  # what was chosen for this recipe, and on which split: a line of its results' pages
                "sample": "",  # launch.train ends with a text that the language model writes from here
            },
            "expect": {},
        }
    )


FREE = ("learner.options", "model", "data.augment", "data.options", "task.options", "method", "nested.points", "expect")
"""Sub-trees whose fields are checked by whoever reads them."""
NAME = r"[A-Za-z0-9_][A-Za-z0-9_+=-]{0,79}"
"""Names of sub-networks, which are names of files too; a config has no dots in them."""


def check(config: ml_collections.ConfigDict) -> None:
    """Judges every field by its type, range and choices (research/train/fields.py).

    Raises:
      UserError: an unknown or missing field, or a value that is none of its field's.
    """
    given = config.to_dict()
    _compare(given, base_config().to_dict(), "")
    for name, field in FIELDS.items():
        fit(value_of(given, name), field.kind, f"config.{name}", field.rule)
    for name in FREE:
        fit(value_of(given, name), dict, f"config.{name}")
    fit(given["model"].get("name"), str, "config.model.name")
    for name, choices in given["nested"]["points"].items():
        fit(name, str, "a name in config.nested.points")
        fit(choices, str | dict, f"config.nested.points.{name}")
    for name, bound in given["expect"].items():
        fit(bound, float | tuple[float | None, float | None], f"config.expect.{name}")


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


def _compare(given: dict[str, Any], known: dict[str, Any], prefix: str) -> None:
    for key, value in given.items():
        name = prefix + key
        if key not in known:
            refuse_moved(name)
            near = difflib.get_close_matches(str(key), known, n=3, cutoff=0.4) or sorted(known)
            raise UserError(f"unknown config field {name!r}; near: {', '.join(prefix + n for n in near)}")
        if isinstance(known[key], dict) and name not in FREE:
            _compare(fit(value, dict, f"config.{name}"), known[key], name + ".")
    if missing := [key for key in known if key not in given]:
        section = prefix.rstrip(".")
        raise UserError(
            f"config.{prefix}{missing[0]} is missing; change a group by config.{section}.update(...), which keeps "
            "its other fields"
        )


def resolved(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the config as plain JSON types, with the optimizer's, the learner's and the methods' own values where the
    recipe leaves them open; options of methods that are not in use are left out.

    Raises:
      UserError: an unknown learner or method, or option of one.
    """
    given = config.to_dict()
    filled = {**given, "optim": optim_fields.resolve(given["optim"]), "method": _options(given)}
    filled["learner"] = _learner(given)
    return _plain(filled)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(values, default=list))
    return plain


def _learner(given: Mapping[str, Any]) -> dict[str, Any]:
    from research.train.learner_registry import options_of

    return _plain({"name": given["learner"]["name"], "options": dataclasses.asdict(options_of(given))})


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
"""Fields that may differ when a run goes on in its workdir: they do not change the numbers."""


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
    return {**filled, "optim": optim_fields.stored(filled["optim"])}


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
