"""`config.json` of Mixtral and Qwen3-MoE language models of transformers, of releases 4.x and 5.x, into our config and
back.

What a foreign class can be and ours cannot is refused by the name of its field, and the other way round. Fields that
only initialise, train (dropout, jitter, what the losses report) or say how to compute are passed over.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from research.errors import UserError
from research.files import printable
from research.interop.foreign_configs import (
    DEPTH,
    EXPERTS,
    TOKENS,
    VOCABULARY,
    WIDTH,
    check_object,
    check_source,
    flag,
    need,
    no_place,
    positive,
    reading,
    refuse,
    whole,
)
from research.models.sequence import SequenceConfig
from research.modules.mixers.attention import Attention
from research.modules.mixers.window import Window
from research.modules.moe_options import FAMILIES, Moe

SOURCES = ("hf-mixtral", "hf-qwen3-moe")
MODEL_TYPES = {"hf-mixtral": "mixtral", "hf-qwen3-moe": "qwen3_moe"}
MOE_FAMILIES = {"hf-mixtral": "mixtral", "hf-qwen3-moe": "qwen3"}
NEEDS = {"hidden_act": "silu", "attention_bias": False, "quantization_config": None}
DEFAULTS = {
    "hf-mixtral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
                   "tie_word_embeddings": False, "router_aux_loss_coef": 1e-3},
    "hf-qwen3-moe": {"num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
                     "rope_theta": 1e4, "norm_topk_prob": False, "decoder_sparse_step": 1, "use_sliding_window": False,
                     "tie_word_embeddings": False, "router_aux_loss_coef": 1e-3},
}  # fmt: skip
"""What the classes assume where a file is silent; sizes must be there."""
MOE_NEEDS = {"expert": "glu", "num_shared_experts": 0, "router": "top_k", "scoring_func": "softmax",
             "routed_scaling_factor": 1.0, "learned_noise": False,
             "bias_update_rate": 0.0, "capacity": "none"}  # fmt: skip


def config_from_foreign(source: str, data: Mapping[str, Any], *, length: int = 0) -> SequenceConfig:
    """Returns our config of a foreign `config.json`.

    Args:
      source: one of SOURCES.
      data: its content.
      length: tokens of an example and of the longest text; 0: the file's `max_position_embeddings`.

    Raises:
      UserError: unknown source, another architecture, or an option that our models do not have, by name.
    """
    check_source(source, SOURCES)
    check_object(source, data)
    _check_architecture(source, data)
    need(source, data, NEEDS)
    with reading(source):
        return _config(source, {**DEFAULTS[source], **data}, length)


def _check_architecture(source: str, data: Mapping[str, Any]) -> None:
    found = data.get("model_type")
    if found != MODEL_TYPES[source]:
        known = next((f"; give --source={other}" for other, kind in MODEL_TYPES.items() if kind == found), "")
        raise UserError(
            f"{source} needs a config of model_type {MODEL_TYPES[source]!r}, "
            f"found model_type {printable(repr(found))}{known}"
        )


def _config(source: str, data: Mapping[str, Any], length: int) -> SequenceConfig:
    dim, depth, ffns = (
        whole(source, data, "hidden_size"),
        whole(source, data, "num_hidden_layers", DEPTH),
        _ffns(source, data),
    )
    spec, eps = _attention(source, data, dim), positive(source, data, "rms_norm_eps", zero=True)
    mixtral = source == "hf-mixtral"
    moe = dataclasses.replace(
        FAMILIES[MOE_FAMILIES[source]],
        num_experts=_experts(source, data),
        num_experts_per_tok=whole(source, data, "num_experts_per_tok", EXPERTS, low=0),
        ffn_dim=whole(source, data, "intermediate_size" if mixtral else "moe_intermediate_size"),
        renormalize=mixtral or flag(source, data, "norm_topk_prob"),
        balance_loss_coef=positive(source, data, "router_aux_loss_coef", zero=True),
    )
    mixer: dict[str, Any] = {spec.kind: spec}
    return SequenceConfig(
        vocab_size=whole(source, data, "vocab_size", VOCABULARY),
        tie_embeddings=flag(source, data, "tie_word_embeddings"),
        length=length or whole(source, data, "max_position_embeddings", TOKENS),
        dim=dim,
        depth=depth,
        pattern=spec.kind,
        ffn=ffns,
        ffn_dim=0 if mixtral else whole(source, data, "intermediate_size"),
        norm_eps=eps,
        moe=moe if "moe" in ffns.split() else Moe(),
        **mixer,
    )


def _experts(source: str, data: Mapping[str, Any]) -> int:
    """transformers 5 writes Qwen3's `num_experts` under Mixtral's name."""
    own, other = ("num_local_experts", "num_experts")[:: 1 if source == "hf-mixtral" else -1]
    return whole(source, data, other if own not in data and other in data else own, EXPERTS, low=0)


# --- attention --------------------------------------------------------------------------------------------------------


def _attention(source: str, data: Mapping[str, Any], dim: int) -> Attention:
    """Sizes that follow from the width stay 0, so that equal models have equal configs."""
    heads = whole(source, data, "num_attention_heads")
    groups = heads if data["num_key_value_heads"] is None else whole(source, data, "num_key_value_heads")
    size = dim // heads if data.get("head_dim") is None else whole(source, data, "head_dim")
    if not 1 <= size * heads <= WIDTH:
        raise UserError(
            f"{source}: {heads} heads of {size} channels; valid: together 1 to {WIDTH}, "
            f"and no more heads than hidden_size={dim}"
        )
    options: dict[str, Any] = {
        "num_heads": heads,
        "num_kv_heads": 0 if groups == heads else groups,
        "head_dim": 0 if size * heads == dim else size,
        "rope_theta": _theta(source, data),
    }
    if source == "hf-qwen3-moe":
        options |= {"qk_norm": True, "qk_norm_eps": positive(source, data, "rms_norm_eps", zero=True)}
    window = _window(source, data)
    return Attention(**options) if window is None else Window(**options, window=window)


def _theta(source: str, data: Mapping[str, Any]) -> float:
    """The base of the wavelengths: a field of its own until transformers 5, which writes it among `rope_parameters`."""
    name = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    rope = data.get(name) or {}
    check_object(f"{source}: {name}", rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        refuse(source, name, rope, 'null, or a rope_type of "default"')
    partial = rope.get("partial_rotary_factor", data.get("partial_rotary_factor", 1.0))
    if partial not in (1.0, None):
        refuse(source, "partial_rotary_factor", partial, "1.0")
    return positive(source, {**data, **rope}, "rope_theta")


def _window(source: str, data: Mapping[str, Any]) -> int | None:
    """Tokens that a token sees, itself included, in every layer; None: all so far. Our `window` mixer is the same.

    Releases of transformers differ in whether `max_window_layers` spares layers.
    """
    if source == "hf-qwen3-moe":
        if not flag(source, data, "use_sliding_window"):
            return None
        need(
            f"{source}: with use_sliding_window",
            {"max_window_layers": data.get("max_window_layers") or 0},
            {"max_window_layers": 0},
        )
    return None if data.get("sliding_window") is None else whole(source, data, "sliding_window", TOKENS)


# --- FFNs -----------------------------------------------------------------------------------------------


def _ffns(source: str, data: Mapping[str, Any]) -> str:
    """The shortest pattern of FFNs: layer i has experts when i + 1 is a multiple of the step and it is
    not set apart."""
    if source == "hf-mixtral":
        return "moe"
    depth, step = whole(source, data, "num_hidden_layers", DEPTH), whole(source, data, "decoder_sparse_step")
    dense = set(data.get("mlp_only_layers") or ())
    sparse = [i not in dense and _experts(source, data) > 0 and (i + 1) % step == 0 for i in range(depth)]
    period = next((n for n in range(1, depth) if depth % n == 0 and sparse == sparse[:n] * (depth // n)), depth)
    return " ".join("moe" if one else "glu" for one in sparse[:period]) or "moe"


# --- back -------------------------------------------------------------------------------------------------------------


def config_to_foreign(target: str, config: SequenceConfig) -> dict[str, Any]:
    """Returns the `config.json` of the same model, as transformers 4 wrote it and 5 reads it.

    Raises:
      UserError: unknown target, or a model that the foreign class cannot be, by field.
    """
    check_source(target, SOURCES)
    mixtral, kinds = target == "hf-mixtral", set(config.kinds)
    if kinds not in ({"attention"}, {"window"}):
        raise UserError(
            f"{target} holds one kind of mixer in all layers (attention or window); got pattern={config.pattern!r}"
        )
    valid = {"moe"} if mixtral else {"moe", "glu"}
    if not set(config.ffn_kinds) <= valid:
        raise UserError(f"{target} has no place for ffn={config.ffn!r}; valid: {', '.join(sorted(valid))}")
    no_place(target, config, {"pool": "none", "output_dim": 0, "input_dim": 0})
    spec: Any = config.spec(*kinds)
    norm = {"qk_norm": False} if mixtral else {"qk_norm": True, "qk_norm_eps": config.norm_eps}
    no_place(target, spec, {"rotary": True, **norm}, f"{spec.kind}.")
    if "moe" in config.ffn_kinds:
        moe = config.mixture
        no_place(target, moe, MOE_NEEDS | ({"renormalize": True} if mixtral else {}), "moe.")
        if moe.topk_groups < moe.num_expert_groups:
            raise UserError(
                f"{target} has no place for moe.topk_groups={moe.topk_groups} of "
                f"num_expert_groups={moe.num_expert_groups}; valid: all"
            )
    return _shared_fields(target, config, spec) | (
        _mixtral_fields(config, spec) if mixtral else _qwen_fields(config, spec)
    )


def _shared_fields(target: str, config: SequenceConfig, spec: Attention) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM" if target == "hf-mixtral" else "Qwen3MoeForCausalLM"],
        "model_type": MODEL_TYPES[target],
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads or spec.num_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
    }


def _mixtral_fields(config: SequenceConfig, spec: Attention) -> dict[str, Any]:
    moe = config.mixture
    return {
        "intermediate_size": moe.ffn_dim,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "router_aux_loss_coef": moe.balance_loss_coef,
        "sliding_window": spec.window if isinstance(spec, Window) else None,
    }


def _qwen_fields(config: SequenceConfig, spec: Attention) -> dict[str, Any]:
    moe, window = config.mixture, spec.window if isinstance(spec, Window) else None
    ffns = [config.period[layer % len(config.period)][1] for layer in range(config.depth)]
    return {
        "intermediate_size": config.ffn_dim,
        "moe_intermediate_size": moe.ffn_dim,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "norm_topk_prob": moe.renormalize,
        "router_aux_loss_coef": moe.balance_loss_coef,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, ffn in enumerate(ffns) if ffn != "moe"],
        "attention_bias": False,
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }
