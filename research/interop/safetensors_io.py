"""Models as folders: `model.safetensors` (params and stats) and `config.json` (what builds the model), nothing else needed."""

import dataclasses
import difflib
import json
import os
import struct
import typing
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors

from research.errors import UserError
from research.files import MODEL_FILES, printable, read_json, replace_file, whole_folder, write_text
from research.modules.state import Arrays, abstract

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


def load_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors file, mapped from disk and read-only.

    Raises:
      UserError: no such file, a damaged one (the header is validated by the safetensors library), or an unknown dtype.
    """
    path = os.fspath(path)
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
    except (safetensors.SafetensorError, FileNotFoundError, OSError, ValueError) as e:
        raise UserError(f"cannot read {path} as safetensors: {e}") from None
    unknown = {i["dtype"] for i in header.values()} - set(DTYPES)
    if unknown:
        raise UserError(f"{path} holds arrays of type {', '.join(sorted(unknown))}; valid: {', '.join(DTYPES)}")
    bounds = {name: [8 + length + o for o in info["data_offsets"]] for name, info in header.items()}
    return {name: data[slice(*bounds[name])].view(DTYPES[info["dtype"]]).reshape(info["shape"]) for name, info in header.items()}


def save_safetensors(path: str | os.PathLike, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays to a safetensors file, whole or not at all, one after the other: beside them, memory for one is needed.

    Raises:
      UserError: the folder cannot be written.
      TypeError: an array's dtype is none of DTYPES.
    """
    codes = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
    host = {name: np.asarray(a) for name, a in arrays.items()}
    if wrong := [f"{name} is {a.dtype}" for name, a in host.items() if a.dtype not in codes]:
        raise TypeError(f"safetensors holds {', '.join(DTYPES)}: {wrong[0]}")
    names, header, at = sorted(host, key=lambda name: (-host[name].itemsize, name)), {}, 0  # wide ones first: all are aligned
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


def families() -> dict[str, type]:
    """Returns {family: config class} of every family in the registry."""
    from research.models import registry

    return {type(c).family: type(c) for c in (registry.entry(name).config for name in registry.list_models())}


def config_to_json(config: Any) -> dict[str, Any]:
    """Returns a model config as a JSON object with its family under `family`; `config_from_json` is the exact inverse.

    Raises:
      TypeError: a field holds a value that JSON cannot carry.
    """
    out = {"family": type(config).family, **json.loads(json.dumps(dataclasses.asdict(config)))}
    if config_from_json(out) != config:
        raise TypeError(f"{type(config).__name__} does not survive JSON; its fields must be numbers, words, tuples or such dataclasses")
    return out


def config_from_json(data: Mapping[str, Any]) -> Any:
    """Returns the model config that `config_to_json` wrote.

    Raises:
      UserError: unknown family or field, or a value that the model refuses.
    """
    known = families()
    if not isinstance(data, Mapping) or data.get("family") not in known:
        family = data.get("family") if isinstance(data, Mapping) else data
        raise UserError(f"model config with unknown family {str(family)[:80]!r}; valid: {', '.join(sorted(known))}")
    return _build(known[data["family"]], {k: v for k, v in data.items() if k != "family"})


def _build(cls: type, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3, cutoff=0.4) or sorted(fields)
            raise UserError(f"{cls.__name__} has no field {name!r}; near: {', '.join(near)}")
    nested = {n: dataclasses.is_dataclass(hints[n]) and isinstance(v, Mapping) for n, v in values.items()}
    try:
        return cls(**{n: _build(hints[n], v) if nested[n] else _frozen(v) for n, v in values.items()})
    except (TypeError, ValueError) as e:
        raise UserError(f"model config does not build a {cls.__name__}: {e}") from None


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

    An interrupted call leaves the folder as it was, or without config.json, which `load_folder` refuses: never a mixture.

    Args:
      config: model config; stored as `{"model": {"family": ..., ...}, **extra}`, and with the weights, which it binds.
      extra: JSON values that say where the model comes from.
      texts: name -> text of further files of `BESIDE`.

    Raises:
      UserError: the folder cannot be written.
    """
    model = config_to_json(config)
    arrays = {f"params/{k}": v for k, v in params.items()} | {f"stats/{k}": v for k, v in stats.items()}
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
            f"{folder} is not a model folder; one holds {WEIGHTS} and {CONFIG}, as launch.convert and launch.extract write them"
        )
    path, weights = os.path.join(folder, CONFIG), os.path.join(folder, WEIGHTS)
    try:
        data = read_json(path, ("model",))
        config = config_from_json(data["model"])
    except (UserError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is damaged or no model config ({printable(e, 200)})") from None
    arrays = load_safetensors(weights)
    _check_bound(weights, data["model"])
    full = abstract(config)
    expected = {f"params/{k}": v.shape for k, v in full.params.items()} | {f"stats/{k}": v.shape for k, v in full.stats.items()}
    check_names({k: v.shape for k, v in arrays.items()}, expected, weights)
    return config, {k: jnp.asarray(arrays[f"params/{k}"]) for k in full.params}, {k: jnp.asarray(arrays[f"stats/{k}"]) for k in full.stats}


def _check_bound(weights: str, model: Any) -> None:
    """Refuses weights that were written with another config; those of other programs tell none."""
    with safetensors.safe_open(weights, "np") as file:
        told = (file.metadata() or {}).get("model")
    try:
        same = told is None or json.loads(told) == model
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise UserError(f"{weights} was written with another config than the {CONFIG} beside it; write or copy both together")


def check_names(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises UserError unless both hold the same names with the same shapes."""
    problems = [f"{k} is missing" for k in expected if k not in found] + [f"{k} is unknown" for k in found if k not in expected]
    problems += [f"{k} is {found[k]}, needs {expected[k]}" for k in expected if k in found and found[k] != expected[k]]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{where} does not fit its config: {'; '.join(problems[:3])}{more}")
