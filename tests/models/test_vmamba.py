"""VMamba against numpy, pixel by pixel; the symmetry of its four directions; implementations, sub-networks,
mistakes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models.vmamba import VARIANTS, VMambaConfig
from research.modules.axes import Init
from research.modules.ss2d import SS2D
from research.modules.state import abstract, apply, initialize, merge, split
from research.nested.slicing import slice_like
from tests.models.twins import fast_jit, images, loss_and_logits, random_arrays
from tests.ops.compare import assert_agree

CONFIG = VMambaConfig(
    depths=(1, 2),
    dims=(6, 8),
    ssm_ratio=1.5,
    d_state=2,
    dt_ranks=(1, 2),
    mlp_dims=(10, 12),
    num_classes=5,
    image_size=7,
    stem_strides=(1, 2),
    implementation="cpu",
)
COUNTS = {
    "vmamba_tiny_s1l8": 30_249_064,
    "vmamba_tiny_s2l5": 30_705_832,
    "vmamba_small_s2l15": 50_147_752,
    "vmamba_base_s2l15": 88_557_800,
}


def part(params, prefix):
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}


def layer_norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2


def window(x, kernel, i, j, stride):
    """Yields (tap of a 3x3 kernel, pixel under it) of an output at (i, j); what is outside the map is left out."""
    for di in range(3):
        for dj in range(3):
            r, c = i * stride + di - 1, j * stride + dj - 1
            if 0 <= r < x.shape[0] and 0 <= c < x.shape[1]:
                yield kernel[di, dj], x[r, c]


def convolve(x, p, stride):
    """3x3 convolution with a border of one zero, then layer norm."""
    out = np.zeros(((x.shape[0] - 1) // stride + 1, (x.shape[1] - 1) // stride + 1, len(p["conv/bias"])))
    for i, j in np.ndindex(out.shape[:2]):
        out[i, j] = p["conv/bias"] + sum(pixel @ tap for tap, pixel in window(x, p["conv/kernel"], i, j, stride))
    return layer_norm(out, part(p, "norm/"))


def ss2d(p, x):
    """One map [H, W, D]: each direction visits the pixels of a list, and adds what it finds there."""
    height, width, _ = x.shape
    x, u = x @ p["x"], np.zeros((height, width, p["x"].shape[1]))
    for i, j in np.ndindex(height, width):
        u[i, j] = sum(tap * pixel for tap, pixel in window(x, p["window"], i, j, 1))
    u = u / (1 + np.exp(-u))
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    y = np.zeros_like(u)
    for k, places in enumerate((rows, columns, rows[::-1], columns[::-1])):
        h = np.zeros_like(p["a_log"][k])
        for place in places:
            v = u[place]
            delta = np.log1p(np.exp(v @ p["dt_down"][k] @ p["dt_up"][k] + p["dt_bias"][k]))
            h = np.exp(-delta[:, None] * np.exp(p["a_log"][k])) * h + np.outer(delta * v, v @ p["b"][k])
            y[place] += h @ (v @ p["c"][k]) + p["skip"][k] * v
    return layer_norm(y, part(p, "norm/")) @ p["out"]


def network(params, image, config):
    """Logits of one image [H, W, C]."""
    x = gelu(convolve(image, part(params, "stem/"), config.stem_strides[0]))
    for s, depth in enumerate(config.depths):
        x = convolve(x, part(params, f"reduce/{s}/"), config.stem_strides[1] if s == 0 else 2)
        for i in range(depth):
            p = {k: v[i] for k, v in part(params, f"stages/{s}/layer/").items()}
            x = x + ss2d(part(p, "mixer/"), layer_norm(x, part(p, "norm1/")))
            hidden = gelu(layer_norm(x, part(p, "norm2/")) @ p["mlp/up/kernel"] + p["mlp/up/bias"])
            x = x + hidden @ p["mlp/down/kernel"] + p["mlp/down/bias"]
    x = layer_norm(x, part(params, "norm/"))
    return x.mean((0, 1)) @ params["head/kernel"] + params["head/bias"]


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_is_the_published_one(name):
    assert abstract(VARIANTS[name]).num_params() == COUNTS[name]


def test_agrees_with_numpy():
    with jax.enable_x64(True):
        params, _ = random_arrays(CONFIG, dtype=np.float64)
        x = images(CONFIG, 2, dtype=np.float64)
        logits = fast_jit(functools.partial(apply, CONFIG))(params, {}, x)[0]
    params = {k: np.asarray(v) for k, v in params.items()}
    np.testing.assert_allclose(
        logits, np.stack([network(params, image, CONFIG) for image in np.asarray(x)]), rtol=0, atol=1e-11
    )


@functools.cache
def mixer():
    """Random parameters of an SS2D in float64, their axes, and a function that runs it."""
    seen, rng = {}, np.random.default_rng(0)

    def build(key):
        seen["graphdef"], params, _, seen["axes"] = split(
            SS2D(5, 6, 2, 1, "embed", "layer", Init(key), implementation="cpu")
        )
        return params

    shapes = jax.eval_shape(build, jax.random.key(0))
    params = {k: jnp.asarray(rng.normal(0, 0.5, v.shape)) for k, v in shapes.items()}
    return params, seen["axes"], fast_jit(lambda p, x: merge(seen["graphdef"], p, {})(x))


@pytest.mark.parametrize(
    ("turn", "order"),
    [
        (lambda x: jnp.swapaxes(x, -3, -2), (1, 0, 3, 2)),
        (lambda x: x[..., ::-1, ::-1, :], (2, 3, 0, 1)),
    ],
    ids=["transposed", "turned"],
)
def test_turned_map_with_exchanged_directions_gives_the_turned_output(turn, order):
    with jax.enable_x64(True):
        params, axes, run = mixer()
        x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 5)))
        other = {k: v[np.array(order)] if "layer/directions" in axes[k] else v for k, v in params.items()}
        windows = {"window": turn(params["window"])}
        np.testing.assert_allclose(run({**other, **windows}, turn(x)), turn(run(params, x)), rtol=0, atol=1e-12)
        assert np.abs(run({**params, **windows}, turn(x)) - turn(run(params, x))).max() > 1e-2


def test_mixer_agrees_with_numpy_on_a_map_that_is_not_square():
    with jax.enable_x64(True):
        params, _, run = mixer()
        x = np.random.default_rng(2).normal(size=(1, 2, 5, 5))
        y = run(params, jnp.asarray(x))
    np.testing.assert_allclose(y[0], ss2d({k: np.asarray(v) for k, v in params.items()}, x[0]), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_naive_implementation_agrees_in_outputs_and_gradients():
    config = dataclasses.replace(
        CONFIG,
        stem_strides=(2, 1),
        depths=(1,),
        dims=(6,),
        dt_ranks=(1,),
        mlp_dims=(10,),
        inner_dims=(),
        kept_layers=(),
    )
    params, _ = random_arrays(config)
    x = images(config)
    results = []
    for implementation in ("cpu", "naive"):
        chosen = dataclasses.replace(config, implementation=implementation)
        grad = jax.value_and_grad(
            lambda p, x, chosen=chosen: loss_and_logits(chosen, p, {}, x), argnums=(0, 1), has_aux=True
        )
        results.append(fast_jit(grad)(params, x))
    assert_agree(*results, 1e-5)


def test_drop_path_needs_training_and_a_key():
    config = VMambaConfig(
        depths=(3,),
        dims=(8,),
        num_classes=5,
        image_size=4,
        stem_strides=(1, 1),
        drop_path_rate=0.9,
        implementation="naive",
    )
    params, _ = random_arrays(config)
    x = jnp.broadcast_to(images(config, 1), (16, 4, 4, 3))
    run = lambda mode, key: np.asarray(fast_jit(functools.partial(apply, config, mode=mode))(params, {}, x, key=key)[0])
    calm = run("eval", jax.random.key(0))
    np.testing.assert_allclose(calm, np.broadcast_to(calm[:1], calm.shape), rtol=1e-5, atol=1e-6)
    dropped = run("train", jax.random.key(0))
    assert np.abs(dropped - dropped[:1]).max() > 0.01


@pytest.mark.slow
def test_initial_numbers_and_outputs_of_the_stages():
    config = VMambaConfig(
        depths=(1, 2), dims=(8, 16), num_classes=5, image_size=8, stem_strides=(2, 1), implementation="naive"
    )
    params, _ = fast_jit(functools.partial(initialize, config))(jax.random.key(0))
    p = part(params, "stages/1/layer/mixer/")
    steps = np.log1p(np.exp(np.float64(p["dt_bias"])))
    assert p["dt_bias"].shape == (2, 4, 16) and 9e-4 < steps.min() < 3e-3 and 0.05 < steps.max() < 0.11
    for name, bound in {"window": 1 / 3, "dt_down": 1 / 4, "c": 1 / 4, "dt_up": 1.0}.items():
        assert 0.9 * bound < np.abs(p[name]).max() <= bound, name
    flat = np.asarray(p["b"]).reshape(8, -1)
    assert len(np.unique(flat[:, 0])) == 8  # each layer and direction draws its own
    outs = jax.eval_shape(functools.partial(apply, config, method="features"), params, {}, images(config))[0]
    assert [o.shape for o in outs] == [(3, 4, 4, 8), (3, 2, 2, 16)]


def test_smaller_selves():
    config = VARIANTS["vmamba_small_s2l15"]
    cut = config.shrink(width=0.5, depth=(1, 2, 5, 1), ffn=0.5, keep="even")
    assert (cut.dims, cut.inner_dims, cut.dt_ranks) == ((48, 96, 192, 384), (96, 192, 384, 768), (3, 6, 12, 24))
    assert (cut.mlp_dims, cut.kept_layers[2]) == ((96, 192, 384, 768), (0, 3, 6, 9, 12))
    full = abstract(config)
    held = jax.eval_shape(lambda p: slice_like(p, full, abstract(cut)), dict(full.params))
    assert {k: v.shape for k, v in held.items()} == {k: v.shape for k, v in abstract(cut).params.items()}
    axes = ("stage3/layers", "stage3/layer/directions", "stage3/layer/inner", "stage3/layer/rank")
    assert full.axes["stages/2/layer/mixer/dt_down"] == axes


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"image_size": 16}, "images of 16 pixels are smaller than the total stride 32; use stem_strides"),
        ({"d_state": 0}, "vmamba: 0 among depths, channels, classes and the like"),
        ({"dims": (96, 192)}, "need one entry per stage"),
        ({"dims": (1, 2, 4, 8)}, "leave no channel for the stem"),
        ({"kept_layers": ((0,), (0, 1), (0,), (0, 1))}, r"must have \(2, 2, 8, 2\) entries"),
        (
            {"implementation": "toeplitz"},
            "vmamba: selective_scan: implementation is 'toeplitz'; expected one of auto, cpu, naive",
        ),
        ({"implementation": "depthwise_conv1d=naive"}, "its ops: depthwise_conv2d, selective_scan"),
    ],
)
def test_bad_configs_are_refused_in_one_line(bad, message):
    with pytest.raises(UserError, match=message) as error:
        VMambaConfig(**bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad", [{"width": 0}, {"depth": (1, 2)}, {"ffn": 2.0}, {"depth": (3, 2, 8, 2)}, {"keep": "last"}]
)
def test_choices_outside_the_space_are_refused(bad):
    with pytest.raises(UserError, match="valid"):
        VMambaConfig().shrink(**bad)
