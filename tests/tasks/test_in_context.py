"""In-context learning as a task: where predictions are read, errors by number of examples, both kinds of targets."""

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
