"""The toy tasks: peaks, crashes and arrivals, the pendulum's equations against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.control.environments import Bandit, Detour, Pendulum, environment
from research.errors import UserError


def test_bandit_has_two_equal_peaks_at_minus_one_and_one():
    actions = np.linspace(-1, 1, 2001)
    rewards = np.asarray(Bandit().reward(jnp.asarray(actions)[:, None]))
    peaks = 2 * actions[rewards > 1 - 1e-6]
    assert set(peaks.round(2)) == {-1.0, 1.0} and rewards.max() == pytest.approx(1)
    np.testing.assert_allclose(rewards, rewards[::-1], atol=1e-6)
    assert bool(Bandit().step(jnp.ones(1), jnp.array([0.5]))[2])


def walk(actions, start=(-1.0, 0.0)):
    state, total, steps = jnp.array(start), 0.0, 0
    for action in actions:
        state, reward, terminal = Detour().step(state, jnp.asarray(action, jnp.float32))
        total, steps = total + float(reward), steps + 1
        if terminal:
            break
    return state, total, steps, bool(terminal)


def test_straight_on_crashes_and_both_ways_round_arrive_for_the_same_return():
    _state, total, steps, terminal = walk([(1, 0)] * 60, start=(-0.95, 0.0))
    assert terminal and steps == 6 and total == pytest.approx(0.6 - 0.06 - 1, abs=1e-4)
    up, down = ([(1, side)] * 10 + [(1, -side)] * 12 for side in (1, -1))
    (_, first, steps, arrived), (_, second, *_) = walk(up), walk(down)
    assert arrived and first == pytest.approx(second, abs=1e-5) and 2.4 < first < 2.8
    assert not walk([(0, 0)] * 60)[3]


def test_pendulum_follows_its_equations():
    angle, speed, torque = 2.5, -1.3, 0.6
    state, reward, terminal = Pendulum().step(jnp.array([angle + 2 * np.pi, speed]), jnp.array([torque / 2]))
    faster = speed + 0.05 * (15 * np.sin(angle) + 3 * torque)
    np.testing.assert_allclose(state, [angle + 2 * np.pi + 0.05 * faster, faster], rtol=1e-5)
    assert float(reward) == pytest.approx(-(angle**2 + 0.1 * speed**2 + 0.001 * torque**2), rel=1e-5) and not terminal
    np.testing.assert_allclose(Pendulum().observe(jnp.array([0.0, 3.0])), [1, 0, 3])
    assert float(Pendulum().step(jnp.array([1.5, 7.9]), jnp.array([1.0]))[0][1]) == 8.0
    starts = jax.vmap(Pendulum().reset)(jax.random.split(jax.random.key(0), 200))
    assert np.abs(starts[:, 0]).max() > 3 and np.abs(starts[:, 1]).max() <= 1


def test_unknown_task():
    with pytest.raises(UserError, match="unknown task 'maze'; valid: bandit, detour, pendulum"):
        environment("maze")
