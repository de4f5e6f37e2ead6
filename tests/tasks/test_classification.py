"""The classification task: targets, mixing, sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.tasks.classification import Classification, smooth_labels


def batch(size=6):
    image = jnp.arange(size, dtype=jnp.float32)[:, None, None, None] * jnp.ones((size, 8, 8, 2))
    return {"image": image, "label": jnp.arange(size) % 3}


def test_smoothing_sums_to_one():
    target = smooth_labels(jnp.array([0, 2]), 4, 0.2)
    np.testing.assert_allclose(target, [[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05]], rtol=1e-6)


def test_loss_is_cross_entropy():
    task = Classification(3)
    logits = jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    expected = np.mean([np.log(np.exp([1, 2, 3]).sum()) - 3, np.log(3)])
    assert float(task.loss(logits, jax.nn.one_hot(jnp.array([2, 1]), 3))) == pytest.approx(expected, rel=1e-6)


def test_no_gradient_reaches_the_teacher():
    task = Classification(3)
    grad = jax.grad(lambda t: task.distill(jnp.ones((2, 3)), t))(jnp.arange(6.0).reshape(2, 3))
    assert not np.any(grad)


@pytest.mark.parametrize("settings", [dict(mixup=0.8), dict(cutmix=1.0), dict(mixup=0.8, cutmix=1.0)])
def test_mixing_keeps_shares_of_labels_and_pixels_equal(settings):
    task = Classification(3, **settings)
    data = batch()
    for seed in range(8):
        image, target = task.mix(data, jax.random.key(seed))
        np.testing.assert_allclose(target.sum(-1), 1, rtol=1e-5)
        first = jax.nn.one_hot(data["label"], 3)
        share = np.asarray((target - first[::-1])[0] / np.where(first[0] == first[-1], 1, (first - first[::-1])[0]))
        pixel = (np.asarray(image[0]).mean() - 5) / (0 - 5)  # image 0 holds zeros, its partner holds fives
        assert share[0] == pytest.approx(pixel, abs=1e-5)


def test_mixing_is_a_function_of_the_key():
    task = Classification(3, mixup=0.8, cutmix=1.0)
    a, b, c = (task.mix(batch(), jax.random.key(k))[0] for k in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_padding_does_not_count():
    task = Classification(3)
    logits = jnp.array([[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]])
    data = {"label": jnp.array([0, 0, 2]), "mask": jnp.array([1.0, 1.0, 0.0])}
    found = task.summarize(task.sums(logits, data))
    assert found["accuracy"] == 0.5 and found["loss"] == pytest.approx((np.log1p(2 * np.exp(-9)) * 2 + 9) / 2, rel=1e-4)


def test_sequences_are_classified_and_mixed_whole_but_not_cut():
    task = Classification(3, mixup=0.8, examples="vectors")
    data = {"vectors": batch()["image"].reshape(6, 64, 2), "label": batch()["label"]}
    (vectors,), target = task.prepare(data, jax.random.key(1))
    whole = Classification(3, mixup=0.8).mix(batch(), jax.random.key(1))
    np.testing.assert_allclose(vectors, whole[0].reshape(6, 64, 2), rtol=1e-6)
    np.testing.assert_allclose(target, whole[1], rtol=1e-6)  # the mean of the weights rounds differently
    with pytest.raises(UserError, match="cutmix"):
        Classification(3, cutmix=1.0, examples="vectors")
