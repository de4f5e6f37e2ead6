"""Soft actor-critic with a mixture of experts: one expert is plain SAC, the critics' target by hand, the bandit's two
peaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.control import runs
from research.control.environments import Bandit, Pendulum
from research.control.networks import ActorConfig, CriticConfig
from research.control.sac import (
    ESTIMATORS,
    Sac,
    Transition,
    actor_loss,
    critic_loss,
    make_learner,
    policy,
    update,
    values,
)
from research.errors import UserError
from research.modules import gaussian_mixture as gm
from research.modules.state import abstract, apply, initialize
from research.nested.slicing import extract
from tests.models.twins import fast_jit

SMALL = {"hidden": 8, "depth": 2, "batch": 16, "capacity": 64, "warmup": 20}


def batch_of(environment, size, seed=0):
    rng = np.random.default_rng(seed)
    o, a = environment.observations, environment.actions
    shapes = ((size, o), (size, a), (size,), (size, o))
    arrays = [jnp.asarray(rng.uniform(-0.9, 0.9, shape), jnp.float32) for shape in shapes]
    return Transition(*arrays, jnp.asarray(rng.integers(0, 2, size), jnp.float32))


def learner_of(config, environment):
    return fast_jit(functools.partial(make_learner, config, environment))(jax.random.key(0))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_expert_is_plain_soft_actor_critic(estimator):
    rng = np.random.default_rng(0)
    means, log_stds, q_slope = (jnp.asarray(rng.normal(0, 0.4, (6, 1, 2)), jnp.float32) for _ in range(3))
    key, alpha = jax.random.key(3), 0.3

    def ours(means, log_stds):
        mixture = gm.Mixture(jnp.zeros((6, 1)), means, log_stds)
        return actor_loss(estimator, mixture, gm.draw(mixture, key), lambda a: (a * q_slope).sum(-1), alpha, key)

    def plain(means, log_stds):
        u = means[:, 0] + jnp.exp(log_stds[:, 0]) * jax.random.normal(key, means.shape)[:, 0]
        normal = -0.5 * ((u - means[:, 0]) / jnp.exp(log_stds[:, 0])) ** 2 - log_stds[:, 0] - 0.5 * jnp.log(2 * jnp.pi)
        log_prob = (normal - jnp.log(1 - jnp.tanh(u) ** 2)).sum(-1)
        return (alpha * log_prob - (jnp.tanh(u) * q_slope[:, 0]).sum(-1)).mean(), log_prob.mean()

    (mine, mine_log), grads = fast_jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(means, log_stds)
    (theirs, their_log), their_grads = fast_jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(means, log_stds)
    np.testing.assert_allclose([mine, mine_log], [theirs, their_log], rtol=1e-4)
    for a, b in zip(grads, their_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_estimators_train_other_primitives():
    """Of two primitives with a clear winner: all, the best alone, or the drawn one."""
    mixture = gm.Mixture(jnp.log(jnp.array([[0.999, 0.001]])), jnp.array([[[-0.5], [0.5]]]), jnp.full((1, 2, 1), -6.0))
    key = jax.random.key(0)

    def slope(estimator):
        loss = lambda means: actor_loss(
            estimator,
            mixture._replace(means=means),
            gm.draw(mixture._replace(means=means), key),
            lambda a: a[..., 0],
            0.0,
            key,
        )[0]
        return np.asarray(jax.grad(loss)(mixture.means))[0, :, 0] != 0

    assert [list(slope(e)) for e in ("frequency", "frequency_best", "score")] == [
        [True, True],
        [False, True],
        [True, False],
    ]


@pytest.mark.slow
def test_critic_loss_by_hand():
    environment, config = Pendulum(), Sac(experts=1, **SMALL)
    learner, batch = learner_of(config, environment), batch_of(environment, 5)
    learner = learner._replace(targets=jax.tree.map(lambda x: 3 * x + 0.1, learner.targets))
    _, noise_key = jax.random.split(jax.random.key(1))
    draws = gm.draw(policy(config, environment, learner.trained.actor, batch.following), noise_key)
    critic, actions = config.critic(environment), draws.actions[:, 0]
    of = lambda j: {k: v[j] for k, v in learner.targets.items()}
    q = np.stack([apply(critic, of(j), {}, batch.following, actions)[0] for j in range(2)])
    target = batch.reward + 0.99 * (1 - batch.terminal) * (q.min(0) - config.temperature * draws.log_probs[:, 0])
    mine = values(config, environment, learner.trained.critics, batch.observation, batch.action)
    expected = ((np.asarray(mine) - np.asarray(target)) ** 2).mean(1).sum()
    loss = fast_jit(functools.partial(critic_loss, config, environment))(
        learner.trained.critics, learner, batch, jax.random.key(1)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("estimator", [pytest.param("frequency", marks=pytest.mark.slow), "gumbel"])
def test_update_moves_every_network_and_the_targets_a_little(estimator):
    environment, config = Pendulum(), Sac(experts=2, estimator=estimator, **SMALL)
    learner, batch = learner_of(config, environment), batch_of(environment, 16)
    new, loss = fast_jit(functools.partial(update, config, environment))(learner, batch, jax.random.key(1))
    assert np.isfinite(loss)
    for name, (before, after) in {
        "actor": (learner.trained.actor, new.trained.actor),
        "critics": (learner.trained.critics, new.trained.critics),
    }.items():
        for path in before:
            assert np.abs(after[path] - before[path]).max() > 1e-4, (name, path)
    assert float(new.trained.log_alpha) != float(learner.trained.log_alpha)
    for path, old in learner.targets.items():
        np.testing.assert_allclose(
            new.targets[path], old + 0.01 * (new.trained.critics[path] - old), rtol=1e-5, atol=1e-8
        )


def fit_bandit(estimator, seeds, *, steps=1000, size=128):
    """Trains weights, means and widths of two primitives on the bandit's true rewards; returns (weights, actions) per
    seed."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, steps))

    def one(seed):
        params = {"z": jnp.zeros(2), "means": jnp.array([[-0.3], [0.4]]), "log_stds": jnp.full((2, 1), -1.0)}

        def loss(params, key):
            wide = lambda x: jnp.broadcast_to(x, (size, *x.shape))
            mixture = gm.Mixture(wide(jax.nn.log_softmax(params["z"])), wide(params["means"]), wide(params["log_stds"]))
            noise, choice = jax.random.split(key)
            return actor_loss(estimator, mixture, gm.draw(mixture, noise), Bandit().reward, 0.02, choice)[0]

        def body(carry, key):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(seed), steps)
        params = jax.lax.scan(body, (params, optimizer.init(params)), keys)[0][0]
        return jax.nn.softmax(params["z"]), 2 * jnp.tanh(params["means"][:, 0])

    return jax.jit(jax.vmap(one))(jnp.asarray(seeds))


