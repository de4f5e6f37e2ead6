"""Exported programs equal the model, at any batch when that is left open."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("flatbuffers")

from research.errors import UserError
from research.interop.stablehlo import export_stablehlo, load_stablehlo
from research.models.registry import entry, model_config


@pytest.fixture(scope="module")
def model(random_arrays):
    tiny = entry("unireplknet_a").tiny | {
        "depths": (1, 1, 2, 1),
        "kernel_sizes": ((3,), (13,), (7,), (5,)),
        "deploy": True,
    }
    config = model_config("unireplknet_a", **tiny)
    return config, *random_arrays(config)


def images(config, n):
    return jax.random.normal(jax.random.key(1), (n, *config.input_shape()))


def agree(ours, theirs, tolerance=1e-5):
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.slow
def test_constants_with_open_batch_for_three_platforms(model, naive_logits):
    config = model[0]
    program = load_stablehlo(export_stablehlo(*model))
    assert program.platforms == ("cpu", "cuda", "tpu")
    for n in (1, 3):
        agree(program.call(images(config, n)), naive_logits(*model, images(config, n)))
    text = program.mlir_module()
    assert "stablehlo.convolution" in text and "@main" in text


@pytest.mark.slow
def test_weights_as_arguments_at_a_fixed_batch(model, naive_logits):
    config, params, stats = model
    naive = dataclasses.replace(config, implementation="naive")
    data = export_stablehlo(naive, params, stats, batch=2, platforms=("cpu",), weights="arguments")
    constants = export_stablehlo(naive, params, stats, batch=2, platforms=("cpu",))
    size = sum(p.size * 4 for p in params.values())
    assert len(constants) - len(data) > 0.8 * size
    double = {k: v * 1.5 for k, v in params.items()}
    agree(
        load_stablehlo(data).call(double, stats, images(config, 2)),
        naive_logits(config, double, stats, images(config, 2)),
    )
    with pytest.raises(ValueError, match="shape"):
        load_stablehlo(data).call(double, stats, images(config, 3))


def test_bad_requests(model):
    with pytest.raises(UserError, match="cannot export for gpu; valid: cpu, cuda, rocm, tpu"):
        export_stablehlo(*model, platforms=("gpu",))
    with pytest.raises(UserError, match="batches of 0"):
        export_stablehlo(*model, batch=0)
    with pytest.raises(UserError, match="valid: constants, arguments"):
        export_stablehlo(*model, weights="inside")
    with pytest.raises(UserError, match="not a program exported"):
        load_stablehlo(b"nonsense")
