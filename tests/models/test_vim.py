"""Vision Mamba against numpy, token by token; the symmetry of its two directions; implementations, sub-networks,
mistakes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models.vim import VARIANTS, VimConfig
from research.modules.axes import Init
from research.modules.bimamba import BiMamba
from research.modules.state import abstract, apply, initialize, merge, split
from research.nested.slicing import slice_like
from tests.models.twins import fast_jit, images, loss_and_logits, random_arrays
from tests.ops.compare import assert_agree

CONFIG = VimConfig(
    dim=12, depth=2, d_state=3, dt_rank=2, patch_size=2, image_size=8, num_classes=5, implementation="cpu"
)
COUNTS = {"vim_tiny_patch16_224": 7_148_008, "vim_small_patch16_224": 25_796_584, "vim_base_patch16_224": 97_598_440}


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def state_space(p, x):
    """Convolution of four taps, then the recurrence, one token at a time, on one sequence [T, E]."""
    u = np.zeros_like(x)
    for t in range(len(x)):
        for j in range(4):
            if t - 3 + j >= 0:
                u[t] += p["conv/kernel"][j] * x[t - 3 + j]
    u = silu(u + p["conv/bias"])
    y, h = np.zeros_like(u), np.zeros_like(p["a_log"])
    for t in range(len(x)):
        delta = np.log1p(np.exp(u[t] @ p["dt_down"] @ p["dt_up"] + p["dt_bias"]))
        h = np.exp(-delta[:, None] * np.exp(p["a_log"])) * h + np.outer(delta * u[t], u[t] @ p["b"])
        y[t] = h @ (u[t] @ p["c"]) + p["skip"] * u[t]
    return y


def part(params, prefix):
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}


def mixer(p, x):
    """Each direction gates with its own z; then the mean of both."""
    inputs, z = x @ p["x"], x @ p["z"]
    ahead = state_space(part(p, "forward/"), inputs) * silu(z)
    behind = state_space(part(p, "backward/"), inputs[::-1]) * silu(z[::-1])
    return (ahead + behind[::-1]) / 2 @ p["out"]


def network(params, image, config):
    """Logits of one image [H, W, C]."""
    n = config.patch_size
    corners = [(i, j) for i in range(0, config.image_size, n) for j in range(0, config.image_size, n)]
    kernel = params["patches/kernel"].reshape(-1, config.dim)
    tokens = [image[i : i + n, j : j + n].reshape(-1) @ kernel + params["patches/bias"] for i, j in corners]
    half = len(tokens) // 2
    x = np.stack([*tokens[:half], params["cls_token"], *tokens[half:]]) + params["positions"]
    for i in range(config.depth):
        p = {k: v[i] for k, v in part(params, "blocks/layer/").items()}
        x = x + mixer(part(p, "mixer/"), rms_norm(x, p["norm/scale"]))
    return rms_norm(x[half], params["norm/scale"]) @ params["head/kernel"] + params["head/bias"]


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
def reversible():
    """A network in float64, its logits, and a function that gives those of other parameters and images."""
    params, _ = random_arrays(CONFIG, 1, dtype=np.float64)
    run = fast_jit(functools.partial(apply, CONFIG))
    return params, images(CONFIG, 2, dtype=np.float64), lambda p, x: np.asarray(run(p, {}, x)[0])


def swapped(params):
    other = {"forward": "backward", "backward": "forward"}
    return {k: params["/".join(other.get(part, part) for part in k.split("/"))] for k in params}


def test_swapped_directions_read_the_reversed_sequence_alike():
    """Patches and positions in reverse order, directions exchanged: the class token, in the middle, sees the same."""
    with jax.enable_x64(True):
        params, x, run = reversible()
        grid, n = CONFIG.image_size // CONFIG.patch_size, CONFIG.patch_size
        turned = x.reshape(2, grid, n, grid, n, 3)[:, ::-1, :, ::-1].reshape(x.shape)
        reversed_positions = {**params, "positions": params["positions"][::-1]}
        logits = run(params, x)
        np.testing.assert_allclose(run(swapped(reversed_positions), turned), logits, rtol=0, atol=1e-12)
        assert np.abs(run(reversed_positions, turned) - logits).max() > 1e-2
        assert np.abs(run(swapped(params), x) - logits).max() > 1e-2


def test_swapped_directions_reverse_the_output_of_a_mixer():
    seen = {}

    def build(key):
        seen["graphdef"], params, _, _ = split(BiMamba(8, 12, 3, 2, "embed", "layer", Init(key), implementation="cpu"))
        return params

    shapes, rng = jax.eval_shape(build, jax.random.key(0)), np.random.default_rng(0)
    with jax.enable_x64(True):
        params = {k: jnp.asarray(rng.normal(0, 0.5, v.shape)) for k, v in shapes.items()}
        run = fast_jit(lambda p, x: merge(seen["graphdef"], p, {})(x))
        x = jnp.asarray(rng.normal(size=(2, 7, 8)))
        y = run(params, x)
        np.testing.assert_allclose(run(swapped(params), x[:, ::-1]), y[:, ::-1], rtol=0, atol=1e-13)
        assert np.abs(run(params, x[:, ::-1]) - y[:, ::-1]).max() > 1e-3


def test_every_token_counts_for_the_class_token():
    with jax.enable_x64(True):
        params, x, run = reversible()
        for i, j in ((0, 0), (7, 7)):
            assert np.abs(run(params, x.at[:, i, j].add(1.0)) - run(params, x)).max() > 1e-6


@pytest.mark.slow
def test_naive_implementation_agrees_in_outputs_and_gradients():
    params, _ = random_arrays(CONFIG)
    x = images(CONFIG)
    results = []
    for implementation in ("cpu", "naive"):
        config = dataclasses.replace(CONFIG, implementation=implementation)
        grad = jax.value_and_grad(
            lambda p, x, config=config: loss_and_logits(config, p, {}, x), argnums=(0, 1), has_aux=True
        )
        results.append(fast_jit(grad)(params, x))
    assert_agree(*results, 1e-5)


def test_drop_path_needs_training_and_a_key():
    config = dataclasses.replace(CONFIG, drop_path_rate=0.9, implementation="naive")
    params, _ = random_arrays(config)
    x = jnp.broadcast_to(images(config, 1), (16, 8, 8, 3))
    run = lambda mode, key: np.asarray(fast_jit(functools.partial(apply, config, mode=mode))(params, {}, x, key=key)[0])
    calm = run("eval", jax.random.key(0))
    np.testing.assert_allclose(calm, np.broadcast_to(calm[:1], calm.shape), rtol=1e-5, atol=1e-6)
    dropped = run("train", jax.random.key(0))
    assert np.abs(dropped - dropped[:1]).max() > 0.01


def test_bfloat16_keeps_the_residual_stream_in_float32():
    params, _ = random_arrays(CONFIG)
    x = images(CONFIG)
    y = fast_jit(functools.partial(apply, CONFIG))(params, {}, x)[0]
    low = {k: v if k in abstract(CONFIG).precise else v.astype(jnp.bfloat16) for k, v in params.items()}
    run = functools.partial(apply, CONFIG)
    z = fast_jit(run)(low, {}, x.astype(jnp.bfloat16))[0]
    assert z.dtype == jnp.bfloat16 and np.abs(z.astype(jnp.float32) - y).max() < 0.05 * np.abs(y).max()
    program = str(jax.make_jaxpr(run)(low, {}, x.astype(jnp.bfloat16)))
    assert "f32[3,17,12] = add" in program and "bf16[3,17,24] = dot_general" in program


@pytest.mark.slow
def test_initial_numbers():
    config = dataclasses.replace(VARIANTS["vim_micro_patch4_32"], depth=4, kept_layers=())
    params, _ = fast_jit(functools.partial(initialize, config))(jax.random.key(0))
    p = part(params, "blocks/layer/mixer/")
    assert np.abs(p["out"]).max() <= (256 * 4) ** -0.5 < 1.01 * np.abs(p["out"]).max()
    for side in ("forward", "backward"):
        steps = np.log1p(np.exp(np.float64(p[f"{side}/dt_bias"])))
        assert 9e-4 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.11
        np.testing.assert_allclose(np.exp(p[f"{side}/a_log"][3, 7]), np.arange(1, 17), rtol=1e-6)
    assert not np.array_equal(p["forward/b"], p["backward/b"])


def test_smaller_selves():
    small, tiny = VARIANTS["vim_small_patch16_224"], VARIANTS["vim_tiny_patch16_224"]
    assert dataclasses.replace(small.shrink(width=0.5), drop_path_rate=0.0) == tiny
    cut = small.shrink(width=0.5, depth=6, state=0.25, keep="even")
    assert (cut.dim, cut.d_inner, cut.dt_rank, cut.d_state, cut.kept_layers) == (192, 384, 12, 4, (0, 4, 8, 12, 16, 20))
    assert small.shrink(state=5).d_state == 5
    full = abstract(small)
    held = jax.eval_shape(lambda p: slice_like(p, full, abstract(cut)), dict(full.params))
    assert {k: v.shape for k, v in held.items()} == {k: v.shape for k, v in abstract(cut).params.items()}
    axes = full.axes["blocks/layer/mixer/backward/dt_down"]
    assert axes == ("layers", "layer/inner", "layer/backward/rank")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"image_size": 225}, r"vim: image_size=225 is no multiple of patch_size=16; valid patch sizes: \[3, 5, 9"),
        ({"d_state": 0}, "vim: d_state=0; valid: whole numbers from 1"),
        ({"d_conv": 64}, "vim: d_conv=64; valid: 1 to 63"),
        ({"kept_layers": (0, 1)}, "one entry for each of the 24 blocks"),
        (
            {"implementation": "fast"},
            "vim: depthwise_conv1d: implementation is 'fast'; expected one of auto, cpu, naive",
        ),
        ({"implementation": "depthwise_conv2d=naive"}, "its ops: depthwise_conv1d, selective_scan"),
    ],
)
def test_bad_configs_are_refused_in_one_line(bad, message):
    with pytest.raises(UserError, match=message) as error:
        VimConfig(**bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [{"width": 0}, {"state": 17}, {"state": 1.5}, {"depth": 25}, {"keep": "last"}])
def test_choices_outside_the_space_are_refused(bad):
    with pytest.raises(UserError, match="valid"):
        VimConfig().shrink(**bad)
