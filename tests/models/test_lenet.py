"""LeNet-5: published counts, a reference implementation in numpy, 28 padded to 32; the customised network around it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models.customised import GLOBAL, CustomisedConfig
from research.models.lenet import LeNetConfig
from research.modules.state import abstract, apply
from research.nested.slicing import extract
from tests.models.twins import fast_jit, images, random_arrays


def test_counts_for_digits_and_letters():
    for classes, count in ((10, 61_706), (47, 64_851), (62, 66_126)):
        for side in (28, 32):
            assert abstract(LeNetConfig(num_classes=classes, image_size=side)).num_params() == count


def test_agrees_with_a_naive_twin_and_28_pixels_are_padded_to_32():
    config = LeNetConfig(maps=(2, 3), hidden=(5, 4), num_classes=3)
    params, _ = random_arrays(config)
    x = images(config, 2)
    p = {name: np.asarray(array, np.float64) for name, array in params.items()}

    def conv(x, name):
        kernel, bias = p[f"{name}/kernel"], p[f"{name}/bias"]
        side = len(x) - 4
        y = [[np.tensordot(x[i : i + 5, j : j + 5], kernel, 3) + bias for j in range(side)] for i in range(side)]
        return np.maximum(np.array(y), 0)

    pool = lambda x: x.reshape(len(x) // 2, 2, len(x) // 2, 2, -1).max((1, 3))
    y = np.pad(np.asarray(x[0], np.float64), ((2, 2), (2, 2), (0, 0)))
    y = conv(pool(conv(pool(conv(y, "conv1")), "conv2")), "layer1")
    assert y.shape == (1, 1, 5)
    y = np.maximum(y[0, 0] @ p["layer2/kernel"] + p["layer2/bias"], 0) @ p["head/kernel"] + p["head/bias"]
    logits = fast_jit(functools.partial(apply, config))(params, {}, x)[0]
    np.testing.assert_allclose(logits[0], y, rtol=1e-4, atol=1e-4)
    padded = dataclasses.replace(config, image_size=32)
    again = fast_jit(functools.partial(apply, padded))(params, {}, jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0))))[0]
    np.testing.assert_allclose(again, logits, rtol=1e-5, atol=1e-5)


SMALL = CustomisedConfig(LeNetConfig(maps=(4, 6), hidden=(12, 8)), rank=2, hidden=2, budget=0.1)


def test_overhead_is_what_the_arrays_hold_and_within_the_budget_for_every_alphabet():
    for classes, rank in ((10, 8), (47, 6), (62, 6)):
        config = CustomisedConfig(LeNetConfig(num_classes=classes), rank=rank)
        assert config.added_params == abstract(config).num_params() - abstract(config.backbone).num_params()
        assert 0.02 < config.overhead <= 0.025
    assert CustomisedConfig().added_params == 762 + 689
    with pytest.raises(
        UserError, match=r"2136 parameters of local expert and gate are 3.29 % .* lower rank=12 or hidden=6"
    ):
        CustomisedConfig(LeNetConfig(num_classes=47), rank=12, hidden=6)


def test_a_closed_gate_gives_the_global_expert_s_logits_to_the_bit_and_an_open_one_the_local_s():
    params, _ = random_arrays(SMALL)
    x = images(SMALL, 4)
    expert = {name.removeprefix(GLOBAL): array for name, array in params.items() if name.startswith(GLOBAL)}
    features = apply(SMALL.backbone, expert, {}, x, method="embed")[0]
    alone = {
        "global": apply(SMALL.backbone, expert, {}, x)[0],
        "local": apply(SMALL, params, {}, features, method="local")[0],
    }
    for bias, who in ((-1e9, "global"), (1e9, "local")):
        moved = {**params, "gate2/bias": jnp.full(1, bias)}
        np.testing.assert_array_equal(apply(SMALL, moved, {}, x)[0], alone[who])
        soft = apply(SMALL, moved, {}, x, mode="train")[0]
        np.testing.assert_allclose(jax.nn.softmax(soft), jax.nn.softmax(alone[who]), rtol=1e-5)
    logit = apply(SMALL, params, {}, features, method="gate")[0]
    assert np.std(logit) > 0.01
    g = jax.nn.sigmoid(logit)[:, None]
    mixed = jax.nn.softmax(apply(SMALL, params, {}, x, mode="train")[0])
    np.testing.assert_allclose(
        mixed, g * jax.nn.softmax(alone["local"]) + (1 - g) * jax.nn.softmax(alone["global"]), rtol=1e-4
    )
    threshold = float(np.median(g))
    hard = apply(dataclasses.replace(SMALL, threshold=threshold), params, {}, x)[0]
    np.testing.assert_array_equal(hard, jnp.where(g > threshold, alone["local"], alone["global"]))


def test_smaller_selves_of_a_customised_network_are_slices():
    config = dataclasses.replace(SMALL, budget=0.2)
    params, _ = random_arrays(config)
    small = config.shrink(width=0.5, rank=1)
    cut, _ = extract(config, small, params, {})
    np.testing.assert_array_equal(cut["down/kernel"], params["down/kernel"][:4, :1])
    np.testing.assert_array_equal(cut[GLOBAL + "conv2/kernel"], params[GLOBAL + "conv2/kernel"][:, :, :2, :4])
    assert np.isfinite(apply(small, cut, {}, images(small))[0]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeNetConfig(image_size=30), "image_size=30; valid: 28, 32"),
        (lambda: LeNetConfig(maps=(6,)), "need two entries each"),
        (lambda: LeNetConfig(num_classes=0), "lenet: 0 among maps"),
        (lambda: CustomisedConfig(rank=0), "rank=0; valid: whole numbers from 1"),
        (lambda: CustomisedConfig(threshold=1.5), r"threshold=1.5; valid: a number in \[0, 1\]"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
