"""ONNX export against onnxruntime where jax2onnx is installed, and what is said where it is not."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

from research.errors import UserError
from research.interop import from_source, read_weights
from research.interop.onnx import export_onnx
from research.modules.state import apply

GOLDEN = pathlib.Path(__file__).parents[2] / "third_party" / "unireplknet"
INSTALLED = importlib.util.find_spec("jax2onnx") is not None and importlib.util.find_spec("onnxruntime") is not None


def converted(implementation):
    return from_source("unireplknet", read_weights(GOLDEN / f"golden_{implementation}.safetensors"), image_size=32)[:3]


@pytest.mark.skipif(not INSTALLED, reason="jax2onnx and onnxruntime are not installed")
@pytest.mark.parametrize(("implementation", "key"), [("deployed", "merged_logits"), ("training", "logits")])
@pytest.mark.parametrize("batch", [None, 2])
def test_agrees_with_the_official_class_in_onnxruntime(implementation, key, batch):
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(
        export_onnx(*converted(implementation), batch=batch), providers=["CPUExecutionProvider"]
    )
    with np.load(GOLDEN / "golden.npz") as golden:
        images, logits = golden["images"].transpose(0, 2, 3, 1), golden[key]
    for n in (1, 2) if batch is None else (2,):
        (ours,) = session.run(["logits"], {"images": images[:n]})
        assert np.abs(ours - logits[:n]).max() <= 1e-4 * np.abs(logits).max()


def test_without_jax2onnx_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(UserError, match="pip install .*jax2onnx"):
        export_onnx(*converted("deployed"))


@pytest.mark.skipif(not INSTALLED, reason="jax2onnx is not installed")
def test_bad_batch():
    with pytest.raises(UserError, match="batches of 0"):
        export_onnx(*converted("deployed"), batch=0)


@pytest.mark.skipif(not INSTALLED, reason="jax2onnx and onnxruntime are not installed")
@pytest.mark.parametrize("name", ["attention_small", "mamba_small"])
def test_tokens_are_whole_numbers_by_name(name, random_arrays):
    import onnxruntime

    from tests.models.twins import images, twin

    config = twin(name)
    params, stats = random_arrays(config)
    session = onnxruntime.InferenceSession(
        export_onnx(config, params, stats, batch=2), providers=["CPUExecutionProvider"]
    )
    assert [(i.name, i.type) for i in session.get_inputs()] == [("tokens", "tensor(int32)")]
    tokens = np.asarray(images(config, 2))
    (ours,) = session.run(["logits"], {"tokens": tokens})
    wanted = np.asarray(apply(config, params, stats, tokens)[0])
    assert np.abs(ours - wanted).max() <= 1e-4 * np.abs(wanted).max()
