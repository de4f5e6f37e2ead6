"""Other people's files made to do harm: sizes that cannot be, files that swell or hang, values that are none, names
that paint the terminal."""

import json
import os
import pickle
import signal
import zipfile

import jax
import numpy as np
import pytest

from research.errors import UserError
from research.interop import from_folder, pth, read_weights, safetensors_io
from research.interop.mamba_configs import config_from_foreign as mamba_config
from research.interop.moe_configs import config_from_foreign as moe_config
from research.models.registry import entry, list_models, model_config
from research.models.sequence import SequenceConfig
from research.modules.mixers.mamba import Mamba
from research.modules.state import abstract, initialize
from tests.faults.hostile import hostile_config, small_models


@pytest.fixture(autouse=True)
def in_time():
    """What hangs fails."""

    def late(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def models():
    return small_models()


QWEN = {"model_type": "qwen3_moe", "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 32, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8,
        "moe_intermediate_size": 8, "head_dim": 8}  # fmt: skip
MIXTRAL = {**{k: v for k, v in QWEN.items() if k != "moe_intermediate_size"}, "model_type": "mixtral"}
MAMBA = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 32}
MAMBA2 = {
    "model_type": "mamba2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 32,
    "num_heads": 2,
    "n_groups": 1,
}
SSM = {"d_model": 8, "n_layer": 2, "vocab_size": 32}
BASES = {"hf-qwen3-moe": QWEN, "hf-mixtral": MIXTRAL, "hf-mamba": MAMBA, "hf-mamba2": MAMBA2, "mamba-ssm": SSM}
SIZES = {
    "hf-qwen3-moe": ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads",
                     "num_experts", "intermediate_size", "moe_intermediate_size", "head_dim", "num_experts_per_tok",
                     "decoder_sparse_step"),
    "hf-mixtral": ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_experts",
                   "intermediate_size"),
    "hf-mamba": ("hidden_size", "num_hidden_layers", "vocab_size", "state_size", "conv_kernel", "time_step_rank"),
    "hf-mamba2": ("hidden_size", "num_hidden_layers", "vocab_size", "state_size", "num_heads", "head_dim", "n_groups"),
    "mamba-ssm": ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"),
}  # fmt: skip


@pytest.mark.parametrize("source", SIZES)
def test_sizes_that_cannot_be_are_refused_by_name_before_anything_is_built(source):
    read = moe_config if source in ("hf-qwen3-moe", "hf-mixtral") else mamba_config
    read(source, BASES[source])
    for name in SIZES[source]:
        for value in (10**9, 10**30, -1, 2.5, "x", "7", True, [1], float("nan")):
            if name == "head_dim" and value in (None,):
                continue
            with pytest.raises(UserError, match=rf"^{source}: {name}=.*; valid: whole numbers from [01] to \d+$"):
                read(source, {**BASES[source], name: value})


@pytest.mark.parametrize(
    ("source", "name", "values"),
    [
        ("hf-mamba", "layer_norm_epsilon", (float("nan"), float("inf"), -1e-5, "1e-5", None, [])),
        ("hf-mamba", "expand", (float("nan"), 0, -2, 1e300, "2")),
        ("hf-mixtral", "rms_norm_eps", (float("nan"), -1, True)),
        ("hf-mixtral", "rope_theta", (0, -1.0, float("nan"), "x")),
        ("hf-qwen3-moe", "router_aux_loss_coef", (float("nan"), -1)),
        ("hf-qwen3-moe", "tie_word_embeddings", (2, "perhaps", None)),
        ("hf-mamba2", "time_step_limit", ([float("nan"), 1.0], [1.0], [2.0, 1.0], "x", 3)),
        ("mamba-ssm", "ssm_cfg", ({"expand": 1e9}, {"d_state": 0}, [], {"layer": []}, {"dt_rank": -1})),
    ],
)
def test_numbers_that_no_model_computes_with_are_refused(source, name, values):
    read = moe_config if source in ("hf-qwen3-moe", "hf-mixtral") else mamba_config
    for value in values:
        with pytest.raises(UserError, match=f"^{source}: ") as told:
            read(source, {**BASES[source], name: value})
        assert "\n" not in str(told.value) and len(str(told.value)) < 250


def folder_of(tmp_path, data, state):
    (tmp_path / "config.json").write_text(json.dumps(data))
    safetensors_io.save_safetensors(tmp_path / "model.safetensors", state)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("source", "change", "needed"),
    [("hf-mamba", {"num_hidden_layers": 2**14}, "16,384"), ("hf-mixtral", {"num_local_experts": 2**16}, "131,072")],
)
def test_more_layers_and_experts_than_the_file_has_arrays(models, tmp_path, source, change, needed):
    data, state = models[source]
    from_folder(source, folder_of(tmp_path, data, state))
    with pytest.raises(
        UserError,
        match=f"{source}: the weights do not fit their config: it needs {needed} arrays or more, the file holds",
    ):
        from_folder(source, folder_of(tmp_path, {**data, **change}, state))