def test_frequency_estimator_finds_both_peaks_of_the_bandit_at_equal_weights():
    weights, actions = fit_bandit("frequency", [0, 1, 2])
    np.testing.assert_allclose(weights, 0.5, atol=0.05)
    np.testing.assert_allclose(actions, np.tile([-1.0, 1.0], (3, 1)), atol=0.05)


def test_training_the_best_primitive_alone_lets_one_take_over():
    weights, _ = fit_bandit("frequency_best", [0, 1, 2], steps=3000)
    assert np.abs(np.asarray(weights) - 0.5).mean() > 0.15


def test_memory_is_a_ring():
    environment = Bandit()
    run = fast_jit(functools.partial(runs.start, Sac(experts=1, **SMALL), environment))(jax.random.key(0))
    one = lambda i: Transition(jnp.ones(1) * i, jnp.zeros(1), jnp.asarray(i, jnp.float32), jnp.zeros(1), jnp.array(1.0))
    fill = fast_jit(
        lambda memory, rewards: jax.lax.scan(lambda m, i: (runs.remember(m, one(i)), None), memory, rewards)[0]
    )
    memory = fill(run.memory, jnp.arange(70))
    np.testing.assert_array_equal(memory.transitions.reward, [*range(64, 70), *range(6, 64)])
    few = fill(run.memory, jnp.arange(1, 4))
    assert set(np.asarray(runs.recall(few, jax.random.key(0), 50).reward)) == {1.0, 2.0, 3.0}


def test_smaller_actor_and_critic_are_slices():
    for config, choices in (
        (ActorConfig(3, 1, 4, 16), {"width": 0.5, "experts": 2}),
        (CriticConfig(3, 1, 16), {"width": 0.5}),
    ):
        params, _ = fast_jit(functools.partial(initialize, config))(jax.random.key(0))
        small, _ = extract(config, config.shrink(**choices), params, {})
        assert {k: v.shape for k, v in small.items()} == {
            k: v.shape for k, v in abstract(config.shrink(**choices)).params.items()
        }
        for name, array in small.items():
            np.testing.assert_array_equal(array, params[name][tuple(slice(n) for n in array.shape)])


def test_mistakes():
    with pytest.raises(UserError, match="unknown estimator 'best'; valid: frequency"):
        Sac(estimator="best")
    with pytest.raises(UserError, match="experts=0; valid: whole numbers from 1"):
        Sac(experts=0)
