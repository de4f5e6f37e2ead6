"""GELU with global response normalisation against its reference implementation, in outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.gelu_grn import gelu_grn, gelu_grn_naive

EPS = 1e-6


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def draw(shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(0, 2, shape), dtype)
    return x, *(jnp.asarray(rng.normal(size=shape[-1]), jnp.promote_types(dtype, jnp.float32)) for _ in range(2))


def gradients(fn, x, scale, bias):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    return jax.grad(lambda *a: (fn(*a, EPS).astype(jnp.float32) * weights).sum(), (0, 1, 2))(x, scale, bias)


@pytest.mark.parametrize(
    "shape", [pytest.param((2, 7, 7, 12), marks=pytest.mark.slow), (1, 1, 1, 3), (3, 13, 5), (2, 3)], ids=str
)
def test_the_fast_implementation_is_the_naive_one_in_outputs_and_gradients(shape):
    args = draw(shape)
    np.testing.assert_allclose(gelu_grn(*args, EPS), gelu_grn_naive(*args, EPS), atol=1e-5)
    for fast, naive in zip(gradients(gelu_grn, *args), gradients(gelu_grn_naive, *args), strict=True):
        np.testing.assert_allclose(fast, naive, atol=1e-5 * float(jnp.abs(naive).max()) + 1e-6)


@pytest.mark.slow
def test_float64_to_rounding(x64):
    args = draw((2, 5, 4, 6), np.float64)
    np.testing.assert_allclose(gelu_grn(*args, EPS), gelu_grn_naive(*args, EPS), rtol=0, atol=1e-12)
    for fast, naive in zip(gradients(gelu_grn, *args), gradients(gelu_grn_naive, *args), strict=True):
        np.testing.assert_allclose(fast, naive, rtol=0, atol=1e-11)


def test_bfloat16_keeps_its_dtype_and_sums_in_float32():
    x, scale, bias = draw((2, 9, 9, 8))
    low = gelu_grn(x.astype(jnp.bfloat16), scale, bias, EPS)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), gelu_grn_naive(x, scale, bias, EPS), atol=2e-2 * 12)


def test_without_bias():
    x, scale, _ = draw((2, 4, 4, 5))
    np.testing.assert_allclose(gelu_grn(x, scale, None, EPS), gelu_grn_naive(x, scale, None, EPS), atol=1e-5)
    fast, naive = (jax.grad(lambda x, f=f: (f(x, scale, None, EPS) ** 2).sum())(x) for f in (gelu_grn, gelu_grn_naive))
    np.testing.assert_allclose(fast, naive, atol=1e-4)


def test_a_channel_of_zeros_has_a_finite_gradient():
    x, scale, bias = draw((1, 3, 3, 4))
    x = x.at[..., 1].set(0)
    assert all(np.isfinite(g).all() for g in gradients(gelu_grn, x, scale, bias))
    assert all(np.isfinite(g).all() for g in gradients(gelu_grn, jnp.zeros_like(x), scale, bias))
