"""Batch norm and the re-parameterised convolution against their reference implementations, in outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops import batch_norm, reparam_conv

BRANCHES = {7: {1: 5, 2: 3, 3: 3}, 9: {1: 5, 2: 5, 3: 3, 4: 3}}


def agree(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(np.asarray(x) - np.asarray(y)).max() <= tolerance * np.abs(np.asarray(y)).max()


def with_gradients(fn, *args):
    def loss(*args):
        y, mean, var = fn(*args)
        return (y * jnp.sin(jnp.arange(y.size).reshape(y.shape))).sum(), (y, mean, var)

    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(args))), has_aux=True))(*args)


@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (17, 3)])
def test_batch_norm_equals_its_twin(shape):
    x = 2 + 3 * jax.random.normal(jax.random.key(0), shape)
    scale, bias = jnp.linspace(0.5, 2, shape[-1]), jnp.linspace(-1, 1, shape[-1])
    fast = with_gradients(lambda *a: batch_norm.batch_norm(*a, 1e-5), x, scale, bias)
    naive = with_gradients(lambda *a: batch_norm.batch_norm_naive(*a, 1e-5), x, scale, bias)
    agree(fast, naive, 2e-5)


@pytest.mark.parametrize("implementation", [pytest.param("moments", marks=pytest.mark.slow), "cpu", "auto"])
@pytest.mark.parametrize("size, height, width", [(7, 8, 8), (7, 3, 5), (9, 11, 10)])
def test_moments_equal_explicit_branches(implementation, size, height, width):
    keys = jax.random.split(jax.random.key(1), 8)
    dilations = (1, *BRANCHES[size])
    sizes = (size, *BRANCHES[size].values())
    x = 0.7 + jax.random.normal(keys[0], (6, height, width, 3))
    kernels = tuple(jax.random.normal(k, (s, s, 3)) for k, s in zip(keys[1:6], sizes, strict=False))
    scales = 1 + 0.3 * jax.random.normal(keys[6], (len(sizes), 3))
    biases = jax.random.normal(keys[7], (len(sizes), 3))

    def run(implementation):
        return lambda *a: reparam_conv.reparam_conv(
            a[0], a[1], dilations, a[2], a[3], 1e-5, implementation=implementation
        )

    agree(
        with_gradients(run(implementation), x, kernels, scales, biases),
        with_gradients(run("naive"), x, kernels, scales, biases),
        2e-5,
    )
