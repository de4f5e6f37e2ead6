"""Mixtral and Qwen3-MoE of transformers: golden numbers, both layouts of experts, exact round trips, files, errors,
live parity."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.interop import folders, from_folder, to_folder
from research.interop.array_tables import to_foreign_arrays
from research.interop.moe_configs import config_from_foreign, config_to_foreign
from research.interop.moe_names import entries, from_foreign, to_foreign
from research.interop.safetensors_io import load_safetensors, save_safetensors
from research.models import registry
from research.models.base import active_params
from research.models.sequence import SequenceConfig
from research.modules.mixers.attention import Attention
from research.modules.mixers.window import Window
from research.modules.moe_options import Moe
from research.modules.state import abstract, apply
from research.train import costs
from tests.models.twins import fast_jit

GOLDEN = json.loads((pathlib.Path(__file__).parents[2] / "third_party" / "moe_language" / "golden.json").read_text())
NAMES = list(GOLDEN["models"])
TOKENS = np.array([GOLDEN["tokens"]])
SIZES = {"vocab_size": 24, "length": 16, "dim": 8, "depth": 4, "norm_eps": 1e-3}
NORMED = {"qk_norm": True, "qk_norm_eps": 1e-3}
MODELS = {
    "hf-mixtral": SequenceConfig(
        **SIZES, pattern="window", ffn="moe", window=Window(heads=4, kv_heads=2, head_dim=6, theta=500.0, window=5),
        moe=Moe(experts=3, active=2, hidden=5, balance=0.02, balance_over="all"),
    ),
    "hf-qwen3-moe": SequenceConfig(
        **SIZES, tied=False, pattern="attention", ffn="moe glu", ffn_dim=7,
        attention=Attention(heads=2, theta=1e5, **NORMED),
        moe=Moe(experts=4, active=3, hidden=5, renormalize=False, balance=1e-3, balance_over="all"),
    ),
}  # fmt: skip
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


def fill(name, shape, k):
    """The formula of the golden weights, see third_party/moe_language."""
    j = np.arange(1, np.prod(shape) + 1)
    wave = 0.8 * np.sin(1.7 * j + 0.6 * j**2 / j[-1] + k).reshape(shape)
    return 1 + 0.25 * wave if "norm" in name else wave


def golden(name):
    """Returns (source, content of config.json, state dict, numbers)."""
    numbers = GOLDEN["models"][name]
    state = {path: fill(path, shape, k).astype(np.float32) for k, (path, shape) in enumerate(numbers["shapes"].items())}
    return numbers["source"], numbers["config"], state, numbers


def loss(logits):
    """Mean next-token loss over the golden tokens, in nats."""
    rows = jax.nn.log_softmax(logits[0, :-1])
    return -rows[jnp.arange(7), TOKENS[0, 1:]].mean()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name, strict=True)


# --- golden numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "matched", "ffn"),
    [("mixtral", 3048, 41, "moe"), ("qwen3_moe", 1976, 35, "glu moe"), ("qwen3_moe_plain", 2168, 44, "moe")],
)
def test_golden_models(name, count, matched, ffn):
    source, data, state, numbers = golden(name)
    config, params, stats, report = from_foreign(source, data, state)
    assert (config.dim, config.depth, config.vocab_size, config.length, config.ffn) == (8, 2, 16, 32, ffn)
    assert abstract(config).num_params() == count and set(stats) == set(abstract(config).stats)
    assert (report.matched, report.missing, report.unexpected) == (matched, (), ())
    logits = fast_jit(lambda p, x: apply(config, p, stats, x)[0])(params, TOKENS)
    np.testing.assert_allclose(logits[0], numbers["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss(logits), numbers["nll"], rtol=0, atol=1e-5)


@pytest.mark.slow_unless("qwen3_moe")
@pytest.mark.parametrize("name", NAMES)
def test_golden_models_agree_in_float64_with_the_gradients_of_routers_and_experts(name):
    source, data, state, numbers = golden(name)
    with jax.enable_x64(True):
        config, params, stats, _ = from_foreign(source, data, state, dtype=np.float64)

        def run(params):
            logits = apply(config, params, stats, jnp.asarray(TOKENS))[0]
            return loss(logits), logits

        (value, logits), grads = fast_jit(jax.value_and_grad(run, has_aux=True))(params)
        assert logits.dtype == np.float64
        np.testing.assert_allclose(logits[0], numbers["logits_float64"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(value, numbers["nll_float64"], rtol=0, atol=1e-6)
        found = to_foreign_arrays(entries(source, config, fused=True), grads)
        for path, expected in numbers["gradients_float64"].items():
            assert np.abs(expected).max() > 1e-2
            np.testing.assert_allclose(found[path], expected, rtol=0, atol=1e-6, err_msg=path)


def fused(state, products):
    """The same arrays as models of transformers 5 hold them."""
    out = {}
    for name, w in state.items():
        layer, found, rest = name.replace(".block_sparse_moe.", ".mlp.").partition(".mlp.experts.")
        if not found:
            out[name.replace(".block_sparse_moe.", ".mlp.")] = w
        elif rest == f"0.{products[0]}.weight":
            part = lambda j, product, at=name: state[at.replace(f"experts.0.{products[0]}", f"experts.{j}.{product}")]
            out[f"{layer}.mlp.experts.gate_up_proj"] = np.stack(
                [np.concatenate([part(j, p) for p in products[:2]]) for j in range(4)]
            )
            out[f"{layer}.mlp.experts.down_proj"] = np.stack([part(j, products[2]) for j in range(4)])
    return out


@pytest.mark.parametrize(
    "name, products",
    [("mixtral", ("w1", "w3", "w2")), ("qwen3_moe", ("gate_proj", "up_proj", "down_proj"))],
    ids=["mixtral", "qwen3_moe"],
)
def test_experts_apart_and_fused_are_the_same_model(name, products):
    source, data, state, _ = golden(name)
    together = fused(state, products)
    assert len(together) < len(state)
    config, params, _, report = from_foreign(source, data, together)
    assert report.matched == len(together)
    again, apart, _, _ = from_foreign(source, data, state)
    assert config == again
    assert_same(params, apart)
    del together["model.layers.1.mlp.experts.down_proj"]
    with pytest.raises(UserError, match=r"1 missing \(model.layers.1.mlp.experts.down_proj\)"):
        from_foreign(source, data, together)


# --- configs ----------------------------------------------------------------------------------------------------------


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
        "num_local_experts": registry.entry(name).config.moe.experts,
    }
    assert config_from_foreign(source, new) == registry.entry(name).config


def test_active_parameters_are_all_where_nothing_is_chosen():
    small = registry.entry("moe_small").config
    full, expert = abstract(small).num_params(), 3 * 192 * small.mixture.hidden
    assert registry.model_info("moe_small")["active_params"] == full - 2 * 6 * expert
    assert costs.static_costs(small)["active_params"] == full - 2 * 6 * expert
    assert "active_params" not in costs.static_costs(registry.entry("attention_small").config)
    soft = dataclasses.replace(small, pool="mean", moe=Moe(router="soft", active=1))
    assert active_params(soft) == abstract(soft).num_params()
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
    assert config.pattern == "window" and config.window == Window(heads=32, kv_heads=8, theta=1e6, window=4096)
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
        ("hf-mixtral", {"num_experts_per_tok": 9}, "moe: active=9; valid: 1 to the 4 experts"),
        ("hf-mixtral", {"num_key_value_heads": 3}, "kv_heads=3 does not divide heads=4"),
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
        ("hf-mixtral", {"outputs": 3}, "has no place for outputs=3; valid: 0"),
        ("hf-mixtral", {"window": Window(heads=2, qk_norm=True)}, "has no place for window.qk_norm=True; valid: False"),
        ("hf-mixtral", {"window": Window(heads=2, rotary=False)}, "has no place for window.rotary=False; valid: True"),
        ("hf-qwen3-moe", {"attention": Attention(heads=2)}, "has no place for attention.qk_norm=False; valid: True"),
        (
            "hf-qwen3-moe",
            {"attention": Attention(heads=2, qk_norm=True)},
            "has no place for attention.qk_norm_eps=1e-06; valid: 0.001",
        ),
        ("hf-mixtral", {"moe": Moe(renormalize=False)}, "has no place for moe.renormalize=False; valid: True"),
        ("hf-mixtral", {"moe": Moe(shared=1)}, "has no place for moe.shared=1; valid: 0"),
        ("hf-mixtral", {"moe": Moe(score="sigmoid")}, "has no place for moe.score='sigmoid'; valid: 'softmax'"),
        ("hf-mixtral", {"moe": Moe(capacity="mesh")}, "has no place for moe.capacity='mesh'; valid: 'none'"),
        (
            "hf-mixtral",
            {"moe": Moe(expert_groups=4, kept_groups=2)},
            "has no place for moe.kept_groups=2 of expert_groups=4",
        ),
    ],
)
def test_models_that_have_no_foreign_class(target, change, message):
    with pytest.raises(UserError, match=message):
        config_to_foreign(target, dataclasses.replace(MODELS[target], kept_layers=(), **change))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", MODELS)
def test_round_trips_are_bitwise(source, random_arrays):
    config = MODELS[source]
    params, _ = random_arrays(config)
    data, state = to_foreign(source, config, params)
    again, params2, _, _ = from_foreign(source, json.loads(json.dumps(data)), state)
    assert dataclasses.replace(again, ffn_dim=config.ffn_dim) == config
    assert_same(params2, params)
    data2, state2 = to_foreign(source, again, params2)
    assert data2 == data and ("lm_head.weight" in state) == (source != "hf-mixtral")
    assert_same(state2, state)


def test_a_smaller_self_goes_out_and_comes_back(random_arrays):
    small = MODELS["hf-mixtral"].shrink(depth=0.5, heads=2, experts=2, active=1)
    params, _ = random_arrays(small)
    data, state = to_foreign("hf-mixtral", small, params)
    again, params2, _, _ = from_foreign("hf-mixtral", data, state)
    assert (again.depth, again.window.heads, again.window.head_dim, again.moe.experts, again.moe.active) == (
        2,
        2,
        6,
        2,
        1,
    )
    assert again.window.kv_heads == 0 and small.window.kv_heads == 2  # one head a group: groups are no longer needed
    assert_same(to_foreign("hf-mixtral", again, params2)[1], state)


@pytest.mark.parametrize("source", MODELS)
def test_shards_and_whole_files(source, random_arrays, tmp_path, monkeypatch):
    config = MODELS[source]
    params, _ = random_arrays(config)
    to_folder(source, tmp_path, config, params)
    _, arrays, stats, _ = from_folder(source, tmp_path)
    assert_same(arrays, params)
    assert all(not np.asarray(s).any() for s in stats.values())
    monkeypatch.setattr(folders, "SHARD", 1000)
    params = {name: w + 1 for name, w in params.items()}
    to_folder(source, tmp_path, config, params)
    sizes = [sum(w.nbytes for w in load_safetensors(file).values()) for file in tmp_path.glob("model-*.safetensors")]
    assert len(sizes) > 8 and max(sizes) <= 1000 and not (tmp_path / "model.safetensors").exists()
    assert_same(from_folder(source, tmp_path)[1], params)


@pytest.mark.parametrize("source", MODELS)
def test_shards_of_others(source, random_arrays, tmp_path):
    config = MODELS[source]
    params, _ = random_arrays(config)
    to_folder(source, tmp_path, config, params)
    state = to_foreign(source, config, params)[1]
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_safetensors(tmp_path / file, {name: state[name] for name in held})
    places = {name: file for file, held in shards.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    again, arrays, _, report = from_folder(source, tmp_path, length=99)
    assert again.length == 99 and report.matched == len(state)
    assert_same(arrays, params)


# --- transformers -----------------------------------------------------------------------------------------------------


def drawn(source, rng):
    """Options of a small config of transformers' class."""
    pick = lambda *values: values[rng.integers(len(values))]
    groups, experts = pick(1, 2, 3), pick(2, 4, 7)
    options = {
        "vocab_size": pick(11, 50),
        "hidden_size": pick(12, 24),
        "num_hidden_layers": pick(2, 4),
        "num_key_value_heads": groups,
        "num_attention_heads": groups * pick(1, 2, 3),
        "head_dim": pick(4, 6),
        "num_experts_per_tok": pick(1, 2, experts),
        "num_local_experts" if source == "hf-mixtral" else "num_experts": experts,
        "intermediate_size": pick(9, 16),
        "tie_word_embeddings": bool(pick(0, 1)),
        "rms_norm_eps": pick(1e-6, 1e-3),
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_theta": pick(100.0, 1e6), "rope_type": "default"},
    }
    if source == "hf-mixtral":
        return options | {"sliding_window": pick(None, 4)}
    sparse = {"decoder_sparse_step": pick(1, 2), "mlp_only_layers": pick([], [1])}
    return options | {"moe_intermediate_size": pick(5, 8), "norm_topk_prob": bool(pick(0, 1)), **sparse}


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("source", ["hf-mixtral", "hf-qwen3-moe"])
def test_transformers_agrees_in_both_directions(source, number, random_arrays, tmp_path, monkeypatch):
    """Logits, and gradients of all arrays for the first two; odd numbers save experts as transformers 5 holds them, and
    shards."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    prefix = {"hf-mixtral": "Mixtral", "hf-qwen3-moe": "Qwen3Moe"}[source]
    theirs, settings = getattr(transformers, f"{prefix}ForCausalLM"), getattr(transformers, f"{prefix}Config")
    rng = np.random.default_rng(number)
    torch.manual_seed(number)
    model = theirs(settings(**drawn(source, rng))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.set_experts_implementation("eager")  # its grouped products ask for aligned sizes
    model.save_pretrained(tmp_path / "theirs", save_original_format=number % 2 == 0)
    config, params, stats, _ = from_folder(source, tmp_path / "theirs")
    tokens = rng.integers(0, config.vocab_size, (2, 9))
    weights = rng.standard_normal((2, 9, config.vocab_size)).astype(np.float32)

    def run(params, tokens):
        logits = apply(config, params, stats, tokens)[0]
        return (weights * logits).sum(), logits

    run = fast_jit(jax.value_and_grad(run, has_aux=True) if number < 2 else run)
    found, grads = run(params, jnp.asarray(tokens))
    logits = found[1] if number < 2 else grads
    expected = model(torch.tensor(tokens), use_cache=False).logits

    def close(ours, other, least=0.0, name=""):
        np.testing.assert_allclose(ours, other, rtol=0, atol=1e-4 * max(np.abs(other).max(), least), err_msg=name)

    assert expected.abs().max() > 0.1
    close(logits, expected.detach().numpy())
    if number < 2:
        (torch.tensor(weights) * expected).sum().backward()
        ours = to_foreign_arrays(entries(source, config, fused=True), grads)
        theirs_grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
        least = 1e-3 * max(
            np.abs(grad).max() for grad in theirs_grads.values()
        )  # a single chosen expert's weight is 1: its router learns nothing
        for name, grad in theirs_grads.items():
            close(ours[name], grad, least, name)
    params, _ = random_arrays(config, number)
    monkeypatch.setattr(folders, "SHARD", 10_000 if number % 2 else folders.SHARD)
    to_folder(source, tmp_path / "ours", config, params)
    again, info = theirs.from_pretrained(tmp_path / "ours", output_loading_info=True, experts_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    out = run(params, jnp.asarray(tokens))
    close(
        out[0][1] if number < 2 else out[1], again.eval()(torch.tensor(tokens), use_cache=False).logits.detach().numpy()
    )
