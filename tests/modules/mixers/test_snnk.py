"""Scalable neural network kernels: what their products estimate, counts, slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.modules.axes import Init
from research.modules.mixers.snnk import SnnkLinear, SnnkMlp, input_features, weight_features
from research.modules.state import split
from tests.ops.compare import assert_agree, draw

FEATURES = 200_000


def estimates(activation, x, weight, bias):
    projection = jax.random.normal(jax.random.key(0), (FEATURES, x.shape[-1]))
    kind = "relu" if activation == "relu" else "positive"
    return input_features(x, projection, kind) @ weight_features(weight, bias, projection, activation).T


def test_relu_features_give_the_arc_cosine_kernel():
    x, weight = draw((3, 5), 0), draw((4, 5), 1)
    lengths = np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(weight, axis=-1)
    angle = np.arccos(x @ weight.T / lengths)
    expected = lengths / (2 * np.pi) * (np.sin(angle) + (np.pi - angle) * np.cos(angle))
    assert_agree(estimates("relu", jnp.asarray(x), jnp.asarray(weight), None), expected, 0.02)


@pytest.mark.parametrize("activation", ["cos", "sin"])
def test_positive_features_give_the_activation_itself(activation):
    x, weight, bias = 0.3 * draw((3, 5), 0), 0.5 * draw((4, 5), 1), draw((4,), 2)
    expected = {"cos": np.cos, "sin": np.sin}[activation](x @ weight.T + bias)
    assert_agree(estimates(activation, jnp.asarray(x), jnp.asarray(weight), jnp.asarray(bias)), expected, 0.02)


@pytest.mark.parametrize("kind", ["relu", "positive"])
def test_layer_and_ffn_are_their_formulas(kind):
    mlp = SnnkMlp(8, 12, ("embed", "layer/mlp"), Init(jax.random.key(0)), features=6, kind=kind)
    _, params, stats, axes = split(mlp)
    w = {k: np.asarray(v, np.float64) for k, v in {**params, **stats}.items()}
    w["down/bias"] = np.arange(8.0)
    mlp.down.bias[...] = jnp.arange(8.0)
    x = draw((2, 3, 8), 0)
    inputs = x.astype(np.float64)
    if kind == "positive":
        inputs = inputs / np.sqrt(np.square(inputs).sum(-1, keepdims=True) + 1e-6)
        phi = np.exp(inputs @ w["up/projection"].T - np.square(inputs).sum(-1, keepdims=True) / 2)
    else:
        phi = np.maximum(inputs @ w["up/projection"].T, 0)
    assert_agree(mlp(jnp.asarray(x)), phi / np.sqrt(6) @ w["up/kernel"] @ w["down/kernel"] + w["down/bias"], 1e-5)
    assert sum(v.size for v in params.values()) == 6 * 12 + 12 * 8 + 8 and set(stats) == {"up/projection"}
    assert axes["up/projection"] == ("layer/features", "embed") and axes["up/kernel"] == ("layer/features", "layer/mlp")


def test_default_features_are_a_quarter_of_the_channels_and_the_dtype_is_kept():
    mlp = SnnkMlp(8, 12, ("embed", "mlp"), Init(jax.random.key(0)))
    assert mlp.up.kernel.shape == (2, 12)
    assert mlp(jnp.ones((3, 8), jnp.bfloat16)).dtype == jnp.float32  # float32 weights
    half = SnnkLinear(8, 4, 5, ("embed", "features", "mlp"), Init(jax.random.key(0), jnp.bfloat16))
    assert half(jnp.ones((3, 8), jnp.bfloat16)).dtype == jnp.bfloat16


def test_bad_arguments_name_the_valid_ones():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="snnk: map is 'gelu'; expected one of relu, positive"):
        input_features(x, x, "gelu")
    with pytest.raises(ValueError, match="snnk: activation is 'gelu'; expected one of relu, cos, sin"):
        weight_features(x, None, x, "gelu")
    with pytest.raises(ValueError, match="'relu' takes no bias"):
        weight_features(x, jnp.ones(2), x, "relu")