def test_values_that_are_none(models, tmp_path):
    data, state = models["hf-mamba"]
    name, other = "backbone.layers.0.mixer.D", "backbone.norm_f.weight"
    spoilt = np.array(state[name])
    spoilt[3] = np.nan
    cases = {
        f"{name} holds 1 of 16 numbers that are NaN, infinite or beyond float32$": {name: spoilt},
        f"{name} holds 16 of 16 .*, {other} holds int8, needs floating-point numbers$": {
            name: spoilt * np.inf,
            other: np.ones(8, np.int8),
        },
        f"{other} holds 8 of 8 numbers that are NaN, infinite or beyond": {other: np.full(8, 1e300)},
    }
    for message, change in cases.items():
        with pytest.raises(UserError, match=message):
            from_folder("hf-mamba", folder_of(tmp_path, data, {**state, **change}))


def test_model_folders_of_ours_are_held_to_the_same(tmp_path):
    config = SequenceConfig(vocab_size=8, length=8, dim=8, depth=2, pattern="mamba", mamba=Mamba(d_state=2))
    params, stats = initialize(config, jax.random.key(0))
    safetensors_io.save_folder(tmp_path, config, params, stats)
    safetensors_io.load_folder(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    for field, value in {
        "depth": 10**9,
        "dim": -8,
        "norm_eps": float("nan"),
        "vocab_size": 2.5,
        "pattern": ["mamba"],
        "tie_embeddings": 2,
    }.items():
        (tmp_path / "config.json").write_text(json.dumps({**whole, "model": {**whole["model"], field: value}}))
        with pytest.raises(UserError, match=rf"config.json: .*SequenceConfig.{field}=.*; valid: "):
            safetensors_io.load_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(whole))
    for bad, told in (
        (np.full(8, np.nan, np.float32), "8 of 8 numbers that are NaN"),
        (np.ones(8, np.int32), "holds int32, needs floating"),
    ):
        safetensors_io.save_folder(tmp_path, config, {**params, "norm/scale": bad}, stats)
        with pytest.raises(UserError, match=f"params/norm/scale .*{told}|{told}"):
            safetensors_io.load_folder(tmp_path)


FAMILIES = {type(entry(name).config): name for name in list_models()}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES.values())
def test_the_largest_fields_that_are_believed_fill_nothing(name):
    """Every whole number of every family's config in turn: refused, or a model whose shapes are known in seconds,
    without its arrays."""
    config = model_config(name, **entry(name).tiny)
    plain = safetensors_io.config_to_json(config)
    for field, value in plain.items():
        if isinstance(value, bool) or not (
            isinstance(value, int) or (isinstance(value, list) and value and isinstance(value[0], int))
        ):
            continue
        large, entry_ = safetensors_io.LARGEST_FIELD, 2**10  # of a file of few arrays
        try:
            abstract(
                safetensors_io.config_from_json(
                    {**plain, field: large if isinstance(value, int) else [entry_, *value[1:]]}, entry_
                )
            )
        except UserError:
            continue


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step", [pickle.EMPTY_DICT, pickle.NONE + pickle.MEMOIZE, pickle.MARK], ids=["dicts", "memo", "marks"]
)
def test_pickles_that_make_objects_without_end(tmp_path, step):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr(
            "a/data.pkl", pickle.PROTO + b"\x04" + pickle.EMPTY_DICT + step * (3 * 10**6 // len(step)) + pickle.STOP
        )
    with pytest.raises(UserError, match="its data.pkl makes more objects than the tensors of a state dict need"):
        pth.read_pth(tmp_path / "a.pth")


def header(tmp_path, entries):
    text = json.dumps(entries).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    return str(path)


def test_headers_that_numpy_cannot_follow(tmp_path):
    path = header(tmp_path, {"a": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}})
    with pytest.raises(UserError, match="a has 65 axes; valid: at most 32$"):
        read_weights(path)
    path = header(tmp_path, {"a\0b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    assert list(read_weights(path)) == ["a\0b"]
    path = header(
        tmp_path,
        {
            "a": {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]},
            "b": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        },
    )
    assert {name: w.shape for name, w in read_weights(path).items()} == {"a": (2**40, 0), "b": ()}


def test_hostile_names_neither_paint_nor_flood_the_terminal(models, tmp_path):
    data, state = models["hf-mamba"]
    hostile = {"\x1b[2J\x07\0" + "n" * 10**5: np.zeros(1, np.float32)}
    with pytest.raises(UserError, match=r"1 unknown \(\\x1b\[2J\\x07\\x00n+\.\.\.\)") as told:
        from_folder("hf-mamba", folder_of(tmp_path, data, {**state, **hostile}))
    assert str(told.value).isprintable() and len(str(told.value)) < 300
    for field in ("model_type", "hidden_act", "vocab_size"):
        with pytest.raises(UserError) as told:
            from_folder("hf-mamba", folder_of(tmp_path, {**data, field: "\x1b[2J" * 10**5}, state))
        assert str(told.value).isprintable() and len(str(told.value)) < 300


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_pipes_and_endless_devices_hang_nothing(models, tmp_path, name):
    folder_of(tmp_path, *models["hf-mamba"])
    for make in (lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero")):
        (tmp_path / name).unlink()
        make(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is not a regular file"):
            from_folder("hf-mamba", str(tmp_path))


def test_mutations_of_the_fuzzer_are_functions_of_their_number(models):
    import random

    data = models["mamba-ssm"][0]
    assert repr(hostile_config(random.Random(3), data)) == repr(hostile_config(random.Random(3), data)) != repr(data)
