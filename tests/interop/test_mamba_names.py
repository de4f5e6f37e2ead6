"""Mamba language models of transformers and of the original code: golden numbers, exact round trips, files, errors,
live parity."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.interop import from_folder, to_folder
from research.interop.mamba_configs import SOURCES, config_from_foreign, config_to_foreign
from research.interop.mamba_names import from_foreign, to_foreign
from research.interop.safetensors_io import save_safetensors
from research.models.sequence import SequenceConfig
from research.modules.mixers.mamba import Mamba
from research.modules.mixers.mamba2 import Mamba2
from research.modules.state import abstract, apply
from tests.interop.test_pth import storage, tensor, write

GOLDEN = json.loads((pathlib.Path(__file__).parents[2] / "third_party" / "mamba" / "golden.json").read_text())
SMALL = {"vocab_size": 24, "length": 8, "dim": 8, "depth": 4}
MODELS = {
    "hf-mamba": SequenceConfig(**SMALL, norm_eps=1e-6, mamba=Mamba(d_state=3, expand=3.0, dt_rank=5, d_conv=2)),
    "hf-mamba2": SequenceConfig(
        **SMALL,
        tie_embeddings=False,
        pattern="mamba2",
        norm_eps=1e-3,
        mamba2=Mamba2(d_state=3, head_dim=4, ngroups=2, d_conv=3, dt_limit=(0.01, 0.5), norm_eps=1e-3),
    ),
    "mamba-ssm": SequenceConfig(
        **SMALL, pattern="mamba2", mamba2=Mamba2(d_state=3, head_dim=4, num_heads=3, expand=1.5)
    ),
}


def fill(name, shape, k):
    """The formula of the golden weights, see third_party/mamba."""
    if name.endswith("A_log"):
        return np.broadcast_to(np.log(np.arange(1, shape[-1] + 1)), shape)
    wave = 0.8 * np.sin(1.7 * np.arange(1, np.prod(shape) + 1) + k).reshape(shape)
    return 1 + 0.25 * wave if name.endswith(".D") or "norm" in name else wave


def golden_state(source):
    shapes = GOLDEN["models"][source]["shapes"]
    return {name: fill(name, shapes[name], k).astype(np.float32) for k, name in enumerate(sorted(shapes))}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name, strict=True)


@pytest.mark.parametrize(
    ("source", "count", "total", "squares", "nll", "best"),
    [
        ("hf-mamba", 1656, 6.339096, 609.054414, 4.243056, [0, 2, 13, 15, 10, 5, 14, 5]),
        ("hf-mamba2", 1616, 1.043956, 707.692652, 4.796301, [0, 15, 3, 10, 5, 2, 15, 12]),
    ],
)
def test_golden_models(source, count, total, squares, nll, best):
    golden, tokens = GOLDEN["models"][source], np.array([GOLDEN["tokens"]])
    config, params, stats, report = from_foreign(source, golden["config"], golden_state(source), length=8)
    assert (config.dim, config.depth, config.vocab_size, config.tie_embeddings) == (8, 2, 16, True)
    assert abstract(config).num_params() == count and not stats
    assert (report.matched, report.missing, report.unexpected) == (len(golden["shapes"]), (), ())
    logits = np.asarray(jax.jit(lambda p, x: apply(config, p, {}, x)[0])(params, tokens)[0], np.float64)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=2e-5)
    np.testing.assert_allclose([logits.sum(), np.square(logits).sum()], [total, squares], rtol=0, atol=1e-3)
    assert logits.argmax(-1).tolist() == best
    np.testing.assert_allclose([loss(logits), loss(logits)], [golden["nll"], nll], rtol=0, atol=1e-5)


def loss(logits):
    """Mean next-token loss over the golden tokens, in nats."""
    rows = logits[:-1] - np.log(np.exp(logits[:-1]).sum(-1, keepdims=True))
    return -rows[np.arange(7), GOLDEN["tokens"][1:]].mean()


@pytest.mark.parametrize("source", ["hf-mamba", "hf-mamba2"])
def test_golden_models_agree_in_float64(source):
    """In float32 two correct implementations differ by 1e-5 here; without its rounding they are the same numbers."""
    golden, tokens = GOLDEN["models"][source], np.array([GOLDEN["tokens"]])
    with jax.enable_x64(True):
        config, params, stats, _ = from_foreign(source, golden["config"], golden_state(source), length=8)
        params = {name: jnp.asarray(value, jnp.float64) for name, value in params.items()}
        logits = np.asarray(jax.jit(lambda p, x: apply(config, p, stats, x)[0])(params, tokens)[0])
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, golden["logits_float64"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(loss(logits), golden["nll_float64"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("source", ["hf-mamba", "hf-mamba2"])
def test_the_original_layout_is_the_same_model(source):
    """Its embedding has another name, its head is there although tied, its vocabulary is padded when built."""
    state = golden_state(source)
    config, params, _, _ = from_foreign(source, GOLDEN["models"][source]["config"], state)
    state["backbone.embedding.weight"] = state["lm_head.weight"] = state.pop("backbone.embeddings.weight")
    kind = {"layer": "Mamba2", "headdim": 4, "ngroups": 2} if source == "hf-mamba2" else {"dt_rank": 2}
    original = {
        "d_model": 8,
        "n_layer": 2,
        "vocab_size": 11,
        "ssm_cfg": {"d_state": 4, **kind},
        "rms_norm": True,
        "residual_in_fp32": True,
    }
    ours, arrays, _, report = from_foreign("mamba-ssm", {**original, "pad_vocab_size_multiple": 8}, state)
    assert ours == config and report.repeated == ("lm_head.weight",)
    assert_same(arrays, params)
    with pytest.raises(
        UserError,
        match="mamba-ssm: the config ties the embedding to lm_head.weight, but the file holds two that differ",
    ):
        from_foreign(
            "mamba-ssm",
            {**original, "pad_vocab_size_multiple": 8},
            {**state, "lm_head.weight": state["lm_head.weight"] + 1},
        )


@pytest.mark.parametrize("source", SOURCES)
def test_round_trips_are_bitwise(source, random_arrays):
    config = MODELS[source]
    params, _ = random_arrays(config)
    data, state = to_foreign(source, config, params)
    again, params2, _, _ = from_foreign(source, json.loads(json.dumps(data)), state, length=8)
    filled = {config.pattern: config.spec(config.pattern)}
    assert dataclasses.replace(again, **{again.pattern: again.spec(again.pattern)}) == dataclasses.replace(
        config, **filled
    )
    assert_same(params2, params)
    data2, state2 = to_foreign(source, again, params2)
    assert data2 == data and ("lm_head.weight" in state) == (source != "hf-mamba")
    assert_same(state2, state)


def test_layers_of_longer_periods_keep_their_order(random_arrays):
    """Four layers as two periods of two or as four periods of one are the same layers."""
    twice = dataclasses.replace(MODELS["hf-mamba"], pattern="mamba mamba", kept_layers=())
    params, _ = random_arrays(twice)
    config, arrays, _, _ = from_foreign("hf-mamba", *to_foreign("hf-mamba", twice, params))
    assert config.pattern == "mamba"
    for layer in range(4):
        there = arrays["blocks/layer/layers/0/mixer/out"][layer]
        np.testing.assert_array_equal(there, params[f"blocks/layer/layers/{layer % 2}/mixer/out"][layer // 2])


@pytest.mark.parametrize("layout", ["folder", "file", "shards", "bin"])
def test_files(layout, random_arrays, tmp_path):
    config = MODELS["mamba-ssm"]
    params, _ = random_arrays(config)
    to_folder("mamba-ssm", tmp_path, config, params)
    whole = tmp_path / "model.safetensors"
    path = whole if layout == "file" else tmp_path
    if layout in ("shards", "bin"):
        _, state = to_foreign("mamba-ssm", config, params)
        whole.unlink()
    if layout == "shards":
        names = sorted(state)
        shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
        for file, held in shards.items():
            save_safetensors(tmp_path / file, {name: state[name] for name in held})
        places = {name: file for file, held in shards.items() for name in held}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    if layout == "bin":
        steps = lambda shape: tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        held = {str(i): w for i, w in enumerate(state.values())}
        tensors = [tensor(storage(key, w.size), 0, tuple(map(int, w.shape)), steps(w.shape)) for key, w in held.items()]
        storages = {key: np.ascontiguousarray(w).tobytes() for key, w in held.items()}
        write(tmp_path / "pytorch_model.bin", dict(zip(state, tensors, strict=True)), storages)
    again, arrays, stats, report = from_folder("mamba-ssm", path, length=8)
    assert again.spec("mamba2") == config.spec("mamba2") and not stats and report.to_json()["matched"] == 38
    assert_same(arrays, params)


def test_published_models_by_their_configs():
    count = lambda source, data: abstract(config_from_foreign(source, data)).num_params()
    original = {
        "d_model": 768,
        "n_layer": 24,
        "vocab_size": 50277,
        "ssm_cfg": {},
        "rms_norm": True,
        "fused_add_norm": True,
    }
    assert count("mamba-ssm", {**original, "pad_vocab_size_multiple": 8}) == 129_135_360
    mamba2 = {
        **original,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "tie_embeddings": True,
        "pad_vocab_size_multiple": 16,
    }
    assert count("mamba-ssm", mamba2) == 128_989_632
    hf = {
        "model_type": "mamba",
        "vocab_size": 50280,
        "hidden_size": 2560,
        "num_hidden_layers": 64,
        "time_step_rank": 160,
    }
    assert count("hf-mamba", hf) == 2_768_345_600
    codestral = {
        "model_type": "mamba2",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "num_hidden_layers": 64,
        "num_heads": 128,
    }
    config = config_from_foreign("hf-mamba2", codestral)
    assert abstract(config).num_params() == 7_285_403_648 and not config.tie_embeddings and config.mamba2.ngroups == 8


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("hf-mamba", {"model_type": "gpt2"}, "hf-mamba needs a config of model_type 'mamba', found model_type 'gpt2'$"),
        ("hf-mamba", {"model_type": "mamba2"}, "found model_type 'mamba2'; give --source=hf-mamba2"),
        (
            "mamba-ssm",
            {},
            r"mamba-ssm needs a config of the original layout .*, found model_type 'mamba'; give --source=hf-mamba",
        ),
        ("hf-mamba2", {}, "needs a config of model_type 'mamba2', found model_type 'mamba'; give --source=hf-mamba"),
        ("hf-mamba", {"use_bias": True}, "hf-mamba: use_bias=true is a model that we do not have; valid: false"),
        ("hf-mamba", {"use_conv_bias": False}, "use_conv_bias=false is a model that we do not have; valid: true"),
        ("hf-mamba", {"hidden_act": "gelu"}, 'hidden_act="gelu"'),
        ("hf-mamba", {"hidden_size": None}, "hidden_size=None; valid: whole numbers from 1 to 1048576"),
        ("hf-mamba", {"hidden_size": 12}, "do not fit their config .*of another shape"),
        ("hf-mamba", {"num_hidden_layers": 3}, r"11 missing|10 missing \(backbone.layers.2.mixer.in_proj.weight"),
        ("hf-mamba", {"num_hidden_layers": 1}, r"10 unknown \(backbone.layers.1.mixer.A_log"),
        ("gpt", {}, "unknown source 'gpt'; valid: hf-mamba, hf-mamba2, mamba-ssm"),
    ],
)
def test_what_does_not_fit_is_named(source, change, message):
    with pytest.raises(UserError, match=message):
        from_foreign(source, {**GOLDEN["models"]["hf-mamba"]["config"], **change}, golden_state("hf-mamba"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_layer_idx": [1]}, r"mamba-ssm: attn_layer_idx=\[1\]"),
        ({"d_intermediate": 64}, "d_intermediate=64"),
        ({"rms_norm": False}, "rms_norm=false"),
        ({"ssm_cfg": {"layer": "Mamba9"}}, "ssm_cfg.layer='Mamba9' is a mixer that is not read; valid: Mamba1, Mamba2"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "ssm_cfg: norm_before_gate=true"),
        ({"ssm_cfg": {"headdim": 4}}, "ssm_cfg has an unknown field 'headdim'; known for Mamba1"),
        ({"model_type": "mamba"}, "found model_type 'mamba'; give --source=hf-mamba"),
        ({"n_layer": None}, "n_layer=None; valid: whole numbers from 1 to 16384"),
    ],
)
def test_original_configs_that_are_not_ours(change, message):
    base = {"d_model": 8, "n_layer": 2, "vocab_size": 16}
    with pytest.raises(UserError, match=message):
        config_from_foreign("mamba-ssm", {**base, **change})


def test_models_that_have_no_foreign_class():
    config = MODELS["hf-mamba"]
    with pytest.raises(
        UserError, match="hf-mamba2 holds one kind of mixer in all layers .mamba2.; got pattern='mamba'"
    ):
        config_to_foreign("hf-mamba2", config)
    with pytest.raises(UserError, match="hf-mamba has no place for ffn='glu'; valid: 'none'"):
        config_to_foreign("hf-mamba", dataclasses.replace(config, ffn="glu"))
    with pytest.raises(UserError, match="whole expand factors; 12 inner channels are 1.5 times the 8 channels"):
        config_to_foreign("hf-mamba2", MODELS["mamba-ssm"])
    with pytest.raises(UserError, match="mamba-ssm has the fixed epsilon 1e-05 in its norms; got norm_eps=1e-06"):
        config_to_foreign("mamba-ssm", config)


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(UserError, match="holds no weights; one of model.safetensors, model.safetensors.index.json"):
        from_folder("hf-mamba", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="config.json is missing"):
        from_folder("hf-mamba", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        from_folder("hf-mamba", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN["models"]["hf-mamba"]["config"]))
    index = tmp_path / "model.safetensors.index.json"
    for places in ({"a": "../a.safetensors"}, [], {"a": 3}):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(UserError, match="has no weight_map from arrays to files beside it"):
            from_folder("hf-mamba", index)


def drawn(source, rng):
    """A small config of transformers' class."""
    pick = lambda *values: values[rng.integers(len(values))]
    dim, expand = pick(8, 12, 16), pick(1, 2, 3)
    common = {
        "vocab_size": pick(11, 16, 50),
        "hidden_size": dim,
        "num_hidden_layers": pick(1, 2, 3),
        "state_size": pick(1, 4, 7),
    }
    common |= {
        "expand": expand,
        "conv_kernel": pick(2, 3, 4),
        "tie_word_embeddings": bool(pick(0, 1)),
        "layer_norm_epsilon": pick(1e-5, 1e-3),
    }
    if source == "hf-mamba":
        return common | {"time_step_rank": pick("auto", 3)}
    width = pick(2, 4)
    groups = pick(*(n for n in (1, 2, 3) if dim * expand // width % n == 0))
    limit = pick((0.0, float("inf")), (0.05, 0.6))
    return common | {
        "num_heads": dim * expand // width,
        "head_dim": width,
        "n_groups": groups,
        "chunk_size": 4,
        "time_step_limit": limit,
    }


@pytest.mark.parametrize("number", range(20))
@pytest.mark.parametrize("source", ["hf-mamba", "hf-mamba2"])
def test_transformers_agrees_in_both_directions(source, number, random_arrays, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    prefix = {"hf-mamba": "Mamba", "hf-mamba2": "Mamba2"}[source]
    theirs, settings = getattr(transformers, f"{prefix}ForCausalLM"), getattr(transformers, f"{prefix}Config")
    rng = np.random.default_rng(number)
    torch.manual_seed(number)
    model = theirs(settings(**drawn(source, rng))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "lm_head.weight" or not model.config.tie_word_embeddings:
                p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "theirs")
    config, params, _, _ = from_folder(source, tmp_path / "theirs")
    tokens = rng.integers(0, config.vocab_size, (2, 9))
    logits = lambda model: model(torch.tensor(tokens), use_cache=False).logits.detach().numpy()
    run = jax.jit(
        lambda p, x: apply(dataclasses.replace(config, implementation="auto" if number < 3 else "naive"), p, {}, x)[0]
    )
    expected = logits(model)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(
        run(params, jnp.asarray(tokens)), expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max())
    )
    params, _ = random_arrays(config, number)
    to_folder(source, tmp_path / "ours", config, params)
    again, info = theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = logits(again.eval())
    np.testing.assert_allclose(
        run(params, jnp.asarray(tokens)), expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max())
    )
