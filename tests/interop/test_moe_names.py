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
from research.interop.moe_names import entries, from_foreign, to_foreign
from research.interop.safetensors_io import load_safetensors, save_safetensors
from research.models.sequence import SequenceConfig
from research.modules.mixers.attention import Attention
from research.modules.mixers.window import Window
from research.modules.moe_options import Moe
from research.modules.state import abstract, apply
from tests.models.twins import fast_jit

GOLDEN = json.loads((pathlib.Path(__file__).parents[2] / "third_party" / "moe_language" / "golden.json").read_text())
NAMES = list(GOLDEN["models"])
TOKENS = np.array([GOLDEN["tokens"]])
SIZES = {"vocab_size": 24, "length": 16, "dim": 8, "depth": 4, "norm_eps": 1e-3}
NORMED = {"qk_norm": True, "qk_norm_eps": 1e-3}
MODELS = {
    "hf-mixtral": SequenceConfig(
        **SIZES, pattern="window", ffn="moe", window=Window(num_heads=4, num_kv_heads=2, head_dim=6, rope_theta=500.0,
                      window=5),
        moe=Moe(num_experts=3, num_experts_per_tok=2, ffn_dim=5, balance_loss_coef=0.02, balance_over="all"),
    ),
    "hf-qwen3-moe": SequenceConfig(
        **SIZES, tie_embeddings=False, pattern="attention", ffn="moe glu", ffn_dim=7,
        attention=Attention(num_heads=2, rope_theta=1e5, **NORMED),
        moe=Moe(num_experts=4, num_experts_per_tok=3, ffn_dim=5, renormalize=False, balance_loss_coef=1e-3,
                balance_over="all"),
    ),
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


def test_a_sub_network_goes_out_and_comes_back(random_arrays):
    small = MODELS["hf-mixtral"].shrink(depth=0.5, heads=2, experts=2, active=1)
    params, _ = random_arrays(small)
    data, state = to_foreign("hf-mixtral", small, params)
    again, params2, _, _ = from_foreign("hf-mixtral", data, state)
    assert (
        again.depth,
        again.window.num_heads,
        again.window.head_dim,
        again.moe.num_experts,
        again.moe.num_experts_per_tok,
    ) == (
        2,
        2,
        6,
        2,
        1,
    )
    assert (
        again.window.num_kv_heads == 0 and small.window.num_kv_heads == 2
    )  # one head a group: groups are no longer needed
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
