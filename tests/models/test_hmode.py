"""HMoDE: gates, mixtures and resizing against numpy, the importance loss, shapes of the published network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import registry
from research.modules.state import abstract, apply, initialize
from research.ops import density_gates
from tests.models.twins import fast_jit, images, random_arrays, twin


@functools.lru_cache
def run(method="__call__", mode="eval"):
    config = twin("hmode")
    params, stats = random_arrays(config)
    return fast_jit(functools.partial(apply, config, mode=mode, method=method))(params, stats, images(config))


@functools.lru_cache
def gates():
    config = twin("hmode")
    params, stats = random_arrays(config)
    return fast_jit(functools.partial(apply, config, method="gates"))(params, stats, run("features")[0][-1])[0]


def test_gates_sum_to_one_at_every_pixel_and_differ():
    pairs, mixtures, mask = gates()
    assert pairs.shape == (3, 2, 2, 3, 2) and mixtures.shape == (3, 2, 2, 3) and mask.shape == (3, 2, 2, 1)
    np.testing.assert_allclose(pairs.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(mixtures.sum(-1), 1, rtol=1e-6)
    assert np.std(pairs[..., 0]) > 0.01 and np.std(mixtures[..., 0]) > 0.01
    config = twin("hmode")
    params, stats = random_arrays(config)
    for last in (
        "pairs/convs/1/bias",
        "mixtures/convs/5/bias",
    ):  # the ReLU stays before the softmax: very negative logits are equal ones
        params[last] = params[last] - 1e4
    pairs, mixtures, _ = fast_jit(functools.partial(apply, config, method="gates"))(
        params, stats, run("features")[0][-1]
    )[0]
    np.testing.assert_allclose(pairs, 1 / 2, rtol=1e-6)
    np.testing.assert_allclose(mixtures, 1 / 3, rtol=1e-6)


def test_output_is_the_mixture_of_the_experts_at_the_input_s_resolution():
    config, (pairs, mixtures, mask) = twin("hmode"), gates()
    params, stats = random_arrays(config)
    experts = fast_jit(functools.partial(apply, config, method="densities"))(params, stats, run("features")[0])[0]
    out = np.asarray(run()[0])
    assert out.shape == (3, 32, 32, 8) and experts.shape == (3, 8, 8, 3)
    assert all(np.asarray(experts)[..., i].max() > 0 for i in range(3)) and out[..., :7].min() >= 0
    for y, x in ((0, 0), (5, 30), (17, 9), (31, 31)):
        d, g, m = (
            np.asarray(a, np.float64)
            for a in (experts[:, y // 4, x // 4], pairs[:, y // 16, x // 16], mixtures[:, y // 16, x // 16])
        )
        mixed = np.stack([(g[:, i] * d[:, [a, b]]).sum(-1) for i, (a, b) in enumerate([(0, 1), (0, 2), (1, 2)])], -1)
        expected = np.concatenate(
            [d, mixed, (m * mixed).sum(-1, keepdims=True), np.asarray(mask)[:, y // 16, x // 16]], -1
        )
        np.testing.assert_allclose(out[:, y, x], expected, rtol=1e-4, atol=1e-5)


def test_uniform_gates_give_the_experts_mean():
    experts = jnp.asarray(np.random.default_rng(0).random((2, 3, 5, 3)), jnp.float32)
    maps = density_gates.mix_pairs(experts, jnp.full((2, 3, 5, 3, 2), 1 / 2), jnp.full((2, 3, 5, 3), 1 / 3))
    np.testing.assert_allclose(maps[..., 6], experts.mean(-1), rtol=1e-6)
    np.testing.assert_allclose(maps[..., 4], (experts[..., 0] + experts[..., 2]) / 2, rtol=1e-6)


def test_importance_variation():
    assert float(density_gates.importance_variation(jnp.full((2, 3, 3, 2), 0.5))) == 0
    weights = jnp.array([[[0.9, 0.1]], [[0.6, 0.4]], [[0.75, 0.25]], [[0.75, 0.25]]])  # importance (3, 1)
    assert float(density_gates.importance_variation(weights)) == pytest.approx(0.5, rel=1e-5)
    weights = jnp.tile(weights, (1, 3, 1))
    assert float(density_gates.importance_variation(weights)) == pytest.approx(1.5, rel=1e-5)


def test_training_states_the_importance_loss_and_evaluation_leaves_it():
    config = twin("hmode")
    _, stats = random_arrays(config)
    assert float(run()[1]["aux_loss"]) == float(stats["aux_loss"])
    features, after = run("features", "train")[0], run(mode="train")[1]
    pairs = fast_jit(functools.partial(apply, config, method="gates"))(*random_arrays(config), features[-1])[0][0]
    importance = np.asarray(pairs, np.float64).sum((0, 1, 2))
    expected = (importance.var(-1, ddof=1) / importance.mean(-1) ** 2).sum() / 3
    assert expected > 1e-3
    np.testing.assert_allclose(after["aux_loss"], expected, rtol=1e-3)


def test_upsampling_aligns_corners_and_nearest_repeats():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 4)), jnp.float32)
    rows, columns = (np.arange(2 * n) * (n - 1) / (2 * n - 1) for n in (3, 5))
    line = lambda places, n, v: np.interp(places, np.arange(n), v)
    tall = np.apply_along_axis(lambda v: line(rows, 3, v), 1, np.asarray(x))
    expected = np.apply_along_axis(lambda v: line(columns, 5, v), 2, tall)
    np.testing.assert_allclose(density_gates.upsample(x), expected, atol=1e-6)
    np.testing.assert_array_equal(density_gates.upsample(x)[:, ::5, ::9], x[:, ::2, ::4])
    np.testing.assert_array_equal(density_gates.upsample(x[:, :1, :1]), jnp.tile(x[:, :1, :1], (1, 2, 2, 1)))
    np.testing.assert_array_equal(density_gates.nearest(x, 2), np.repeat(np.repeat(x, 2, 1), 2, 2))


def test_published_shapes():
    config = registry.entry("hmode").config
    shapes = abstract(config)
    encoder = sum(int(np.prod(s.shape)) for name, s in shapes.params.items() if name.startswith("stages/"))
    # torchvision's vgg16_bn without its classifier has 14,723,136; its 4,224 biases before a batch norm are left out
    # here.
    assert encoder == 14_723_136 - 4_224
    x = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    outs, _ = jax.eval_shape(functools.partial(apply, config, method="features"), shapes.params, shapes.stats, x)
    assert [o.shape[1:] for o in outs] == [(128, 128, 64), (64, 64, 128), (32, 32, 256), (16, 16, 512), (8, 8, 512)]
    kernels = {name: s.shape for name, s in shapes.params.items()}
    assert kernels["decoder3/coarse/kernel"] == (3, 3, 512, 1024) and kernels["decoder3/second/kernel"] == (
        3,
        3,
        1024,
        512,
    )
    assert kernels["decoder2/coarse/kernel"] == kernels["decoder2/skip/kernel"] == (3, 3, 512, 512)
    assert kernels["decoder1/second/kernel"] == (3, 3, 256, 128) and kernels["heads/0/convs/0/kernel"] == (
        1,
        1,
        128,
        64,
    )
    gate = [kernels[f"mixtures/convs/{i}/kernel"][-1] for i in range(6)]
    assert gate == [1024, 2048, 1024, 512, 256, 3] and kernels["pairs/convs/1/kernel"] == (1, 1, 256, 6)
    assert [kernels[f"mask/convs/{i}/kernel"][-1] for i in range(3)] == [256, 128, 1]


@pytest.mark.slow
def test_no_expert_starts_dead():
    config = twin("hmode")
    params, stats = fast_jit(functools.partial(initialize, config))(jax.random.key(0))
    out = fast_jit(functools.partial(apply, config, mode="train"))(params, stats, images(config))[0]
    assert (np.asarray(out)[..., :3].max((0, 1, 2)) > 0).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"image_size": 40}, "image_size=40 is no multiple of the total stride 16"),
        ({"dims": (8, 8, 8)}, "need one entry for each of the 5 stages"),
        ({"dims": (8, 8, 8, 8, 6)}, "must be multiples of 4"),
        ({"head_dim": 0}, "head_dim=0; valid: whole numbers from 1"),
    ],
)
def test_bad_configs_are_refused_in_one_line(bad, message):
    with pytest.raises(UserError, match=message) as error:
        registry.model_config("hmode", **bad)
    assert "\n" not in str(error.value)
