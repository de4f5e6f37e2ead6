"""Mamba and Mamba-2 language models of transformers and of state-spaces/mamba, in and out of our names.

One table, made from the config, says of which of our arrays each foreign one is made, and how; both directions and the
report read it. A source is a layout of names and of `config.json`:

    hf-mamba    transformers, MambaForCausalLM
    hf-mamba2   transformers, Mamba2ForCausalLM
    mamba-ssm   state-spaces/mamba, MambaLMHeadModel, either kind
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from research.interop.array_tables import Entry, Report, fill_model, to_foreign_arrays
from research.interop.foreign_configs import check_arrays
from research.interop.mamba_configs import config_from_foreign, config_to_foreign
from research.models.sequence import SequenceConfig
from research.modules.state import Arrays

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
            table.append(
                Entry(f"{foreign}.mixer.{name}", tuple(f"{ours}/mixer/{part}" for part in parts), layout, (index,))
            )
        table.append(Entry(f"{foreign}.norm.weight", (f"{ours}/norm/scale",), "same", (index,)))
    table.append(Entry("backbone.norm_f.weight", ("norm/scale",), "same"))
    return table if config.tie_embeddings else [*table, Entry(HEAD, ("head",), "out")]


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
      UserError: as `config_from_foreign`; or arrays that are missing, unknown or of another shape; or an output head
        beside the embedding that differs from it where the config calls the two tied.
    """
    config = config_from_foreign(source, data, length=length)
    check_arrays(source, config.depth, len(state))
    repeats = {HEAD: embedding_name(source)} if config.tie_embeddings else {}
    return (config, *fill_model(source, config, entries(source, config), state, repeats=repeats, dtype=dtype))


def to_foreign(
    target: str, config: SequenceConfig, params: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The inverse of `from_foreign`: (content of config.json, state dict).

    A tied model has its output head among the arrays only for mamba-ssm, whose class wants it there.

    Raises:
      UserError: as `config_to_foreign`.
    """
    data, state = config_to_foreign(target, config), to_foreign_arrays(entries(target, config), params)
    if config.tie_embeddings and target == "mamba-ssm":
        state[HEAD] = state[embedding_name(target)]
    return data, state
