"""Mixtral and Qwen3-MoE of transformers: their configs and ours, published ones, what does not fit."""

import dataclasses

import pytest

from research.errors import UserError
from research.interop.moe_configs import config_from_foreign, config_to_foreign
from research.interop.moe_names import from_foreign
from research.models import registry
from research.modules.mixers.attention import Attention
from research.modules.mixers.window import Window
from research.modules.moe_options import Moe
from research.modules.state import abstract
from research.train import costs
from tests.interop.test_moe_names import MODELS, golden

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


@pytest.mark.parametrize(
    "source, data, name, active",
    [
        ("hf-mixtral", MIXTRAL_8X7B, "mixtral_8x7b", 12_879_925_248),
        ("hf-qwen3-moe", QWEN3_30B_A3B, "qwen3_30b_a3b", 3_353_032_704),
    ],
)
def test_published_configs_are_the_registry_s(source, data, name, active):
    assert config_from_foreign(source, data) == registry.entry(name).config
    assert registry.model_info(name)["active_params"] == active
    written = config_to_foreign(source, registry.entry(name).config)
    unsaid = {"attention_dropout", "bos_token_id", "eos_token_id", "initializer_range", "output_router_logits",
              "torch_dtype", "use_cache", "max_window_layers", "rope_scaling"}  # fmt: skip
    assert {k: written[k] for k in set(data) - unsaid} == {k: data[k] for k in set(data) - unsaid}
    new = {k: v for k, v in data.items() if k not in ("rope_theta", "rope_scaling", "num_experts")}
    new |= {
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "num_local_experts": registry.entry(name).config.moe.num_experts,
    }
    assert config_from_foreign(source, new) == registry.entry(name).config


def test_active_parameters_are_all_where_nothing_is_chosen():
    small = registry.entry("moe_small").config
    full, expert = abstract(small).num_params(), 3 * 192 * small.mixture.ffn_dim
    assert registry.model_info("moe_small")["active_params"] == full - 2 * 6 * expert
    assert costs.static_costs(small)["active_params"] == full - 2 * 6 * expert
    assert "active_params" not in costs.static_costs(registry.entry("attention_small").config)
    soft = dataclasses.replace(small, pool="mean", moe=Moe(router="soft", num_experts_per_tok=1))
    assert soft.active_params() == abstract(soft).num_params()
    assert registry.model_info("mamba_130m")["active_params"] == 129_135_360


@pytest.mark.parametrize(
    "options, ffn",
    [
        ({}, "moe"),
        ({"decoder_sparse_step": 2}, "glu moe"),
        ({"decoder_sparse_step": 3}, "glu glu moe"),
        ({"mlp_only_layers": [1, 3, 5]}, "moe glu"),
        ({"mlp_only_layers": [0]}, "glu moe moe moe moe moe"),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, "glu glu glu moe glu moe"),
        ({"num_experts": 0}, "glu"),
        ({"mlp_only_layers": None}, "moe"),
    ],
)
def test_layers_with_experts_are_a_pattern(options, ffn):
    data = QWEN3_30B_A3B | {"num_hidden_layers": 6} | options
    config = config_from_foreign("hf-qwen3-moe", data)
    assert config.ffn == ffn
    again = config_from_foreign("hf-qwen3-moe", config_to_foreign("hf-qwen3-moe", config))
    assert again == config


