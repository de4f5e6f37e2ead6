"""Next-token loss, its ignored labels, sums and metrics, against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.tasks.language import LanguageModelling, token_losses

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 5, 7)).astype(np.float32)
LABELS = np.array([[1, -1, 3, 6, 0], [-1, -1, 2, 2, -1]], np.int32)


def nll():
    log_p = LOGITS.astype(np.float64) - np.log(np.exp(LOGITS.astype(np.float64)).sum(-1, keepdims=True))
    return [-log_p[b, t, LABELS[b, t]] for b in range(2) for t in range(5) if LABELS[b, t] >= 0]


def test_loss_is_the_mean_over_labelled_tokens():
    np.testing.assert_allclose(
        LanguageModelling().loss(jnp.asarray(LOGITS), jnp.asarray(LABELS)), np.mean(nll()), rtol=1e-6
    )
    assert float(LanguageModelling().loss(jnp.asarray(LOGITS), jnp.full((2, 5), -1))) == 0


def test_no_gradient_where_nothing_is_asked():
    grad = jax.grad(LanguageModelling().loss)(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    assert not np.any(np.asarray(grad)[LABELS < 0]) and np.all(np.abs(np.asarray(grad)[LABELS >= 0]).max(-1) > 0)


def test_metrics():
    task = LanguageModelling(token_bytes=(1, 1, 2, 1, 1, 1, 3))
    batch = {"labels": jnp.asarray(LABELS)}
    sums = task.sums(jnp.asarray(LOGITS), batch)
    out = task.summarize({k: np.asarray(v) for k, v in sums.items()})
    size = sum(task.token_bytes[i] for i in LABELS[LABELS >= 0])
    np.testing.assert_allclose(out["loss"], np.mean(nll()), rtol=1e-6)
    np.testing.assert_allclose(out["bits_per_byte"], np.sum(nll()) / size / math.log(2), rtol=1e-6)
    np.testing.assert_allclose(out["perplexity"], np.exp(np.mean(nll())), rtol=1e-6)
    np.testing.assert_allclose(out["accuracy"], (LOGITS.argmax(-1) == LABELS)[LABELS >= 0].mean(), rtol=1e-6)


def test_a_uniform_model_over_bytes_has_eight_bits():
    task = LanguageModelling(token_bytes=(1,) * 256)
    sums = task.sums(jnp.zeros((1, 4, 256)), {"labels": jnp.arange(4)[None]})
    np.testing.assert_allclose(task.summarize(jax.device_get(sums))["bits_per_byte"], 8, rtol=1e-6)


def test_filler_examples_do_not_count():
    task = LanguageModelling()
    masked = task.sums(jnp.asarray(LOGITS), {"labels": jnp.asarray(LABELS), "mask": jnp.array([1.0, 0.0])})
    alone = task.sums(jnp.asarray(LOGITS[:1]), {"labels": jnp.asarray(LABELS[:1])})
    for key in alone:
        np.testing.assert_allclose(masked[key], alone[key], rtol=1e-6)


def test_distilling_from_oneself_is_the_entropy_and_moves_nothing():
    task, logits = LanguageModelling(), jnp.asarray(LOGITS)
    grad = jax.grad(lambda x: task.distill(x, logits, jnp.asarray(LABELS)))(logits)
    assert np.abs(grad).max() < 1e-6
    teacher_grad = jax.grad(lambda t: task.distill(logits, t, jnp.asarray(LABELS)))(logits * 2)
    assert not np.any(teacher_grad)


@pytest.mark.parametrize("metric, better", [("loss", False), ("accuracy", True), ("bits_per_byte", False)])
def test_direction_of_the_metric(metric, better):
    assert LanguageModelling(metric=metric).higher_is_better is better


def test_losses_keep_the_shape_of_labels():
    losses, asked = token_losses(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    assert losses.shape == asked.shape == (2, 5)
    np.testing.assert_array_equal(asked, LABELS >= 0)


def test_what_is_real_leaves_padding_and_filler_out():
    batch = {"tokens": jnp.zeros((3, 4), jnp.int32), "lengths": jnp.array([4, 2, 3])}
    task, behind = LanguageModelling(), np.arange(4) < np.array([[4], [2], [3]])
    np.testing.assert_array_equal(task.real(batch), behind)
    np.testing.assert_array_equal(
        task.real(batch | {"mask": jnp.array([1.0, 1.0, 0.0])}), behind & np.array([[True], [True], [False]])
    )
    np.testing.assert_array_equal(
        task.real({"tokens": batch["tokens"], "mask": jnp.array([1.0, 0.0, 1.0])}), [True, False, True]
    )
    assert task.real({"tokens": batch["tokens"]}) is None
