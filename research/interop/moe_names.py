"""Mixtral and Qwen3-MoE language models of transformers, in and out of our names.

A source is a layout of names and of `config.json`:

    hf-mixtral     MixtralForCausalLM
    hf-qwen3-moe   Qwen3MoeForCausalLM

Published files hold every expert's products apart. Models of transformers 5 hold those of a layer's experts in two
arrays, gate above up; it converts when it reads and writes files. Both are read, the published one is written.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from research.interop.array_tables import Entry, Report, fill_model, to_foreign_arrays
from research.interop.foreign_configs import check_arrays
from research.interop.moe_configs import config_from_foreign, config_to_foreign
from research.models.sequence import SequenceConfig
from research.models.sequence_layers import MIXTURE
from research.modules.mixers.attention import Attention
from research.modules.state import Arrays

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ATTENTION = {
    "q_proj": ("query", "linear"),
    "k_proj": ("key", "linear"),
    "v_proj": ("value", "linear"),
    "o_proj": ("out", "out"),
}
QK_NORMS = {"q_norm": "query_norm/scale", "k_norm": "key_norm/scale"}
DENSE = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
EXPERTS = {
    "hf-mixtral": ("block_sparse_moe", {"w1": "gate", "w2": "down", "w3": "up"}),
    "hf-qwen3-moe": ("mlp", DENSE),
}
"""Source -> (where a published layer holds its mixture; foreign product of an expert -> ours)."""
FUSED = ".mlp.experts.gate_up_proj"


def entries(source: str, config: SequenceConfig, *, fused: bool = False) -> list[Entry]:
    """Returns every array of the model under both names, in the order of the foreign state dict.

    Args:
      fused: as models of transformers 5 hold their experts, not as published files do.
    """
    table, period = [Entry(EMBEDDING, ("embedding/table",), "same")], len(config.period)
    layers = [_layer(source, config, *parts, fused) for parts in config.period]
    for layer in range(config.depth):
        index, place = divmod(layer, period)
        for entry in layers[place]:
            ours = tuple(f"blocks/layer/layers/{place}/{name}" for name in entry.ours)
            table.append(Entry(f"model.layers.{layer}.{entry.foreign}", ours, entry.layout, (index, *entry.index)))
    table.append(Entry("model.norm.weight", ("norm/scale",), "same"))
    return table if config.tie_embeddings else [*table, Entry(HEAD, ("head",), "out")]


def _layer(source: str, config: SequenceConfig, kind: str, ffn: str, fused: bool) -> list[Entry]:
    """The entries of one layer, by names within it."""
    spec = config.options(kind)
    norms = QK_NORMS if isinstance(spec, Attention) and spec.qk_norm else {}
    return [
        *(Entry(f"self_attn.{name}.weight", (f"mixer/{own}",), layout) for name, (own, layout) in ATTENTION.items()),
        *(Entry(f"self_attn.{name}.weight", (f"mixer/{own}",), "same") for name, own in norms.items()),
        Entry("input_layernorm.weight", ("norm/scale",), "same"),
        Entry("post_attention_layernorm.weight", ("ffn_norm/scale",), "same"),
        *(_mixture(source, config.moe.num_experts, fused) if ffn == MIXTURE else _products("mlp", DENSE)),
    ]


def _products(place: str, names: Mapping[str, str], index: tuple[int, ...] = ()) -> list[Entry]:
    return [Entry(f"{place}.{name}.weight", (f"ffn/{own}",), "linear", index) for name, own in names.items()]


def _mixture(source: str, count: int, fused: bool) -> list[Entry]:
    place, names = ("mlp", {}) if fused else EXPERTS[source]
    router = Entry(f"{place}.gate.weight", ("ffn/router",), "linear")
    if fused:
        together = {"gate_up_proj": ("ffn/gate", "ffn/up"), "down_proj": ("ffn/down",)}
        return [router, *(Entry(f"mlp.experts.{name}", own, "experts") for name, own in together.items())]
    return [router, *(entry for j in range(count) for entry in _products(f"{place}.experts.{j}", names, (j,)))]


def from_foreign(
    source: str, data: Mapping[str, Any], state: Mapping[str, np.ndarray], *, length: int = 0, dtype: Any = np.float32
) -> tuple[SequenceConfig, Arrays, Arrays, Report]:
    """Returns (config, params, stats, report) of a foreign `config.json` and state dict.

    Args:
      source: one of SOURCES.
      data: content of `config.json`.
      state: foreign name -> array, experts apart or fused.
      length: as in `config_from_foreign`.
      dtype: of the returned parameters.

    Raises:
      UserError: as `config_from_foreign`; or arrays that are missing, unknown or of another shape; or an output head
        beside the embedding that differs from it where the config calls the two tied.
    """
    config = config_from_foreign(source, data, length=length)
    fused = any(name.endswith(FUSED) for name in state)
    layers = sum(config.moe.num_experts if ffn == MIXTURE and not fused else 1 for _, ffn in config.period)
    check_arrays(source, config.periods * layers, len(state))
    table = entries(source, config, fused=fused)
    return (
        config,
        *fill_model(
            source, config, table, state, repeats={HEAD: EMBEDDING} if config.tie_embeddings else {}, dtype=dtype
        ),
    )


def to_foreign(
    target: str, config: SequenceConfig, params: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The inverse of `from_foreign`: (content of config.json, state dict), experts apart as in published files.

    Raises:
      UserError: as `config_to_foreign`.
    """
    return config_to_foreign(target, config), to_foreign_arrays(entries(target, config), params)