def test_windows_are_the_window_mixer():
    config = config_from_foreign("hf-mixtral", MIXTRAL_8X7B | {"sliding_window": 4096})
    assert config.pattern == "window" and config.window == Window(
        num_heads=32, num_kv_heads=8, rope_theta=1e6, window=4096
    )
    qwen = QWEN3_30B_A3B | {"sliding_window": 4096}
    assert config_from_foreign("hf-qwen3-moe", qwen).pattern == "attention"
    config = config_from_foreign("hf-qwen3-moe", qwen | {"use_sliding_window": True, "max_window_layers": 0})
    assert config.pattern == "window" and config.window.qk_norm and config.window.window == 4096
    with pytest.raises(
        UserError, match="with use_sliding_window: max_window_layers=48 is a model that we do not have; valid: 0"
    ):
        config_from_foreign("hf-qwen3-moe", qwen | {"use_sliding_window": True})


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        (
            "hf-mixtral",
            {"model_type": "gpt2"},
            "hf-mixtral needs a config of model_type 'mixtral', found model_type 'gpt2'$",
        ),
        ("hf-mixtral", {"model_type": "qwen3_moe"}, "found model_type 'qwen3_moe'; give --source=hf-qwen3-moe"),
        (
            "hf-mixtral",
            {"hidden_act": "gelu"},
            'hf-mixtral: hidden_act="gelu" is a model that we do not have; valid: "silu"',
        ),
        ("hf-mixtral", {"attention_bias": True}, "attention_bias=true is a model that we do not have; valid: false"),
        ("hf-mixtral", {"quantization_config": {"bits": 4}}, 'quantization_config={"bits": 4} is a model'),
        (
            "hf-mixtral",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            'rope_scaling={"type": "yarn".*valid: null, or',
        ),
        (
            "hf-mixtral",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}},
            'rope_parameters={"rope_type": "linear"',
        ),
        (
            "hf-mixtral",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5 is a model that we do not have; valid: 1.0",
        ),
        ("hf-mixtral", {"hidden_size": None}, "hidden_size=None; valid: whole numbers"),
        ("hf-mixtral", {"num_attention_heads": 0}, "num_attention_heads=0; valid: whole numbers from 1"),
        ("hf-mixtral", {"num_experts_per_tok": 9}, "moe: num_experts_per_tok=9; valid: 1 to the 4 experts"),
        ("hf-mixtral", {"num_key_value_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        (
            "hf-mixtral",
            {"intermediate_size": 16},
            r"24 of another shape \(model.layers.0.block_sparse_moe.experts.0.w1.weight is \(12, 8\)",
        ),
        ("hf-mixtral", {"num_local_experts": 5}, r"6 missing \(model.layers.0.block_sparse_moe.experts.4.w1.weight"),
        ("hf-mixtral", {"num_hidden_layers": 1}, r"19 unknown \(model.layers.1.block_sparse_moe.experts.0.w1.weight"),
        (
            "hf-mixtral",
            {"tie_word_embeddings": True},
            "ties the embedding to lm_head.weight, but the file holds two that differ",
        ),
        ("gpt", {}, "unknown source 'gpt'; valid: hf-mixtral, hf-qwen3-moe"),
    ],
)
def test_what_does_not_fit_is_named(source, change, message):
    _, data, state, _ = golden("mixtral")
    with pytest.raises(UserError, match=message):
        from_foreign(source, {**data, **change}, state)


def test_sizes_must_be_there():
    for field in ("hidden_size", "num_experts", "moe_intermediate_size", "num_experts_per_tok"):
        with pytest.raises(UserError, match=f"hf-qwen3-moe: the config has no field '{field}'"):
            config_from_foreign("hf-qwen3-moe", {k: v for k, v in QWEN3_30B_A3B.items() if k != field})
    with pytest.raises(UserError, match="decoder_sparse_step=0; valid: whole numbers from 1"):
        config_from_foreign("hf-qwen3-moe", QWEN3_30B_A3B | {"decoder_sparse_step": 0})


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        (
            "hf-mixtral",
            {"pattern": "mamba"},
            "holds one kind of mixer in all layers .attention or window.; got pattern='mamba'",
        ),
        ("hf-mixtral", {"ffn": "glu moe"}, "hf-mixtral has no place for ffn='glu moe'; valid: moe"),
        ("hf-qwen3-moe", {"ffn": "mlp moe"}, "hf-qwen3-moe has no place for ffn='mlp moe'; valid: glu, moe"),
        ("hf-mixtral", {"output_dim": 3}, "has no place for output_dim=3; valid: 0"),
        (
            "hf-mixtral",
            {"window": Window(num_heads=2, qk_norm=True)},
            "has no place for window.qk_norm=True; valid: False",
        ),
        (
            "hf-mixtral",
            {"window": Window(num_heads=2, rotary=False)},
            "has no place for window.rotary=False; valid: True",
        ),
        (
            "hf-qwen3-moe",
            {"attention": Attention(num_heads=2)},
            "has no place for attention.qk_norm=False; valid: True",
        ),
        (
            "hf-qwen3-moe",
            {"attention": Attention(num_heads=2, qk_norm=True)},
            "has no place for attention.qk_norm_eps=1e-06; valid: 0.001",
        ),
        ("hf-mixtral", {"moe": Moe(renormalize=False)}, "has no place for moe.renormalize=False; valid: True"),
        ("hf-mixtral", {"moe": Moe(num_shared_experts=1)}, "has no place for moe.num_shared_experts=1; valid: 0"),
        (
            "hf-mixtral",
            {"moe": Moe(scoring_func="sigmoid")},
            "has no place for moe.scoring_func='sigmoid'; valid: 'softmax'",
        ),
        ("hf-mixtral", {"moe": Moe(capacity="mesh")}, "has no place for moe.capacity='mesh'; valid: 'none'"),
        (
            "hf-mixtral",
            {"moe": Moe(num_expert_groups=4, topk_groups=2)},
            "has no place for moe.topk_groups=2 of num_expert_groups=4",
        ),
    ],
)
def test_models_that_have_no_foreign_class(target, change, message):
    with pytest.raises(UserError, match=message):
        config_to_foreign(target, dataclasses.replace(MODELS[target], kept_layers=(), **change))
