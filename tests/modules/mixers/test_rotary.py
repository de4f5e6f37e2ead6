"""Rotary position embedding against complex numbers; products know distances only."""

import jax.numpy as jnp
import numpy as np

from research.modules.mixers.rotary import rotary
from tests.ops.compare import assert_agree, draw


def turned(x, positions, theta=10000.0):
    """Features i and i + K/2 as one complex number, times exp(i position theta^(-2i/K)), in float64."""
    half = x.shape[-1] // 2
    z = x[..., :half].astype(np.float64) + 1j * x[..., half:]
    z = z * np.exp(
        1j * np.asarray(positions, np.float64)[..., None, None] * theta ** (-2 * np.arange(half) / x.shape[-1])
    )
    return np.concatenate([z.real, z.imag], -1)


def test_rotation_is_a_product_of_complex_numbers():
    x = draw((2, 5, 3, 8), 0)
    for positions in (np.arange(5), np.array([[0, 1, 2, 3, 4], [7, 8, 900, 901, 5000]])):
        assert_agree(
            rotary(x, positions, 500.0),
            turned(x, positions, 500.0).astype(np.float32),
            2e-3 if positions.max() > 99 else 1e-6,
        )
    assert_agree(rotary(x[:, 2], 2), turned(x, np.arange(5))[:, 2].astype(np.float32), 1e-6)  # one token of a step
    np.testing.assert_array_equal(rotary(x[:, :1], jnp.zeros(1, jnp.int32)), x[:, :1])


def test_first_and_second_half_turn_together():
    """[1, 0, 0, 0] at position 1: feature 0 turns by one radian into feature 2 (not 1)."""
    y = rotary(jnp.array([[[1.0, 0, 0, 0]]]), jnp.array([1]))
    np.testing.assert_allclose(y[0, 0], [0.5403023, 0, 0.8414710, 0], atol=1e-7)
    y = rotary(jnp.array([[[0, 1.0, 0, 0]]]), jnp.array([1]))
    np.testing.assert_allclose(y[0, 0], [0, 0.9999500, 0, 0.0099998], atol=1e-7)


def test_products_depend_on_the_distance_alone():
    q, k = draw((1, 6, 1, 8), 1), draw((1, 6, 1, 8), 2)
    product = lambda at: (rotary(q, at + jnp.arange(6)) * rotary(k, at + 3 + jnp.arange(6))).sum(-1)
    assert_agree(product(1000), product(0), 1e-4)
    assert rotary(jnp.asarray(q, jnp.bfloat16), jnp.arange(6)).dtype == jnp.bfloat16
