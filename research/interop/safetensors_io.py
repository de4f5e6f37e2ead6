"""Models as folders: `model.safetensors` (params and stats) and `config.json` (what builds the model), nothing else
needed."""

import dataclasses
import json
import math
import os
import struct
import typing
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors

from research.errors import Unregistered, UserError, near_names
from research.files import MODEL_FILES, check_regular, printable, read_json, replace_file, whole_folder, write_text
from research.interop.array_values import check_values
from research.models.base import ModelConfig
from research.modules.renamed import with_present_names
from research.modules.state import Arrays, abstract
from research.values import fit, not_negative

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MODEL_NAMES = (*MODEL_FILES, "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
"""Patterns of the files of a model, of any layout, which another one in the same folder takes the place of."""
BESIDE = ("tokenizer.json", "report.json")
"""Files that tell more of a model of ours."""

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


MOST_AXES = 32
"""Of an array: more are no weights, and NumPy has no more than 64."""


def load_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors file, mapped from disk and read-only.

    Raises:
      UserError: no such file, a damaged one (the header is validated by the safetensors library), an unknown dtype, or
        too many axes.
    """
    path = os.fspath(path)
    check_regular(path)
    try:
        with safetensors.safe_open(path, "np"):  # validates lengths, offsets and overlaps
            pass
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        if not header:
            return {}
        data = np.memmap(path, np.uint8, "r") if os.path.getsize(path) > 8 + length else np.zeros(8 + length, np.uint8)
        return {name: _array(path, name, info, data, 8 + length) for name, info in header.items()}
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as e:
        raise UserError(f"cannot read {printable(path, 300)} as safetensors: {printable(e, 160)}") from None


def _array(path: str, name: str, info: Mapping[str, Any], data: np.ndarray, start: int) -> np.ndarray:
    where = f"{printable(path, 300)}: {printable(name)}"
    if info["dtype"] not in DTYPES:
        raise UserError(f"{where} is of type {printable(info['dtype'])}; valid: {', '.join(DTYPES)}")
    if len(info["shape"]) > MOST_AXES:
        raise UserError(f"{where} has {len(info['shape'])} axes; valid: at most {MOST_AXES}")
    first, end = (start + offset for offset in info["data_offsets"])
    return data[first:end].view(DTYPES[info["dtype"]]).reshape(info["shape"])


def save_safetensors(
    path: str | os.PathLike, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays to a safetensors file, whole or not at all, one after the other: beside them, memory for one is
    needed.

    Raises:
      UserError: the folder cannot be written.
      TypeError: an array's dtype is none of DTYPES.
    """
    codes = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
    host = {name: np.asarray(a) for name, a in arrays.items()}
    if wrong := [f"{name} is {a.dtype}" for name, a in host.items() if a.dtype not in codes]:
        raise TypeError(f"safetensors holds {', '.join(DTYPES)}: {wrong[0]}")
    names, header, at = (
        sorted(host, key=lambda name: (-host[name].itemsize, name)),
        {},
        0,
    )  # wide ones first: all are aligned
    for name in names:
        a = host[name]
        header[name] = {"dtype": codes[a.dtype], "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
        at += a.nbytes
    text = json.dumps(({"__metadata__": dict(metadata)} if metadata else {}) | header).encode()
    text += b" " * (-len(text) % 8)

    def write(temp: str) -> None:
        with open(temp, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                f.write(np.ascontiguousarray(host[name]).reshape(-1).view(np.uint8).data)

    replace_file(path, write)


LARGEST_FIELD = 2**24
"""Of whole numbers in a model's config: a file of a kilobyte must not ask for more layers than memory holds."""


def families() -> dict[str, type[ModelConfig]]:
    """Returns {family: config class} of every family in the registry."""
    from research.models import registry

    return {type(c).family: type(c) for c in (registry.entry(name).config for name in registry.list_models())}


def config_to_json(config: Any) -> dict[str, Any]:
    """Returns a model config as a JSON object with its family under `family`; `config_from_json` is the exact inverse.

    Raises:
      TypeError: a field holds a value that JSON cannot carry.
    """
    from research.models.base import ModelConfig

    inner = {name: config_to_json(value) for name, value in vars(config).items() if isinstance(value, ModelConfig)}
    out = {"family": type(config).family, **json.loads(json.dumps(dataclasses.asdict(config))), **inner}
    try:
        same = config_from_json(out) == config
    except UserError:
        same = False
    if not same:
        raise TypeError(
            f"{type(config).__name__} does not survive JSON; its fields must be numbers, words, "
            "tuples or such dataclasses"
        )
    return out


def config_from_json(data: Mapping[str, Any], most_entry: int = LARGEST_FIELD) -> Any:
    """Returns the model config that `config_to_json` wrote, also that of an earlier version.

    Args:
      most_entry: the largest whole number in a list, where layers and channels of stages stand.

    Raises:
      UserError: unknown family or field, or a value that the model refuses.
    """
    known = families()
    if not isinstance(data, Mapping) or not isinstance(data.get("family"), str) or data["family"] not in known:
        family = data.get("family") if isinstance(data, Mapping) else data
        raise Unregistered(f"model config with unknown family {printable(family)!r}; valid: {', '.join(sorted(known))}")
    kind = known[data["family"]]
    return _build(kind, with_present_names(kind, {k: v for k, v in data.items() if k != "family"}), most_entry)


def _build(cls: type, values: Mapping[str, Any], most_entry: int) -> Any:
    from research.models.base import ModelConfig

    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    for name in values:
        if name not in fields:
            near = near_names(name, fields)
            raise Unregistered(f"{cls.__name__} has no field {printable(name)!r}; near: {', '.join(near)}")
    models = {n: config_from_json(v, most_entry) for n, v in values.items() if hints[n] is ModelConfig}
    nested = {n: dataclasses.is_dataclass(hints[n]) and isinstance(v, Mapping) for n, v in values.items()}
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    try:
        return cls(
            **{
                n: _build(hints[n], v, most_entry)
                if nested[n]
                else _checked(f"{cls.__name__}.{n}", v, hints[n], defaults[n], most_entry)
                for n, v in values.items()
                if n not in models
            },
            **models,
        )
    except (TypeError, ValueError, OverflowError) as e:
        raise UserError(f"model config does not build a {cls.__name__}: {printable(e, 160)}") from None


def _checked(where: str, value: Any, kind: Any, default: Any, most_entry: int) -> Any:
    """The value of a field as its annotation wants it; bounds, which are tuples, may be infinite."""
    rule = not_negative(default, kind)
    finite = [0.0 if entry in (math.inf, -math.inf) else entry for entry in value] if isinstance(value, list) else value
    fit(
        finite,
        kind,
        where,
        rule
        if rule.most is None
        else dataclasses.replace(rule, most=most_entry if isinstance(value, list) else LARGEST_FIELD),
    )
    return _frozen(value)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def save_folder(
    folder: str | os.PathLike,
    config: Any,
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes a model as `folder/model.safetensors` and `folder/config.json`, in place of any model that lies there.

    An interrupted call leaves the folder as it was, or without config.json, which `load_folder` refuses: never a
    mixture.

    Args:
      config: model config; stored as `{"model": {"family": ..., ...}, **extra}`, and with the weights, which it binds.
      extra: JSON values that say where the model comes from.
      texts: name -> text of further files of `BESIDE`.

    Raises:
      UserError: the folder cannot be written.
    """
    model = config_to_json(config)
    kept = abstract(config).kept_stats()
    arrays = {f"params/{k}": v for k, v in params.items()} | {f"stats/{k}": v for k, v in stats.items() if k in kept}
    with whole_folder(folder, CONFIG, (*MODEL_NAMES, *BESIDE)) as stage:
        save_safetensors(stage / WEIGHTS, arrays, {"format": "nestax", "model": json.dumps(model)})
        for name, text in (texts or {}).items():
            write_text(stage / name, text)
        write_text(stage / CONFIG, json.dumps({"model": model, **(extra or {})}, indent=2) + "\n")


def is_model_folder(folder: str | os.PathLike) -> bool:
    """True when `save_folder` finished writing here."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in (WEIGHTS, CONFIG))


def load_folder(folder: str | os.PathLike) -> tuple[Any, Arrays, Arrays]:
    """Returns (config, params, stats) of a folder written by `save_folder`.

    Raises:
      UserError: the folder is no such folder, or its weights do not fit its config.
    """
    folder = os.fspath(folder)
    if not is_model_folder(folder):
        raise UserError(
            f"{folder} is not a model folder; one holds {WEIGHTS} and {CONFIG}, "
            "as launch.convert and launch.extract write them"
        )
    path, weights = os.path.join(folder, CONFIG), os.path.join(folder, WEIGHTS)
    data = read_json(path, ("model",), "it is no model config")["model"]
    arrays = load_safetensors(weights)
    try:  # no stage has more layers, or more channels, than there are arrays, or than an axis of one is long
        config = config_from_json(
            data, max(2**10, len(arrays), *(size for w in arrays.values() for size in w.shape), 0)
        )
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    _check_bound(weights, data)
    full = abstract(config)
    kept = full.kept_stats()
    sums = {k: s for k, s in full.stats.items() if k not in kept}
    arrays = {k: v for k, v in arrays.items() if k.removeprefix("stats/") not in sums}
    held = {f"params/{k}": s for k, s in full.params.items()} | {f"stats/{k}": s for k, s in kept.items()}
    check_names({k: v.shape for k, v in arrays.items()}, {k: s.shape for k, s in held.items()}, weights)
    check_values(weights, arrays, {k: s.dtype for k, s in held.items()})
    stats = {
        k: jnp.zeros(s.shape, s.dtype) if k in sums else jnp.asarray(arrays[f"stats/{k}"])
        for k, s in full.stats.items()
    }
    return config, {k: jnp.asarray(arrays[f"params/{k}"]) for k in full.params}, stats


def _check_bound(weights: str, model: Any) -> None:
    """Refuses weights that were written with another config; those of other programs tell none."""
    with safetensors.safe_open(weights, "np") as file:
        told = (file.metadata() or {}).get("model")
    try:
        same = told is None or json.loads(told) == model
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise UserError(
            f"{weights} was written with another config than the {CONFIG} beside it; write or copy both together"
        )


def check_names(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises UserError unless both hold the same names with the same shapes."""
    problems = [f"{k} is missing" for k in expected if k not in found] + [
        f"{printable(k)} is unknown" for k in found if k not in expected
    ]
    problems += [f"{k} is {found[k]}, needs {expected[k]}" for k in expected if k in found and found[k] != expected[k]]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{where} does not fit its config: {'; '.join(problems[:3])}{more}")
