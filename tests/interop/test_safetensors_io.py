"""Model folders: exact round trips of arrays and configs, and every kind of damage refused in words."""

import dataclasses
import json
import os

import ml_dtypes
import numpy as np
import pytest

from research.errors import UserError
from research.interop import safetensors_io as io
from research.models.registry import entry, list_models, model_config


@pytest.fixture(scope="module")
def model(random_arrays):
    config = model_config("unireplknet_t", **entry("unireplknet_t").tiny)
    return config, *random_arrays(config)


@pytest.fixture
def folder(model, tmp_path):
    io.save_folder(tmp_path / "m", *model, {"source": "here"})
    return tmp_path / "m"


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name, strict=True)


def test_arrays_round_trip(tmp_path):
    base = np.arange(12).reshape(3, 4)
    arrays = {f"a/{np.dtype(d)}": base.astype(d) for d in io.DTYPES.values()}
    arrays |= {
        "transposed": base.T.astype(np.float32),
        "scalar": np.float32(2.5).reshape(()),
        "empty": np.zeros((0, 3), np.float16),
    }
    io.save_safetensors(tmp_path / "a.safetensors", arrays, {"format": "nestax"})
    assert_same(io.load_safetensors(tmp_path / "a.safetensors"), arrays)
    io.save_safetensors(tmp_path / "b.safetensors", {"empty": np.zeros((0, 3), np.float32)})
    assert io.load_safetensors(tmp_path / "b.safetensors")["empty"].shape == (0, 3)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]
    with pytest.raises(TypeError, match="safetensors holds F64, .*: c is complex64"):
        io.save_safetensors(tmp_path / "c.safetensors", {"c": np.zeros(3, np.complex64)})


def test_reads_what_other_libraries_write(tmp_path):
    st = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    x = torch.randn(3, 5)
    st.save_file({"x": x, "b": x.bfloat16()}, tmp_path / "a.safetensors")
    got = io.load_safetensors(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(got["x"], x.numpy(), strict=True)
    np.testing.assert_array_equal(got["b"], x.numpy().astype(ml_dtypes.bfloat16), strict=True)


def header(text: str, body: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + body


DAMAGED = {
    "empty": b"",
    "short": header("{}")[:9],
    "huge header": (2**62).to_bytes(8, "little") + b"{}",
    "no json": header("{nonsense}"),
    "out of bounds": header('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', bytes(8)),
    "overlap": header(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "size": header('{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4]}}', bytes(4)),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(tmp_path, case):
    (tmp_path / "a.safetensors").write_bytes(DAMAGED[case])
    with pytest.raises(UserError, match="cannot read .* as safetensors"):
        io.load_safetensors(tmp_path / "a.safetensors")


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="none is missing"):
        io.load_safetensors(tmp_path / "none")
    (tmp_path / "a").write_bytes(header('{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}', bytes(4)))
    with pytest.raises(UserError, match="a is of type F8_E4M3; valid: F64, F32"):
        io.load_safetensors(tmp_path / "a")
    with pytest.raises(UserError, match="cannot write"):
        io.save_safetensors(tmp_path / "no" / "a", {"a": np.zeros(1)})


@pytest.mark.parametrize("name", list_models())
def test_every_registered_config_round_trips_through_json(name):
    for config in (entry(name).config, model_config(name, **entry(name).tiny)):
        text = json.dumps(io.config_to_json(config))
        again = io.config_from_json(json.loads(text))
        assert again == config and type(again) is type(config) and hash(again) == hash(config)


def test_config_errors(model):
    good = io.config_to_json(model[0])
    with pytest.raises(UserError, match="unknown family 'nosuchnet'; valid: .*unireplknet"):
        io.config_from_json(good | {"family": "nosuchnet"})
    with pytest.raises(UserError, match="no field 'depth'; near: depths"):
        io.config_from_json(good | {"depth": [1]})
    with pytest.raises(UserError, match="UniRepLKNetConfig.depths=3; valid: a list of whole numbers"):
        io.config_from_json(good | {"depths": 3})
    with pytest.raises(UserError, match="kernel size 21"):
        io.config_from_json(good | {"kernel_sizes": [[21]] * 4, "depths": [1] * 4, "kept_layers": []})
    with pytest.raises(UserError, match="unknown family"):
        io.config_from_json([1])
    with pytest.raises(TypeError, match="does not survive JSON"):
        io.config_to_json(dataclasses.replace(model[0], remat=[1]))


def test_folder_round_trip(model, folder):
    config, params, stats = io.load_folder(folder)
    assert config == model[0]
    assert_same(params, model[1])
    assert_same(stats, model[2])
    assert json.loads((folder / "config.json").read_text())["source"] == "here"
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_an_interrupted_save_leaves_no_mixture(model, folder, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    config, params, stats = model
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        io.save_folder(folder, config, params, stats)
    assert (folder / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    assert_same(io.load_folder(folder)[1], params)


@pytest.mark.parametrize("moves", range(6))
def test_a_save_that_is_killed_between_its_moves_is_refused_not_a_mixture(model, folder, monkeypatch, moves):
    """Twice the parameters over an older model, its tokenizer and its shards."""
    config, params, stats = model
    for name in ("tokenizer.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"):
        (folder / name).write_text("older")
    twice, replace, left = {k: 2 * v for k, v in params.items()}, os.replace, [moves]

    def move(*paths):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(*paths)

    monkeypatch.setattr(os, "replace", move)
    try:
        io.save_folder(folder, config, twice, stats, texts={"report.json": "{}"})
    except KeyboardInterrupt:
        monkeypatch.undo()
        try:
            found = io.load_folder(folder)[1]
        except UserError as error:
            assert "is not a model folder" in str(error)
        else:
            assert_same(found, params)
            assert (folder / "tokenizer.json").exists()
    else:
        assert_same(io.load_folder(folder)[1], twice)
        assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "report.json"]


def test_weights_of_another_config_are_refused(model, folder):
    path = folder / "config.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"model": good["model"] | {"drop_path_rate": 0.25}}))
    with pytest.raises(UserError, match="was written with another config"):
        io.load_folder(folder)


def test_folders_that_do_not_fit(model, folder, tmp_path):
    config, params, stats = model
    path = folder / "config.json"
    good = json.loads(path.read_text())
    arrays = io.load_safetensors(folder / "model.safetensors")
    io.save_safetensors(folder / "model.safetensors", arrays)  # as others write them, without a config
    path.write_text(json.dumps(good | {"model": good["model"] | {"num_classes": 11}}))
    with pytest.raises(UserError, match=r"params/head/bias is \(10,\), needs \(11,\)"):
        io.load_folder(folder)
    for text in ("{", "[]", "{}", "[" * 10**5):
        path.write_text(text)
        with pytest.raises(UserError, match="config.json is damaged.*no model config"):
            io.load_folder(folder)
    path.write_text(json.dumps(good))
    io.save_safetensors(
        folder / "model.safetensors", {f"params/{k}": v for k, v in params.items()} | {"more": np.zeros(1)}
    )
    with pytest.raises(UserError, match="is missing.* and [0-9]+ more"):
        io.load_folder(folder)
    with pytest.raises(UserError, match="is not a model folder"):
        io.load_folder(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the folder"):
        io.save_folder(tmp_path / "file", config, params, stats)
