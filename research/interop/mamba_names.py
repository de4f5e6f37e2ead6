"""Mamba and Mamba-2 language models of transformers and of state-spaces/mamba, in and out of our names.

One table, made from the config, says of which of our arrays each foreign one is made, and how; both directions and the
report read it. A source is a layout of names and of `config.json`:

    hf-mamba    transformers, MambaForCausalLM
    hf-mamba2   transformers, Mamba2ForCausalLM
    mamba-ssm   state-spaces/mamba, MambaLMHeadModel, either kind
"""

import collections
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.interop import read_weights
from research.interop.mamba_configs import check_source, config_from_foreign, config_to_foreign
from research.interop.safetensors_io import CONFIG, WEIGHTS, replace_file, save_safetensors
from research.models.sequence import SequenceConfig
from research.modules.state import Arrays, abstract

FILES = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where a folder may hold its weights, in the order in which they are looked for."""

TO_FOREIGN = {
    "same": lambda w: w,
    "flat": lambda w: w.reshape(-1),
    "linear": lambda w: w.reshape(w.shape[0], -1).T,
    "out": lambda w: w.reshape(-1, w.shape[-1]).T,
    "conv": lambda w: w.reshape(w.shape[0], -1).T[:, None],
}
"""Layout -> ours to foreign: as it is; vectors; (in, *outs) and (*ins, out) to (out, in); (taps, *C) to (C, 1, taps)."""

TO_OURS = {
    "same": lambda w, shape: w,
    "flat": lambda w, shape: w.reshape(shape),
    "linear": lambda w, shape: w.T.reshape(shape),
    "out": lambda w, shape: w.T.reshape(shape),
    "conv": lambda w, shape: w[:, 0].T.reshape(shape),
}


class Entry(NamedTuple):
    """A foreign array and ours whose rows follow each other in it: entry `index` of stacked arrays, or all where None."""

    foreign: str
    ours: tuple[str, ...]
    layout: str
    index: int | None = None


@dataclass(frozen=True)
class Report:
    """What fitted and what did not: foreign names that are missing or unknown, and (name, found, expected) shapes.

    `repeated` is the read-out that a file of a tied model holds beside the embedding, bit for bit the same.
    """

    matched: int = 0
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    repeated: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


HEAD = "lm_head.weight"
MIXERS = {
    "mamba": {
        "in_proj.weight": (("x", "z"), "linear"),
        "conv1d.weight": (("ssm/conv/kernel",), "conv"),
        "conv1d.bias": (("ssm/conv/bias",), "flat"),
        "x_proj.weight": (("ssm/dt_down", "ssm/b", "ssm/c"), "linear"),
        "dt_proj.weight": (("ssm/dt_up",), "linear"),
        "dt_proj.bias": (("ssm/dt_bias",), "flat"),
        "A_log": (("ssm/a_log",), "same"),
        "D": (("ssm/skip",), "flat"),
        "out_proj.weight": (("out",), "out"),
    },
    "mamba2": {
        "in_proj.weight": (("z", "x", "b", "c", "dt"), "linear"),
        "conv1d.weight": (("conv_x/kernel", "conv_b/kernel", "conv_c/kernel"), "conv"),
        "conv1d.bias": (("conv_x/bias", "conv_b/bias", "conv_c/bias"), "flat"),
        "dt_bias": (("dt_bias",), "flat"),
        "A_log": (("a_log",), "flat"),
        "D": (("skip",), "flat"),
        "norm.weight": (("norm/scale",), "flat"),
        "out_proj.weight": (("out",), "out"),
    },
}
"""Kind of mixer -> foreign name -> (ours, in the order of the rows; layout)."""


def embedding_name(source: str) -> str:
    """The same array is called `embedding` in the original code and `embeddings` in transformers."""
    return "backbone.embedding.weight" if source == "mamba-ssm" else "backbone.embeddings.weight"


def entries(source: str, config: SequenceConfig) -> list[Entry]:
    """Returns every array of the model under both names, in the order of the foreign state dict."""
    table = [Entry(embedding_name(source), ("embedding/table",), "same")]
    period = len(config.kinds)
    for layer in range(config.depth):
        index, place = divmod(layer, period)
        foreign, ours = f"backbone.layers.{layer}", f"blocks/layer/layers/{place}"
        for name, (parts, layout) in MIXERS[config.kinds[place]].items():
            table.append(Entry(f"{foreign}.mixer.{name}", tuple(f"{ours}/mixer/{part}" for part in parts), layout, index))
        table.append(Entry(f"{foreign}.norm.weight", (f"{ours}/norm/scale",), "same", index))
    table.append(Entry("backbone.norm_f.weight", ("norm/scale",), "same"))
    return table if config.tied else [*table, Entry(HEAD, ("head",), "out")]


# --- arrays --------------------------------------------------------------------------------------------------------------


def _parts(entry: Entry, shapes: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(our name, shape of one layer of ours, shape of its rows of the foreign array) of an entry."""
    parts = []
    for name in entry.ours:
        shape = tuple(shapes[name].shape)[0 if entry.index is None else 1 :]
        parts.append((name, shape, TO_FOREIGN[entry.layout](np.broadcast_to(np.float32(0), shape)).shape))
    return parts


