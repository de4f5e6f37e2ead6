"""In-context learning as a task: where predictions are read, errors by number of examples, both kinds of targets."""

import jax
import jax.numpy as jnp
import numpy as np

from research.tasks.in_context import InContextLearning

RNG = np.random.default_rng(0)
OUT = RNG.normal(size=(3, 8, 1)).astype(np.float32)
Y = RNG.normal(size=(3, 4)).astype(np.float32)


def test_regression_is_read_where_the_inputs_stand():
    task = InContextLearning(points=4, scale=2.0)
    read = OUT[:, [0, 2, 4, 6], 0]
    np.testing.assert_allclose(task.loss(jnp.asarray(OUT), jnp.asarray(Y)), np.mean((read - Y) ** 2), rtol=1e-6)
    sums = task.sums(jnp.asarray(OUT), {"targets": jnp.asarray(Y), "mask": jnp.array([1.0, 1.0, 0.0])})
    out = task.summarize({k: np.asarray(v) for k, v in sums.items()})
    by_examples = ((read - Y)[:2] ** 2).mean(0) / 2
    np.testing.assert_allclose([out[f"error/after_{n}"] for n in range(4)], by_examples, rtol=1e-5)
    np.testing.assert_allclose(out["error"], by_examples.mean(), rtol=1e-5)
    assert task.metric == "error" and not task.higher_is_better


def test_boolean_labels_take_the_logistic_loss_and_unscored_prefixes_do_not_count():
    task, y = InContextLearning(points=4, boolean=True, scored_from=2), np.sign(Y)
    read = OUT[:, ::2, 0]
    expected = np.log1p(np.exp(-read * y))[:, 2:].mean()
    np.testing.assert_allclose(task.loss(jnp.asarray(OUT), jnp.asarray(y)), expected, rtol=1e-6)
    measured = task.measure(jnp.asarray(OUT), {"targets": jnp.asarray(y)})
    np.testing.assert_allclose(measured["accuracy"], (read * y > 0)[:, 2:].mean(), rtol=1e-6)
    assert task.metric == "accuracy" and task.higher_is_better


def test_targets_of_nan_are_not_scored_and_send_no_gradient():
    for boolean in (False, True):
        task, y = InContextLearning(points=4, boolean=boolean, scored_from=1), np.sign(Y) if boolean else Y
        hidden = y.copy()
        hidden[0, 2:], hidden[2, 3] = np.nan, np.nan
        read = OUT[:, ::2, 0]
        each = np.log1p(np.exp(-read * y)) if boolean else (read - y) ** 2
        scored = np.isfinite(hidden) & (np.arange(4) >= 1)
        loss, gradient = jax.value_and_grad(task.loss)(jnp.asarray(OUT), jnp.asarray(hidden))
        np.testing.assert_allclose(loss, each[scored].mean(), rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(gradient)[:, ::2, 0] != 0, scored)
        measured = task.measure(jnp.asarray(OUT), {"targets": jnp.asarray(hidden)})
        np.testing.assert_allclose(
            measured[task.metric], ((read * y > 0) if boolean else each)[scored].mean(), rtol=1e-6
        )
