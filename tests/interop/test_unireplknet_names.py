"""Official UniRepLKNet weights under our names: golden data of the official class, exact round trips, errors."""

import dataclasses
import importlib.util
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.interop import from_source, pth, read_weights
from research.interop.unireplknet_names import (
    from_official,
    infer_config,
    match,
    name_pairs,
    shortest_period,
    to_official,
)
from research.models.unireplknet import VARIANTS, UniRepLKNetConfig, merge_reparam
from research.modules.state import abstract, apply

GOLDEN = pathlib.Path(__file__).parents[2] / "third_party" / "unireplknet"
OFFICIAL = os.environ.get("NESTAX_UNIREPLKNET")  # path of the official unireplknet.py


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name, strict=True)


def assert_agree(ours, theirs, tolerance):
    """max|a-b| <= t max|b|."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def outputs(config, params, stats, images_NCHW):
    """Logits, and the gradient of the sum of their squares with respect to the images, NCHW; naive ops compile
    faster."""
    config = dataclasses.replace(config, implementation="naive")
    x = jnp.asarray(images_NCHW.transpose(0, 2, 3, 1))

    @jax.jit
    def run(x):
        logits, vjp = jax.vjp(lambda x: apply(config, params, stats, x)[0], x)
        return logits, vjp(2 * logits)[0]

    logits, grad = run(x)
    return logits, np.asarray(grad).transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "golden.npz") as data:
        return dict(data)


@pytest.mark.slow
def test_golden_training_form_and_our_merge(golden):
    state = read_weights(GOLDEN / "golden_training.safetensors")
    config, params, stats, report = from_source("unireplknet", state, image_size=32)
    assert (config.depths, config.dims, config.mlp_dims) == ((1, 2, 4, 1), (8, 8, 12, 16), (32, 32, 48, 64))
    assert config.kernel_sizes == ((3,), (7,), (13, 3), (5,))
    assert (config.num_classes, config.in_channels, config.deploy) == (7, 3, False)
    assert (report.matched, report.unexpected, report.batches_tracked) == (272, (), 1234)
    logits, grad = outputs(config, params, stats, golden["images"])
    assert_agree(logits, golden["logits"], 1e-5)
    assert_agree(grad, golden["image_grad"], 1e-5)
    merged = merge_reparam(config, params, stats)
    official = read_weights(GOLDEN / "golden_deployed.safetensors")
    ours = to_official(*merged)
    assert ours.keys() == official.keys()
    for name in official:
        assert_agree(ours[name], official[name], 1e-5)


@pytest.mark.slow
def test_golden_deployed_form(golden):
    state = read_weights(GOLDEN / "golden_deployed.safetensors")
    config, params, stats, report = from_official(state, image_size=32)
    assert config.deploy and not stats and report.matched == len(state) == 112
    logits, grad = outputs(config, params, stats, golden["images"])
    assert_agree(logits, golden["merged_logits"], 1e-5)
    assert_agree(grad, golden["merged_image_grad"], 1e-5)


@pytest.mark.parametrize("implementation", ["training", "deployed"])
def test_round_trip_of_official_weights_is_bitwise(implementation):
    state = read_weights(GOLDEN / f"golden_{implementation}.safetensors")
    config, params, stats, report = from_official(state)
    assert_same(to_official(config, params, stats, batches_tracked=report.batches_tracked), state)


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("kernels", [((3,), (13,), (13, 3, 3), (11,)), ((5, 0), (9,), (17, 15), (7,))])
def test_round_trip_of_our_weights_is_bitwise(kernels, deploy, random_arrays):
    depths = tuple(2 * len(p) for p in kernels)
    sizes = {
        "depths": depths,
        "dims": (8, 12, 16, 20),
        "mlp_dims": (16, 36, 16, 100),
        "num_classes": 5,
        "in_channels": 1,
    }
    config = UniRepLKNetConfig(kernel_sizes=kernels, deploy=deploy, **sizes)
    params, stats = random_arrays(config)
    again, params2, stats2, report = from_official(to_official(config, params, stats, batches_tracked=7))
    assert again == config and not report.unexpected and report.batches_tracked == (None if deploy else 7)
    assert_same(params, params2)
    assert_same(stats, stats2)


@pytest.mark.parametrize("deploy", [pytest.param(False, marks=pytest.mark.slow), True])
def test_config_of_every_variant_from_shapes_alone(deploy):
    for size, config in VARIANTS.items():
        config = UniRepLKNetConfig(config.depths, config.dims, config.kernel_sizes, num_classes=21841, deploy=deploy)
        full = abstract(config)
        pairs = {p.official: p for p in name_pairs(config)}
        arrays = {**full.params, **full.stats}
        shapes = {name: official_shape(p, arrays[p.ours].shape) for name, p in pairs.items()}
        assert infer_config(shapes) == config, size
        assert match(config, shapes).matched == len(shapes)
        values = sum(int(np.prod(s)) for name, s in shapes.items() if "running" not in name)
        assert values == full.num_params()


def official_shape(pair, shape):
    layer = shape if pair.index is None else shape[1:]
    match pair.layout:
        case "same":
            return tuple(layer)
        case "linear":
            return layer[::-1]
        case "pointwise":
            return (*layer[::-1], 1, 1)
        case "conv":
            return (layer[3], layer[2], layer[0], layer[1])
        case "depthwise":
            return (layer[2], 1, layer[0], layer[1])
    return (1, 1, 1, layer[0])


def test_shortest_period():
    assert shortest_period((13, 3) * 9) == (13, 3)
    assert shortest_period((13, 3, 3) * 9) == (13, 3, 3)
    assert shortest_period((13,) * 6) == (13,)
    assert shortest_period((13, 3, 13)) == (13, 3, 13)
    assert shortest_period((3,)) == (3,)


@pytest.fixture
def state():
    return dict(read_weights(GOLDEN / "golden_training.safetensors"))


def test_what_does_not_match_is_named(state):
    _, _, _, report = from_official(state | {"stages.0.0.extra": np.zeros(3)})
    assert report.unexpected == ("stages.0.0.extra",)
    wrong = state | {"stages.1.1.act.1.gamma": np.zeros((1, 1, 1, 5), np.float32)}
    del wrong["stages.0.0.se.up.bias"], wrong["stages.2.3.gamma"]
    report = match(infer_config({k: v.shape for k, v in wrong.items()}), {k: v.shape for k, v in wrong.items()})
    assert report.missing == ("stages.0.0.se.up.bias", "stages.2.3.gamma")
    assert report.wrong_shape == (("stages.1.1.act.1.gamma", (1, 1, 1, 5), (1, 1, 1, 32)),)
    with pytest.raises(
        UserError,
        match=r"2 missing \(stages.0.0.se.up.bias, stages.2.3.gamma\); 1 of wrong shape \(stages.1.1.act.1.gamma is",
    ):
        from_official(wrong)
    with pytest.raises(UserError, match=r"training form: 1 of wrong shape \(head.bias is \(8,\), needs \(7,\)\)"):
        from_official(state | {"head.bias": np.zeros(8, np.float32)})


def test_what_is_no_classifier_is_refused(state):
    with pytest.raises(UserError, match="do not count up from stages.0.0"):
        infer_config({"layer1.0.conv1.weight": (64, 3, 7, 7)})
    with pytest.raises(UserError, match="do not count up"):
        infer_config({k: v.shape for k, v in state.items() if not k.startswith("stages.2.1.")})
    with pytest.raises(UserError, match="without head.weight: a detection or segmentation backbone"):
        from_official({k: v for k, v in state.items() if not k.startswith("head")})
    with pytest.raises(UserError, match="stages.0.0.pwconv1.1.weight has shape"):
        from_official(state | {"stages.0.0.pwconv1.1.weight": np.zeros(4)})
    with pytest.raises(UserError, match="kernel size 21 in stage 1"):
        from_official(state | {"stages.0.0.dwconv.weight": np.zeros((8, 1, 21, 21))})
    with pytest.raises(UserError, match="stem strides"):
        to_official(UniRepLKNetConfig(stem_strides=(1, 1)), {}, {})


def test_prefix_of_distributed_training_and_half_precision(state, golden):
    halves = {f"module.{k}": v.astype(np.float16) if v.dtype == np.float32 else v for k, v in state.items()}
    _, params, stats, report = from_official(halves)
    assert report.matched == 272 and {a.dtype for a in (*params.values(), *stats.values())} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["head/bias"], state["head.bias"].astype(np.float16).astype(np.float32))


SIZES = [
    {
        "depths": (1, 1, 2, 1),
        "dims": (16, 8, 24, 12),
        "kernel_sizes": ((0,), (9,), (15, 5), (11,)),
        "num_classes": 3,
        "in_chans": 1,
    },
    {
        "depths": (2, 1, 6, 2),
        "dims": (8, 16, 16, 32),
        "kernel_sizes": ((3, 3), (17,), (13, 3, 3) * 2, (7, 13)),
        "num_classes": 10,
        "in_chans": 4,
    },
    {
        "depths": (2, 2, 6, 2),
        "dims": (40, 80, 160, 320),
        "kernel_sizes": ((3,) * 2, (13,) * 2, (13,) * 6, (13,) * 2),
        "num_classes": 1000,
        "in_chans": 3,
    },
]


@pytest.mark.skipif(not OFFICIAL, reason="NESTAX_UNIREPLKNET=PATH/unireplknet.py names no official file")
@pytest.mark.parametrize("seed", range(len(SIZES)))
def test_against_the_official_class(tmp_path, seed):
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    model = maker.random_model(maker.load_official(OFFICIAL), seed, **SIZES[seed])
    x = torch.randn(2, SIZES[seed]["in_chans"], 64, 96)
    for implementation in ("training", "deployed"):
        if implementation == "deployed":
            model.reparameterize_unireplknet()
        torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "w.pth")
        safetensors_torch.save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors"
        )
        state = pth.read_pth(tmp_path / "w.pth")
        assert_same(state, read_weights(tmp_path / "w.safetensors"))
        config, params, stats, report = from_official(state, image_size=64)
        assert not report.unexpected and config.deploy == (implementation == "deployed")
        theirs = maker.run(model, x)
        ours = outputs(config, params, stats, x.numpy())
        for a, b in zip(ours, theirs, strict=True):
            assert_agree(a, b, 1e-5)
        back = to_official(config, params, stats, batches_tracked=report.batches_tracked)
        assert_same(back, state)
        model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in back.items()}, strict=True)
