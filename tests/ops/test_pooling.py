"""2x2 max-pooling against a loop, odd sizes, and its gradient behind arithmetic that XLA computes twice."""

import jax
import jax.numpy as jnp
import numpy as np

from research.ops.pooling import masked_last, masked_mean, max_pool_2x2


def test_agrees_with_a_loop_and_leaves_an_odd_edge_out():
    x = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
    expected = np.array(
        [
            [[x[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((0, 1)) for j in range(3)] for i in range(2)]
            for b in range(2)
        ]
    )
    np.testing.assert_array_equal(max_pool_2x2(jnp.asarray(x)), expected)


def test_gradient_goes_to_the_largest_and_ties_share_it():
    x = jnp.array([[1.0, 4.0, 2.0, 2.0], [3.0, 0.0, 2.0, 2.0]])[None, :, :, None]
    grad = jax.grad(lambda x: (max_pool_2x2(x)[0, 0, :, 0] * jnp.array([5.0, 8.0])).sum())(x)[0, :, :, 0]
    np.testing.assert_array_equal(grad, [[0, 5, 2, 2], [0, 0, 2, 2]])


def test_gradient_is_finite_behind_arithmetic_that_is_computed_twice():
    rng = np.random.default_rng(1)
    x, factor, offset = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 16, 16, 8), (8,), (8,)))
    loss = lambda x, f: (max_pool_2x2(jax.nn.relu(x * f / jnp.sqrt(f * f + 1e-5) + offset)) ** 2).sum()
    for grad in jax.jit(jax.grad(loss, (0, 1)))(x, factor):
        assert np.isfinite(grad).all()


def test_pooling_over_the_real_tokens():
    x = jnp.arange(12.0).reshape(2, 3, 2)
    mask = jnp.array([[True, False, True], [False, False, False]])
    np.testing.assert_array_equal(masked_mean(x, mask), [[2, 3], [0, 0]])
    mask = jnp.array([[True, True, False], [False, True, True]])
    np.testing.assert_array_equal(masked_last(x, mask), [[2, 3], [10, 11]])
