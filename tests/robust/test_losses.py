"""Losses of attacks and of robust training: against numpy, and finite where probabilities underflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.robust import losses

RNG = np.random.default_rng(0)
LOGITS, OTHER, LABELS = 3 * RNG.normal(size=(7, 5)), RNG.normal(size=(7, 5)), RNG.integers(0, 5, 7)


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_kl_and_trades_are_numpy_s():
    p, q = softmax(LOGITS), softmax(OTHER)
    kl = (p * (np.log(p) - np.log(q))).sum(-1)
    np.testing.assert_allclose(losses.kl_logits(jnp.asarray(LOGITS), jnp.asarray(OTHER)), kl, rtol=1e-5)
    nll = -np.log(p[np.arange(7), LABELS])
    value = losses.trades(jnp.asarray(LOGITS), jnp.asarray(OTHER), jnp.asarray(LABELS), 6.0)
    assert float(value) == pytest.approx(nll.mean() + 6 * kl.mean(), rel=1e-5)


@pytest.mark.parametrize("gap", [1000.0, 1e5])
def test_kl_is_finite_in_value_and_gradients_at_a_gap_that_underflows(gap):
    first, second = jnp.asarray([[gap, 0.0]]), jnp.asarray([[0.0, gap]])
    value, grads = jax.value_and_grad(lambda a, b: losses.kl_logits(a, b).sum(), (0, 1))(first, second)
    assert float(value) == pytest.approx(gap) and all(np.isfinite(g).all() for g in grads)
    np.testing.assert_allclose(grads[1], [[-1, 1]], atol=1e-6)


def test_the_implementation_with_probabilities_is_what_is_not_finite():
    """The known NaN: d(t log t) at a probability of 0."""
    bad = lambda z: (jax.nn.softmax(z) * jnp.log(jax.nn.softmax(z))).sum()
    assert np.isnan(jax.grad(bad)(jnp.asarray([1000.0, 0.0]))).any()


def test_dlr_is_the_ratio_and_forgets_shift_and_scale():
    ordered = np.sort(LOGITS, -1)
    own = LOGITS[np.arange(7), LABELS]
    other = np.where(np.eye(5, dtype=bool)[LABELS], -np.inf, LOGITS).max(-1)
    expected = -(own - other) / (ordered[:, -1] - ordered[:, -3])
    np.testing.assert_allclose(losses.dlr(jnp.asarray(LOGITS), jnp.asarray(LABELS)), expected, rtol=1e-4)
    np.testing.assert_allclose(losses.dlr(jnp.asarray(100 * LOGITS + 9), jnp.asarray(LABELS)), expected, rtol=1e-3)
    assert ((expected > 0) == (LOGITS.argmax(-1) != LABELS)).all()
    goal = (LABELS + 1) % 5
    scale = ordered[:, -1] - (ordered[:, -3] + ordered[:, -4]) / 2
    expected = -(own - LOGITS[np.arange(7), goal]) / scale
    np.testing.assert_allclose(
        losses.targeted_dlr(jnp.asarray(LOGITS), jnp.asarray(LABELS), jnp.asarray(goal)), expected, rtol=1e-4
    )
