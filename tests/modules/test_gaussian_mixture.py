"""The Gaussian-mixture policy head: densities against numpy and quadrature, squashing, the three estimators of the
router's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.modules import gaussian_mixture as gm
from research.modules.axes import Init
from research.modules.state import split

MIXTURE = gm.Mixture(
    jnp.log(jnp.array([0.2, 0.5, 0.3])), jnp.array([[-2.0], [0.5], [1.0]]), jnp.log(jnp.array([[0.5], [1.0], [0.1]]))
)
"""Of one number, by three primitives."""


def numpy_log_density(mixture, x):
    """log-sum-exp by hand in float64, point by point."""
    w, m, s = (np.asarray(a, np.float64) for a in (mixture.log_weights, mixture.means, mixture.log_stds))
    terms = w + (-0.5 * ((x - m) / np.exp(s)) ** 2 - s - 0.5 * np.log(2 * np.pi)).sum(-1)
    return terms.max() + np.log(np.exp(terms - terms.max()).sum())


def test_log_density_agrees_with_numpy_and_is_finite_forty_standard_deviations_away():
    rng = np.random.default_rng(0)
    log_weights = jax.nn.log_softmax(jnp.asarray(rng.normal(size=4), jnp.float32))
    mixture = gm.Mixture(
        log_weights,
        jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
        jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
    )
    for x in (*rng.normal(size=(5, 3)), np.full(3, 40.0) * np.exp(np.asarray(mixture.log_stds).max())):
        value, slope = jax.value_and_grad(lambda x: gm.log_density(mixture, x))(jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(value, numpy_log_density(mixture, x), rtol=2e-5)
        assert np.isfinite(slope).all()
    assert float(gm.log_density(MIXTURE, jnp.array([41.0]))) == pytest.approx(
        -800 - 0.5 * np.log(2 * np.pi) + np.log(0.5), abs=20.5
    )


def test_density_integrates_to_one_squashed_or_not():
    x = np.linspace(-12, 12, 20001)[:, None]
    spread = gm.Mixture(*(jnp.broadcast_to(a, (len(x), *a.shape)) for a in MIXTURE))
    assert float(np.trapezoid(np.exp(gm.log_density(spread, jnp.asarray(x))), x[:, 0])) == pytest.approx(1, abs=1e-4)
    a = np.tanh(np.linspace(-7, 7, 20001))
    squashed = np.exp(gm.squashed_log_density(spread, jnp.asarray(a)[:, None]))
    assert float(np.trapezoid(squashed, a)) == pytest.approx(1, abs=2e-3)


def test_squash_has_the_determinant_of_its_jacobian_also_where_it_saturates():
    x = jnp.array([-1.5, 0.3, 2.0])
    y, log_det = gm.squash(x)
    np.testing.assert_allclose(y, np.tanh(x), rtol=1e-6)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jax.jacobian(jnp.tanh)(x))[1], rtol=1e-5)
    np.testing.assert_allclose(gm.squash(jnp.array([20.0]))[1], 2 * np.log(2) - 40, rtol=1e-6)


def test_draws_carry_the_density_of_their_own_primitive():
    draws = gm.draw(MIXTURE, jax.random.key(0))
    x = np.arctanh(np.asarray(draws.actions, np.float64))
    for i in range(3):
        own = gm.primitive_log_density(MIXTURE, jnp.asarray(x[i]))[i] - gm.squash(jnp.asarray(x[i]))[1]
        np.testing.assert_allclose(draws.log_probs[i], own, rtol=1e-3)


def test_frequency_loss_of_a_worked_example_and_of_one_expert():
    log_w, q = jnp.log(jnp.array([0.2, 0.5, 0.3])), jnp.array([1.0, 3.0, 2.0])
    assert float(gm.frequency_loss(log_w, q)) == pytest.approx(0.38, abs=1e-6)
    assert float(gm.frequency_loss(log_w, q, "mean")) == pytest.approx(0.126667, abs=1e-6)
    assert float(gm.frequency_loss(jnp.zeros(1), jnp.array([5.0]))) == 0
    grads = jax.grad(lambda w, q: gm.frequency_loss(w, q), argnums=(0, 1))(log_w, q)
    assert np.abs(grads[0]).max() > 0 and (grads[1] == 0).all()


def test_minimiser_of_the_frequency_loss_is_the_frequency_of_wins():
    q = jax.random.normal(jax.random.key(0), (400, 3)) + jnp.array([0.0, 0.8, 0.3])
    wins = np.bincount(np.asarray(q.argmax(-1)), minlength=3) / 400
    loss = lambda z: gm.frequency_loss(jnp.broadcast_to(jax.nn.log_softmax(z), q.shape), q).mean()
    step = jax.jit(lambda z: z - 2 * jax.grad(loss)(z))
    z = jnp.zeros(3)
    for _ in range(200):
        z = step(z)
    np.testing.assert_allclose(jax.nn.softmax(z), wins, atol=1e-4)


def test_score_ratio_has_the_gradient_of_the_expected_value():
    z, q = jnp.array([0.3, -0.2, 0.9]), jnp.array([1.0, -2.0, 0.5])
    w = jax.nn.softmax(z)
    sampled = [
        jax.grad(lambda z, i=i: gm.score_ratio_loss(jax.nn.log_softmax(z), q, jnp.array(i)))(z) for i in range(3)
    ]
    exact = jax.grad(lambda z: -(jax.nn.softmax(z) * q).sum())(z)
    np.testing.assert_allclose(sum(w[i] * g for i, g in enumerate(sampled)), exact, atol=1e-6)


def test_gumbel_choice_is_one_hot_as_often_as_its_weight_and_passes_a_gradient():
    log_w = jnp.log(jnp.array([0.1, 0.6, 0.3]))
    choices = gm.gumbel_choice(jnp.broadcast_to(log_w, (4000, 3)), jax.random.key(1))
    np.testing.assert_array_equal(np.sort(choices, -1), np.tile([0.0, 0.0, 1.0], (4000, 1)))
    np.testing.assert_allclose(choices.mean(0), [0.1, 0.6, 0.3], atol=0.025)
    slope = jax.grad(lambda w: gm.gumbel_choice(w, jax.random.key(1))[1])(log_w)
    assert slope[1] > 0 > slope[0]


def test_head_starts_even_reads_the_raw_state_and_clips():
    head = gm.GaussianMixtureHead((8, 5, 2, 3), ("actor/mlp", "actor/input"), "actor", Init(jax.random.key(0)))
    _, params, _, axes = split(head)
    assert axes["means_kernel"] == ("actor/mlp", "actor/experts", "actor/actions")
    assert {k: v.shape for k, v in params.items()} == {
        "means_kernel": (8, 3, 2), "means_bias": (3, 2), "log_stds_kernel": (8, 3, 2), "log_stds_bias": (3, 2),
        "router/kernel": (5, 3), "router/bias": (3,),
    }  # fmt: skip
    assert max(float(jnp.abs(params[k]).max()) for k in params) <= 3e-3
    mixture = head(1e5 * jnp.ones((4, 8)), jnp.ones((4, 5)))
    np.testing.assert_allclose(np.exp(mixture.log_weights), 1 / 3, rtol=1e-6)
    assert (
        float(mixture.log_stds.max()) <= 2
        and float(mixture.log_stds.min()) >= -20
        and float(jnp.abs(mixture.log_stds).max()) >= 2
    )
    weights = lambda s: jnp.exp(head(jnp.ones((4, 8)), s).log_weights)
    head.router.kernel[...] = head.router.kernel[...].at[0, 0].set(1.0)
    np.testing.assert_allclose(
        weights(jnp.eye(5)[:1] * jnp.ones((4, 1)))[0], np.array([np.e, 1, 1]) / (np.e + 2), rtol=1e-5
    )
