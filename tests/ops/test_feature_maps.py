"""Feature maps against the kernels that their products stand for, and cosFormer's numbers of the fact sheet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops import feature_maps
from research.ops.feature_maps import (
    cos_reweighted,
    elu_plus_one,
    orthogonal_projection,
    positive_random_features,
    relu_random_features,
    taylor,
)
from tests.ops.compare import draw, filler

# Fact sheet, section 3.3: T = 6, M = 6, relu.
COSFORMER = [
    [0.11566983, 0.07329802],
    [0.49870333, 0.32212016],
    [-0.48480528, -0.36868196],
    [0.05296982, 0.04704489],
    [0.52683696, 0.54997945],
    [-0.42924874, -0.49786985],
]
COSFORMER_CAUSAL = [
    [0.42737988, -0.25554110],
    [0.42737988, -0.25554110],
    [-0.65951797, -0.09009487],
    [0.14357244, 0.29114162],
    *COSFORMER[4:],
]


def _linear_attention(q, k, v, causal):
    """sum_j (q_i . k_j) v_j / max(sum_j q_i . k_j, 1e-6) of [T, K], by states: cumulative sums or one sum of k (x)
    v."""
    states, norms = k[:, :, None] * v[:, None], k
    states, norms = (jnp.cumsum(a, 0) if causal else a.sum(0, keepdims=True) for a in (states, norms))
    return (q[:, None] @ states)[:, 0] / jnp.maximum((q * norms).sum(-1, keepdims=True), 1e-6)


@pytest.mark.parametrize("causal, oracle", [(False, COSFORMER), (True, COSFORMER_CAUSAL)])
def test_cosformer_gives_the_numbers_of_the_sheet(causal, oracle):
    with jax.enable_x64(True):
        q, k = (cos_reweighted(jnp.asarray(filler((6, 1, 3), i)), jnp.arange(1, 7), 6)[:, 0] for i in (0, 1))
        np.testing.assert_allclose(_linear_attention(q, k, filler((6, 2), 2), causal), oracle, atol=1e-7)


def test_cosformer_products_are_the_reweighted_ones_and_not_negative():
    q, k, positions, length = draw((2, 7, 3, 5), 0), draw((2, 7, 3, 5), 1), jnp.arange(7), 11
    phi_q, phi_k = (cos_reweighted(jnp.asarray(x), positions, length) for x in (q, k))
    angle = np.pi * (np.arange(7)[:, None] - np.arange(7)) / (2 * length)
    expected = np.einsum("bihk,bjhk->bhij", np.maximum(q, 0), np.maximum(k, 0)) * np.cos(angle)
    products = np.einsum("bihk,bjhk->bhij", phi_q, phi_k)
    np.testing.assert_allclose(products, expected, atol=1e-6 * expected.max())
    assert phi_q.shape == (2, 7, 3, 10) and products.min() >= -1e-6
    shifted = cos_reweighted(jnp.asarray(q), jnp.tile(positions, (2, 1)) + 4, length)
    shifted = np.einsum("bihk,bjhk->bhij", shifted, cos_reweighted(jnp.asarray(k), positions + 4, length))
    np.testing.assert_allclose(shifted, expected, atol=1e-6 * expected.max())


@pytest.mark.parametrize("size, width", [(1, 3), (8, 45), (16, 153), (24, 325)])
def test_taylor_products_are_the_second_order_of_exp(size, width):
    q, k = draw((3, 5, size), 0), draw((3, 5, size), 1)
    phi_q, phi_k = taylor(jnp.asarray(q)), taylor(jnp.asarray(k))
    s = (q.astype(np.float64) * k).sum(-1) / np.sqrt(size)
    assert phi_q.shape == (3, 5, width)
    expected = 1 + s + s**2 / 2
    np.testing.assert_allclose((phi_q * phi_k).sum(-1), expected, atol=2e-6 * np.abs(expected).max())
    linear = phi_q[..., 1 : size + 1]
    np.testing.assert_allclose(linear, q / size**0.25, rtol=1e-6)


def test_elu_plus_one_and_its_gradient_are_positive_and_finite():
    x = jnp.array([-1e4, -50.0, -1.0, 0.0, 2.0, 1e4])
    np.testing.assert_allclose(elu_plus_one(x), [0, np.exp(-50.0), np.exp(-1.0), 1, 3, 10001], rtol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(elu_plus_one))(x), [0, np.exp(-50.0), np.exp(-1.0), 1, 1, 1], rtol=1e-6
    )
    np.testing.assert_array_equal(feature_maps.relu(x), np.maximum(x, 0))


def _estimates(projection, q, k):
    phi = functools.partial(positive_random_features, projection=projection, stabiliser=0.0, eps=0.0)
    return (phi(q) * phi(k)).sum(-1)


@pytest.mark.parametrize("size", [3, 16])
def test_positive_random_features_estimate_the_softmax_kernel(size):
    q, k = (jnp.asarray(0.3 * draw((4, 2, size), i)) for i in (0, 1))
    projection = orthogonal_projection(jax.random.key(0), 100_000, size)
    expected = jnp.exp((q * k).sum(-1) / size**0.5)
    np.testing.assert_allclose(_estimates(projection, q, k), expected, rtol=0.01)


def test_the_sheets_example_of_random_features():
    q, k = jnp.array([0.3, -0.2, 0.5]), jnp.array([0.1, 0.4, -0.3])
    projection = orthogonal_projection(jax.random.key(1), 200_000, 3)
    estimate = _estimates(projection, (q * 3**0.25)[None, None], (k * 3**0.25)[None, None])
    assert abs(float(estimate[0, 0]) - 0.81873) < 0.003


@pytest.mark.slow
def test_orthogonal_rows_have_less_variance_than_independent_ones():
    q, k = (jnp.asarray(draw((1, 1, 8), i)) for i in (0, 1))
    keys = jax.random.split(jax.random.key(0), 2000)
    orthogonal = jax.vmap(lambda key: _estimates(orthogonal_projection(key, 8, 8), q, k))(keys)
    independent = jax.vmap(lambda key: _estimates(jax.random.normal(key, (8, 8)), q, k))(keys)
    assert float(orthogonal.std()) < 0.97 * float(independent.std())


@pytest.mark.slow
def test_projection_rows_are_orthogonal_with_the_asked_lengths():
    rows = orthogonal_projection(jax.random.key(0), 11, 5, scaling="constant")
    for block in (rows[:5], rows[5:10]):
        np.testing.assert_allclose(block @ block.T, 5 * np.eye(5), atol=1e-5)
    lengths = jnp.linalg.norm(orthogonal_projection(jax.random.key(0), 4000, 5), axis=-1)
    assert abs(float(jnp.square(lengths).mean()) - 5) < 0.3 and float(lengths.std()) > 0.5
    mean = orthogonal_projection(jax.random.key(2), 20_000, 5).mean(0)  # a QR without its signs is biased here
    np.testing.assert_allclose(mean, 0, atol=0.05)


@pytest.mark.slow
def test_stabilisers_keep_features_finite_and_attention_the_same():
    q, k, v = (jnp.asarray(draw((33, 1, 16), i)) for i in range(3))
    projection = orthogonal_projection(jax.random.key(0), 64, 16)
    phi = functools.partial(positive_random_features, projection=projection, eps=0.0)
    plain = _linear_attention(phi(q, stabiliser=0.0)[:, 0], phi(k, stabiliser=0.0)[:, 0], v[:, 0], True)
    for of_key in ("sequence", 1.5, jnp.full((1, 1), 2.0)):
        stable = _linear_attention(phi(q, stabiliser="token")[:, 0], phi(k, stabiliser=of_key)[:, 0], v[:, 0], True)
        np.testing.assert_allclose(stable, plain, atol=1e-5)
    huge = positive_random_features(100 * q, projection, stabiliser="token")
    assert bool(jnp.isfinite(huge).all()) and float(huge.min()) > 0 and float(huge.max()) <= 1.001 * 64**-0.5


def test_a_constant_stabiliser_does_not_look_ahead_and_a_maximum_over_the_sequence_does():
    x, projection = draw((9, 2, 8), 0), orthogonal_projection(jax.random.key(0), 16, 8)
    changed = x.copy()
    changed[5:] *= 3
    for stabiliser, same in ((jnp.ones((2, 1)), True), ("token", True), ("sequence", False)):
        a, b = (positive_random_features(jnp.asarray(y), projection, stabiliser=stabiliser)[:5] for y in (x, changed))
        assert bool(jnp.array_equal(a, b)) == same


def test_relu_random_features_are_positive_and_the_formula():
    x, projection = draw((3, 7, 2, 8), 0), orthogonal_projection(jax.random.key(0), 20, 8)
    expected = np.maximum(x.astype(np.float64) @ np.asarray(projection).T * 8**-0.25, 0) + 1e-3
    np.testing.assert_allclose(relu_random_features(jnp.asarray(x), projection), expected, rtol=1e-4, atol=1e-6)


MAPS = {
    "elu": elu_plus_one,
    "relu": feature_maps.relu,
    "cos": lambda x: cos_reweighted(x, jnp.arange(x.shape[-3]), 64),
    "taylor": taylor,
    "positive": lambda x: positive_random_features(
        x, orthogonal_projection(jax.random.key(0), 13, x.shape[-1]), stabiliser="token"
    ),
    "relu random": lambda x: relu_random_features(x, orthogonal_projection(jax.random.key(0), 13, x.shape[-1])),
}


@pytest.mark.slow_unless("relu")
@pytest.mark.parametrize("name", MAPS)
def test_dtypes_and_platforms(name):
    x = draw((2, 5, 3, 4), 0)
    exact = MAPS[name](jnp.asarray(x))
    half = MAPS[name](jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=2e-2 * float(jnp.abs(exact).max()))
    gradient = jax.grad(lambda x: (MAPS[name](x) ** 2).sum())
    assert bool(jnp.isfinite(gradient(jnp.asarray(x))).all())
    for platform in ("cuda", "tpu"):
        jax.export.export(jax.jit(gradient), platforms=[platform])(jnp.asarray(x))
    with jax.enable_x64(True):
        double = MAPS[name](jnp.asarray(x, jnp.float64))
        assert double.dtype == jnp.float64
        np.testing.assert_allclose(double, exact, atol=1e-5 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda x, w: cos_reweighted(x, jnp.arange(4), 9),
            r"cos_reweighted: positions is of shape \(4,\); expected \(5,\) or \(2, 5\)",
        ),
        (lambda x, w: cos_reweighted(x, jnp.arange(5), 0), "max_length is 0; expected at least 1"),
        (
            lambda x, w: positive_random_features(x, w, stabiliser="all"),
            "stabiliser is 'all'; expected a number, an array or one of token, sequence",
        ),
        (lambda x, w: relu_random_features(x, w[:, :2]), r"projection has shape \(6, 2\); expected \[M K\] = \(6, 4\)"),
        (
            lambda x, w: orthogonal_projection(jax.random.key(0), 3, 4, scaling="unit"),
            "scaling is 'unit'; expected one of gaussian, constant",
        ),
    ],
)
def test_errors_name_argument_value_and_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 5, 3, 4)), jnp.zeros((6, 4)))
