"""Segment sums of log decays and the triangular inverse: definitions, accuracy where running sums cancel, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.segment_sums import running_sums, segment_sum
from research.ops.unit_lower import unit_lower_inverse
from tests.ops.compare import assert_agree, draw


def test_segment_sum_is_the_definition():
    log_decay = -np.abs(draw((2, 9), 0))
    matrix = np.asarray(segment_sum(log_decay))
    for i in range(9):
        for j in range(9):
            expected = log_decay[:, j + 1 : i + 1].sum(1) if i >= j else -np.inf
            np.testing.assert_allclose(matrix[:, i, j], expected, atol=1e-6)
    assert np.array_equal(np.exp(np.diagonal(matrix, axis1=1, axis2=2)), np.ones((2, 9)))


@pytest.mark.parametrize("length", [256, 2000])
def test_no_cancellation_where_running_sums_are_large(length):
    """Strong decays first, weak ones after: a difference of float32 running sums is wrong in the fourth digit of the
    decay."""
    log_decay = np.where(np.arange(length) < length // 2, -15.0, -1e-3) * (1 + 0.1 * np.sin(np.arange(length)))
    exact = np.cumsum(np.float32(log_decay).astype(np.float64))
    actual = np.asarray(segment_sum(jnp.asarray(log_decay, jnp.float32)), np.float64)[length // 2 :, length // 2 :]
    expected = exact[length // 2 :, None] - exact[None, length // 2 :]
    lower = np.tril_indices(length - length // 2)
    assert np.max(np.abs(np.exp(actual[lower]) - np.exp(expected[lower]))) < 1e-6
    naive = np.cumsum(np.float32(log_decay), dtype=np.float32)[length // 2 :]
    assert np.max(np.abs(np.exp((naive[:, None] - naive[None])[lower]) - np.exp(expected[lower]))) > 1e-5


def test_running_sums_hold_at_length_16384_on_both_axes():
    log_decay = np.float32(-np.abs(draw((16384, 2), 1)))
    exact = np.cumsum(log_decay.astype(np.float64), 0)
    for x, axis in ((log_decay, -2), (log_decay.T, -1)):
        total = sum(
            np.asarray(part, np.float64) for part in jax.jit(running_sums, static_argnums=1)(jnp.asarray(x), axis)
        )
        np.testing.assert_allclose(total, exact if axis == -2 else exact.T, atol=1e-4)


def test_gradient_has_no_nan_at_strong_decay():
    loss = lambda x: jnp.exp(segment_sum(x)).sum()
    grad = np.asarray(jax.grad(loss)(jnp.asarray([-200.0, -0.5, -2000.0, -0.1])))
    assert np.isfinite(grad).all()
    # d/d(second): pairs that span it alone or with underflowing neighbours
    np.testing.assert_allclose(grad[1], np.exp(-0.5), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_unit_lower_inverse(size):
    strict = np.tril(draw((3, size, size), 0), -1) / np.sqrt(size)
    inverse = unit_lower_inverse(jnp.asarray(strict))
    np.testing.assert_allclose(
        (np.eye(size) + strict) @ np.asarray(inverse), np.broadcast_to(np.eye(size), strict.shape), atol=2e-5
    )
    loss = lambda f: lambda m: (f(m) * jnp.cos(jnp.arange(m.size)).reshape(m.shape)).sum()
    reference = lambda m: jnp.linalg.inv(jnp.eye(size) + jnp.tril(m, -1))
    assert_agree(
        jax.grad(loss(unit_lower_inverse))(jnp.asarray(strict)), jax.grad(loss(reference))(jnp.asarray(strict)), 1e-4
    )


def test_unit_lower_inverse_is_stable_where_powers_grow():
    """All ones below the diagonal: the powers in a Neumann series reach 1e18 and cancel; blocks do not implementation
    them."""
    ones = jnp.tril(jnp.ones((64, 64)), -1)
    expected = np.eye(64) - np.eye(64, k=-1)
    np.testing.assert_allclose(unit_lower_inverse(ones), expected, atol=1e-5)


def test_unit_lower_inverse_names_a_bad_size():
    with pytest.raises(ValueError, match="expected a size that is a power of two"):
        unit_lower_inverse(jnp.zeros((3, 3)))
