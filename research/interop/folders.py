"""Foreign language models as folders: `config.json` beside weights in one file or in several with an index."""

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from research.errors import UserError
from research.files import MODEL_FILES, printable, whole_folder, write_text
from research.interop import FOLDERS, read_weights
from research.interop.array_values import listed
from research.interop.foreign_configs import check_source, read_object
from research.interop.safetensors_io import CONFIG, MODEL_NAMES, WEIGHTS, save_safetensors

FILES = MODEL_FILES
"""Where a folder may hold its weights, in the order in which they are looked for."""

SHARD = 5_000_000_000
"""Bytes that a file of weights holds at most, unless one array is larger."""


def load(source: str, path: str | os.PathLike, **options: Any) -> tuple[Any, dict, dict, Any]:
    """Returns (config, params, stats, report) of a checkpoint on disk: `config.json` beside its weights.

    Args:
      source: one of FOLDERS.
      path: the folder, or the file of weights in it: safetensors or pytorch_model.bin, or the index of several of
        either.
      options: of the source's `config_from_foreign`, such as `length`.

    Raises:
      UserError: as the source's `from_foreign`, or files that are missing or damaged.
    """
    check_source(source, tuple(FOLDERS))
    names = importlib.import_module(FOLDERS[source])
    path = os.fspath(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    if path == folder:
        present = [name for name in FILES if os.path.lexists(os.path.join(folder, name))]
        if not present:
            raise UserError(f"{folder} holds no weights; one of {', '.join(FILES)} is looked for")
        path = os.path.join(folder, present[0])
    data = read_object(os.path.join(folder, CONFIG))
    names.config_from_foreign(source, data, **options)  # before the weights, which may be large
    return names.from_foreign(source, data, _read_state(path), **options)


def end_of_text(path: str | os.PathLike, vocab_size: int) -> tuple[int, ...]:
    """Returns the tokens that end a text, as `generation_config.json` or else `config.json` of a foreign folder declare
    them; () for none.

    Args:
      path: as for `load`.
      vocab_size: of the model.

    Raises:
      UserError: they are no tokens of the vocabulary.
    """
    path = os.fspath(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    for name in ("generation_config.json", CONFIG):
        file = os.path.join(folder, name)
        data = read_object(file) if os.path.isfile(file) else {}
        declared = data.get("eos_token_id") if isinstance(data, Mapping) else None
        if declared is None:
            continue
        ids = declared if isinstance(declared, list) else [declared]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise UserError(
                f"{file}: eos_token_id={printable(declared)}; valid: tokens in 0..{vocab_size - 1}, or null"
            )
        return tuple(ids)
    return ()


def _read_state(path: str) -> dict[str, np.ndarray]:
    if not path.endswith(".index.json"):
        return read_weights(path)
    index = read_object(path)
    places = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(places, Mapping) or not all(
        isinstance(name, str) and name == os.path.basename(name) for name in places.values()
    ):
        raise UserError(f"{path} has no weight_map from arrays to files beside it")
    state: dict[str, np.ndarray] = {}
    for name in sorted(set(places.values())):
        state |= read_weights(os.path.join(os.path.dirname(path), name))
    if absent := sorted(set(places) - set(state)):
        raise UserError(
            f"{path} names arrays that its files do not hold: {listed([printable(name) for name in absent])}"
        )
    return state


def save(target: str, folder: str | os.PathLike, config: Any, params: Mapping[str, Any]) -> None:
    """Writes weights and `folder/config.json`, which `from_pretrained` of transformers reads; large models in files of
    5 GB.

    They take the place of any model that lies there, whole or not at all.

    The original Mamba code reads `pytorch_model.bin`:
    `torch.save(safetensors.torch.load_file("model.safetensors"), "pytorch_model.bin")`.

    Raises:
      UserError: as the target's `to_foreign`, or the folder cannot be written.
    """
    check_source(target, tuple(FOLDERS))
    data, state = importlib.import_module(FOLDERS[target]).to_foreign(target, config, params)
    with whole_folder(folder, CONFIG, MODEL_NAMES) as stage:
        _save_state(stage, state)
        write_text(stage / CONFIG, json.dumps(data, indent=2) + "\n")


def _save_state(folder: Path, state: Mapping[str, np.ndarray]) -> None:
    shards: list[list[str]] = [[]]
    room = SHARD
    for name, w in state.items():
        if w.nbytes > room and shards[-1]:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= w.nbytes
    if len(shards) == 1:
        save_safetensors(folder / WEIGHTS, state, {"format": "pt"})
        return
    places: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_safetensors(folder / file, {name: state[name] for name in names}, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in state.values())}, "weight_map": places}
    write_text(folder / f"{WEIGHTS}.index.json", json.dumps(index, indent=2) + "\n")
