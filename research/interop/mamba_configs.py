"""`config.json` of Mamba and Mamba-2 language models, of transformers and of state-spaces/mamba, into our config and
back.

What a foreign class can be and ours cannot is refused by the name of its field, and the other way round. Fields that
only initialise, or say how to compute, are passed over.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from research.errors import UserError
from research.files import printable
from research.interop.foreign_configs import (
    DEPTH,
    VOCABULARY,
    WIDTH,
    check_object,
    check_source,
    flag,
    need,
    no_place,
    positive,
    reading,
    whole,
)
from research.models.sequence import SequenceConfig
from research.modules.mixers.mamba import Mamba
from research.modules.mixers.mamba2 import Mamba2

SOURCES = ("hf-mamba", "hf-mamba2", "mamba-ssm")
HF_NEEDS = {"use_bias": False, "use_conv_bias": True, "hidden_act": "silu", "rms_norm": True}
HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "hf-mamba": {"state_size": 16, "expand": 2, "conv_kernel": 4, "time_step_rank": "auto", "tie_word_embeddings": True,
                 "layer_norm_epsilon": 1e-5},
    "hf-mamba2": {"state_size": 128, "expand": 2, "conv_kernel": 4, "n_groups": 8, "head_dim": 64,
                  "tie_word_embeddings": False, "layer_norm_epsilon": 1e-5},
}  # fmt: skip
SSM_NEEDS = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
SSM_CFG_NEEDS = {
    "bias": False,
    "conv_bias": True,
    "rmsnorm": True,
    "norm_before_gate": False,
    "D_has_hdim": False,
    "d_ssm": None,
}
SSM_CFG_INERT = {"conv_init", "A_init_range", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "chunk_size",
                 "use_fast_path", "use_mem_eff_path", "sequence_parallel", "process_group"}  # fmt: skip
SSM_DEFAULTS: dict[str, Any] = {"ssm_cfg": {}, "pad_vocab_size_multiple": 8, "tie_embeddings": True}
SSM_CFG_DEFAULTS: dict[str, dict[str, Any]] = {
    "Mamba1": {"expand": 2, "d_conv": 4, "d_state": 16, "dt_rank": "auto"},
    "Mamba2": {"expand": 2, "d_conv": 4, "d_state": 128, "headdim": 64, "ngroups": 1},
}
SSM_LAYERS = ("Mamba1", "Mamba2")


def config_from_foreign(source: str, data: Mapping[str, Any], *, length: int = 256) -> SequenceConfig:
    """Returns our config of a foreign `config.json`.

    Args:
      source: one of SOURCES.
      data: its content.
      length: tokens of an example, which the file does not hold and no array depends on.

    Raises:
      UserError: unknown source, another architecture, or an option that our models do not have, by name.
    """
    check_source(source, SOURCES)
    check_object(source, data)
    _check_architecture(source, data)
    with reading(source):
        return _config_from_original(data, length) if source == "mamba-ssm" else _config_from_hf(source, data, length)


def _check_architecture(source: str, data: Mapping[str, Any]) -> None:
    found, original = data.get("model_type"), "d_model" in data and "n_layer" in data
    wanted = (
        "the original layout (d_model, n_layer, ...)"
        if source == "mamba-ssm"
        else f"model_type {source.removeprefix('hf-')!r}"
    )
    if source == "mamba-ssm" and original and found is None:
        return
    if source != "mamba-ssm" and found == source.removeprefix("hf-"):
        return
    what = (
        "the original layout (d_model, n_layer, ...)"
        if original and found is None
        else f"model_type {printable(repr(found))}"
    )
    known = {"mamba": "hf-mamba", "mamba2": "hf-mamba2", None: "mamba-ssm" if original else None}.get(
        found if isinstance(found, str | None) else ""
    )
    raise UserError(f"{source} needs a config of {wanted}, found {what}{f'; give --source={known}' if known else ''}")


def _config_from_hf(source: str, data: Mapping[str, Any], length: int) -> SequenceConfig:
    need(source, data, HF_NEEDS)
    data = {**HF_DEFAULTS[source], **data}
    dim, inner, expand = _widths(source, data, "hidden_size")
    sizes = {
        "d_state": whole(source, data, "state_size"),
        "expand": expand,
        "d_conv": whole(source, data, "conv_kernel"),
    }
    eps = positive(source, data, "layer_norm_epsilon", zero=True)
    if source == "hf-mamba":
        rank = 0 if data["time_step_rank"] == "auto" else whole(source, data, "time_step_rank")
        spec: Mamba | Mamba2 = _mamba(dim, inner, rank, sizes)
    else:
        heads, width, groups = (whole(source, data, name) for name in ("num_heads", "head_dim", "n_groups"))
        spec = _mamba2(source, dim, heads, width, groups, data.get("time_step_limit"), eps, sizes)
    mixer: dict[str, Any] = {spec.kind: spec}
    return SequenceConfig(
        vocab_size=whole(source, data, "vocab_size", VOCABULARY),
        tie_embeddings=flag(source, data, "tie_word_embeddings"),
        length=length,
        dim=dim,
        depth=whole(source, data, "num_hidden_layers", DEPTH),
        pattern=spec.kind,
        norm_eps=eps,
        **mixer,
    )


def _config_from_original(data: Mapping[str, Any], length: int) -> SequenceConfig:
    source = "mamba-ssm"
    need(source, data, SSM_NEEDS)
    data = {**SSM_DEFAULTS} | {name: value for name, value in data.items() if not (name == "ssm_cfg" and value is None)}
    check_object(f"{source}: ssm_cfg", data["ssm_cfg"])
    options: dict[str, Any] = dict(data["ssm_cfg"])
    layer = options.pop("layer", "Mamba1")
    if layer not in SSM_LAYERS:
        raise UserError(
            f"{source}: ssm_cfg.layer={printable(layer)!r} is a mixer that is not read; valid: {', '.join(SSM_LAYERS)}"
        )
    need(f"{source}: ssm_cfg", options, SSM_CFG_NEEDS)
    own = {"dt_rank"} if layer == "Mamba1" else {"headdim", "ngroups", "dt_limit"}
    known = {"d_state", "d_conv", "expand", *own, *SSM_CFG_NEEDS, *SSM_CFG_INERT}
    if unknown := sorted(set(options) - known):
        raise UserError(
            f"{source}: ssm_cfg has an unknown field {printable(unknown[0])!r}; known for {layer}: "
            f"{', '.join(sorted(known))}"
        )
    options = SSM_CFG_DEFAULTS[layer] | options
    dim, inner, expand = _widths(source, {**options, "d_model": data["d_model"]}, "d_model")
    sizes = {"expand": expand, "d_conv": whole(source, options, "d_conv"), "d_state": whole(source, options, "d_state")}
    if layer == "Mamba1":
        rank = 0 if options["dt_rank"] == "auto" else whole(source, options, "dt_rank")
        spec: Mamba | Mamba2 = _mamba(dim, inner, rank, sizes)
    else:
        width, groups = whole(source, options, "headdim"), whole(source, options, "ngroups")
        if inner % width:
            raise UserError(
                f"{source}: ssm_cfg.headdim={width} does not divide the {inner} inner channels (expand * d_model)"
            )
        spec = _mamba2(source, dim, inner // width, width, groups, options.get("dt_limit"), 1e-5, sizes)
    multiple = whole(source, data, "pad_vocab_size_multiple")
    mixer: dict[str, Any] = {spec.kind: spec}
    return SequenceConfig(
        vocab_size=-(-whole(source, data, "vocab_size", VOCABULARY) // multiple) * multiple,
        tie_embeddings=flag(source, data, "tie_embeddings"),
        length=length,
        dim=dim,
        depth=whole(source, data, "n_layer", DEPTH),
        pattern=spec.kind,
        **mixer,
    )


def _widths(source: str, data: Mapping[str, Any], name: str) -> tuple[int, int, float]:
    """(channels, inner channels, their ratio)."""
    dim, expand = whole(source, data, name), positive(source, data, "expand")
    inner = int(expand * dim)
    if not 1 <= inner <= WIDTH:
        raise UserError(
            f"{source}: expand={expand:g} makes {expand * dim:g} inner channels of {dim}; valid: 1 to {WIDTH}"
        )
    return dim, inner, expand


def _mamba(dim: int, inner: int, rank: int, sizes: dict[str, Any]) -> Mamba:
    """Sizes that follow from the width stay 0, so that equal models have equal configs."""
    plain = Mamba(**sizes)
    derived = plain.resolve(dim)
    return replace(
        plain, d_inner=0 if inner == derived.d_inner else inner, dt_rank=0 if rank == derived.dt_rank else rank
    )


def _mamba2(
    source: str, dim: int, heads: int, width: int, groups: int, limit: Any, eps: float, sizes: dict[str, Any]
) -> Mamba2:
    low, high = (_number(bound) for bound in limit or (0.0, math.inf))
    if not 0 <= low <= high:
        raise UserError(f"{source}: steps between {low} and {high}; valid: two numbers from 0, the smaller first")
    bounds = () if (low, high) == (0.0, math.inf) else (low, high)
    derived = heads * width == sizes["expand"] * dim
    return Mamba2(
        head_dim=width, ngroups=groups, num_heads=0 if derived else heads, dt_limit=bounds, norm_eps=eps, **sizes
    )


def _number(value: Any) -> float:
    """transformers writes infinity as {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def config_to_foreign(target: str, config: SequenceConfig) -> dict[str, Any]:
    """Returns the `config.json` of the same model in the layout `target`; `config_from_foreign` gives an equal model
    again.

    Raises:
      UserError: unknown target, or a model that the foreign class cannot be, by field.
    """
    check_source(target, SOURCES)
    kinds = set(config.kinds)
    valid = {"hf-mamba": ("mamba",), "hf-mamba2": ("mamba2",), "mamba-ssm": ("mamba", "mamba2")}[target]
    if len(kinds) > 1 or not kinds <= set(valid):
        raise UserError(
            f"{target} holds one kind of mixer in all layers ({' or '.join(valid)}); got pattern={config.pattern!r}"
        )
    no_place(target, config, {"ffn": "none", "pool": "none", "output_dim": 0, "input_dim": 0})
    spec: Any = config.spec(*kinds)
    inner = spec.d_inner if isinstance(spec, Mamba) else spec.num_heads * spec.head_dim
    expand = _expand(target, inner, config.dim)
    return _original_config(config, spec, expand) if target == "mamba-ssm" else _hf_config(config, spec, expand, inner)


def _expand(target: str, inner: int, dim: int) -> int | float:
    """The factor from which the foreign class computes `inner` by int(expand * dim)."""
    if inner % dim == 0:
        return inner // dim
    if target != "mamba-ssm":
        raise UserError(
            f"{target} takes whole expand factors; {inner} inner channels are {inner / dim:g} times the {dim} channels"
        )
    expand = inner / dim
    return expand if int(expand * dim) == inner else math.nextafter(expand, math.inf)


def _hf_config(config: SequenceConfig, spec: Mamba | Mamba2, expand: int | float, inner: int) -> dict[str, Any]:
    data = {
        "architectures": ["MambaForCausalLM" if isinstance(spec, Mamba) else "Mamba2ForCausalLM"],
        "model_type": spec.kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "state_size": spec.d_state,
        "expand": expand,
        "conv_kernel": spec.d_conv,
        "layer_norm_epsilon": config.norm_eps,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
    }
    if isinstance(spec, Mamba):
        return data | {"intermediate_size": inner, "time_step_rank": spec.dt_rank}
    if spec.norm_eps != config.norm_eps:
        raise UserError(
            "hf-mamba2 has one epsilon for all norms; "
            f"got norm_eps={config.norm_eps} and mamba2.norm_eps={spec.norm_eps}"
        )
    limit = {"time_step_limit": list(spec.dt_limit)} if spec.dt_limit else {}
    return data | {"num_heads": spec.num_heads, "head_dim": spec.head_dim, "n_groups": spec.ngroups, **limit}


def _original_config(config: SequenceConfig, spec: Mamba | Mamba2, expand: int | float) -> dict[str, Any]:
    epsilons = {"norm_eps": config.norm_eps} | ({"mamba2.norm_eps": spec.norm_eps} if isinstance(spec, Mamba2) else {})
    for name, eps in epsilons.items():
        if eps != 1e-5:
            raise UserError(f"mamba-ssm has the fixed epsilon 1e-05 in its norms; got {name}={eps}")
    options: dict[str, Any] = {"d_state": spec.d_state, "d_conv": spec.d_conv, "expand": expand}
    if isinstance(spec, Mamba):
        options |= {"layer": "Mamba1", "dt_rank": spec.dt_rank}
    else:
        limit = {"dt_limit": list(spec.dt_limit)} if spec.dt_limit else {}
        options |= {"layer": "Mamba2", "headdim": spec.head_dim, "ngroups": spec.ngroups, **limit}
    return {
        "d_model": config.dim,
        "d_intermediate": 0,
        "n_layer": config.depth,
        "vocab_size": config.vocab_size,
        "ssm_cfg": options,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": next(n for n in (16, 8, 1) if config.vocab_size % n == 0),
        "tie_embeddings": config.tie_embeddings,
    }