def _foreign_shape(entry: Entry, shapes: Mapping[str, Any]) -> tuple[int, ...]:
    rows = [foreign for _, _, foreign in _parts(entry, shapes)]
    return (sum(shape[0] for shape in rows), *rows[0][1:])


def match(source: str, config: SequenceConfig, shapes: Mapping[str, Sequence[int]]) -> Report:
    """Compares the names and shapes of a foreign state dict with those of the model."""
    ours, table = abstract(config).params, entries(source, config)
    expected = {entry.foreign: _foreign_shape(entry, ours) for entry in table}
    missing = tuple(name for name in expected if name not in shapes)
    wrong = tuple((n, tuple(shapes[n]), s) for n, s in expected.items() if n in shapes and tuple(shapes[n]) != s)
    repeated = (HEAD,) if config.tied and HEAD in shapes else ()
    unexpected = tuple(name for name in shapes if name not in expected and name not in repeated)
    return Report(len(table) - len(missing) - len(wrong), missing, unexpected, wrong, repeated)


def from_foreign(
    source: str, data: Mapping[str, Any], state: Mapping[str, np.ndarray], *, length: int = 256, dtype: Any = np.float32
) -> tuple[SequenceConfig, Arrays, Arrays, Report]:
    """Returns (config, params, stats, report) of a foreign `config.json` and state dict.

    Args:
      source: one of SOURCES.
      data: content of `config.json`.
      state: foreign name -> array.
      length: as in `config_from_foreign`.
      dtype: of the returned arrays.

    Raises:
      UserError: as `config_from_foreign`; or arrays that are missing, unknown or of another shape; or a read-out beside the
        embedding that differs from it where the config calls the two tied.
    """
    config = config_from_foreign(source, data, length=length)
    report = match(source, config, {name: tuple(w.shape) for name, w in state.items()})
    if report.missing or report.unexpected or report.wrong_shape:
        raise UserError(f"{source}: the weights do not fit their config ({_sizes(config)}): {_unmatched(report)}")
    if report.repeated and not np.array_equal(state[HEAD], state[embedding_name(source)], equal_nan=True):
        raise UserError(f"{source}: the config ties the embedding to {HEAD}, but the file holds two that differ; say that it is not tied")
    full = abstract(config)
    layers: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for entry in entries(source, config):
        whole, at = np.asarray(state[entry.foreign]), 0
        for name, shape, (rows, *_) in _parts(entry, full.params):
            layers[name].append(TO_OURS[entry.layout](whole[at : at + rows], shape).astype(dtype))
            at += rows
    stacked = {name: entry.index is not None for entry in entries(source, config) for name in entry.ours}
    params = {name: jnp.asarray(np.stack(ws) if stacked[name] else ws[0]) for name, ws in layers.items()}
    return config, {name: params[name] for name in full.params}, {}, report


def _sizes(config: SequenceConfig) -> str:
    return f"{config.pattern}, {config.depth} layers of {config.dim} channels, {config.vocab_size} entries"


def _unmatched(report: Report) -> str:
    wrong = [f"{name} is {found}, needs {needed}" for name, found, needed in report.wrong_shape]
    parts = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
             for what, names in (("missing", report.missing), ("unknown", report.unexpected), ("of another shape", wrong)) if names]  # fmt: skip
    return "; ".join(parts)


def to_foreign(target: str, config: SequenceConfig, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The inverse of `from_foreign`: (content of config.json, state dict).

    A tied model has its read-out among the arrays only for mamba-ssm, whose class wants it there.

    Raises:
      UserError: as `config_to_foreign`.
    """
    data, state = config_to_foreign(target, config), {}
    arrays = {name: np.asarray(w) for name, w in params.items()}
    for entry in entries(target, config):
        layers = (arrays[name] if entry.index is None else arrays[name][entry.index] for name in entry.ours)
        state[entry.foreign] = np.concatenate([TO_FOREIGN[entry.layout](w) for w in layers])
    if config.tied and target == "mamba-ssm":
        state[HEAD] = state[embedding_name(target)]
    return data, state


# --- files ---------------------------------------------------------------------------------------------------------------


def load_mamba(source: str, path: str | os.PathLike, *, length: int = 256) -> tuple[SequenceConfig, Arrays, Arrays, Report]:
    """Returns (config, params, stats, report) of a checkpoint on disk: `config.json` beside its weights.

    Args:
      source: one of SOURCES.
      path: the folder, or the file of weights in it: safetensors or pytorch_model.bin, or the index of several of either.
      length: as in `config_from_foreign`.

    Raises:
      UserError: as `from_foreign`, or files that are missing or damaged.
    """
    check_source(source)
    path = os.fspath(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    if path == folder:
        present = [name for name in FILES if os.path.isfile(os.path.join(folder, name))]
        if not present:
            raise UserError(f"{folder} holds no weights; one of {', '.join(FILES)} is looked for")
        path = os.path.join(folder, present[0])
    data = _read_json(os.path.join(folder, CONFIG))
    config_from_foreign(source, data, length=length)  # before the weights, which may be large
    return from_foreign(source, data, _read_state(path), length=length)


def _read_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON: {str(e)[:100]}") from None


def _read_state(path: str) -> dict[str, np.ndarray]:
    if not path.endswith(".index.json"):
        return read_weights(path)
    index = _read_json(path)
    places = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(places, Mapping) or not all(isinstance(name, str) and name == os.path.basename(name) for name in places.values()):
        raise UserError(f"{path} has no weight_map from arrays to files beside it")
    state: dict[str, np.ndarray] = {}
    for name in sorted(set(places.values())):
        state |= read_weights(os.path.join(os.path.dirname(path), name))
    if absent := sorted(set(places) - set(state)):
        raise UserError(f"{path} names arrays that its files do not hold: {', '.join(absent[:3])}")
    return state


def save_mamba(target: str, folder: str | os.PathLike, config: SequenceConfig, params: Mapping[str, Any]) -> None:
    """Writes `folder/model.safetensors` and `folder/config.json`, which `from_pretrained` of transformers reads.

    The original code reads `pytorch_model.bin`: `torch.save(safetensors.torch.load_file("model.safetensors"), "pytorch_model.bin")`.

    Raises:
      UserError: as `config_to_foreign`, or the folder cannot be written.
    """
    data, state = to_foreign(target, config, params)
    folder = os.fspath(folder)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write the folder {folder}: {e.strerror}") from None
    save_safetensors(os.path.join(folder, WEIGHTS), state, {"format": "pt"})
    text = json.dumps(data, indent=2) + "\n"

    def write(temp: str) -> None:
        with open(temp, "w", encoding="utf-8") as f:
            f.write(text)

    replace_file(os.path.join(folder, CONFIG), write)
