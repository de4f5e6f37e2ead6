"""cosFormer, Performer and simplified linear attention: their implementations, the quadratic formula, what is special
about each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.modules.axes import Init
from research.modules.mixers.base import Call
from research.modules.mixers.kernel_attention import CosFormer, Performer, SimplifiedLinearAttention
from research.modules.state import apply
from tests.modules.mixers.agreement import check_forms, check_shrink, num_params
from tests.modules.mixers.recurrent import Alone, check_recurrent, check_slices, convolved, heads, run, weights
from tests.ops.compare import assert_agree, draw

SPECS = {
    "cosformer": CosFormer(num_heads=2),
    "performer": Performer(num_heads=2),
    "performer relu": Performer(num_heads=2, feature_map="relu"),
    "sla": SimplifiedLinearAttention(num_heads=2),
}


def relu(x):
    return np.maximum(x, 0)


def kernel(name, w, q, k):
    """phi(q_i).phi(k_j) [B, H, T, T] before the causal mask."""
    length, size = q.shape[1], q.shape[-1]
    if name == "cosformer":
        angle = np.pi * (np.arange(length)[:, None] - np.arange(length)) / (2 * length)
        return np.einsum("bihk,bjhk->bhij", relu(q), relu(k)) * np.cos(angle)
    if name == "sla":
        return np.einsum("bihk,bjhk->bhij", relu(q), relu(k))
    projection = w["projection"] / size**0.25
    if name == "performer relu":
        phi_q, phi_k = (relu(x @ projection.T) + 1e-3 for x in (q, k))
    else:
        exponent = lambda x: x @ projection.T - np.square(x).sum(-1, keepdims=True) / (2 * np.sqrt(size))
        phi_q = np.exp(exponent(q) - exponent(q).max(-1, keepdims=True)) + 1e-4
        phi_k = np.exp(exponent(k)) + 1e-4
    return np.einsum("bihm,bjhm->bhij", phi_q, phi_k) / len(projection)


@pytest.mark.slow_unless("performer relu")
@pytest.mark.parametrize("name", SPECS)
def test_implementations_agree_and_are_the_quadratic_attention(name):
    w, x, y = check_recurrent(SPECS[name], 16, 9, gradients=name != "performer relu")
    q, k, v = (heads(x, w[key]) for key in "qkv")
    scores = np.tril(kernel(name, w, q, k))
    total = scores.sum(-1, keepdims=True)
    scores = scores / (np.maximum(total, 1e-6) if name == "cosformer" else total + 1e-6)
    if "performer" in name:
        assert scores.min() >= 0
        np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-4)
    mixed = np.einsum("bhij,bjhv->bihv", scores, v)
    if name == "sla":
        mixed = mixed + convolved(v, np.repeat(w["conv/kernel"][:, None], 2, 1)) + w["conv/bias"]
    assert_agree(y, np.einsum("bthv,hvd->btd", mixed, w["out"]), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 3, 65, 128])
@pytest.mark.parametrize("name", SPECS)
def test_implementations_agree_at_other_lengths(name, length):
    check_forms(SPECS[name], 16, length)


@pytest.mark.parametrize("name", SPECS)
def test_counts(name):
    conv = 5 * 8 + 8 if name == "sla" else 0
    assert num_params(SPECS[name], 16) == 4 * 16**2 + conv


def test_cosformer_refuses_more_tokens_than_its_length():
    config = Alone(CosFormer(), 16, 8)
    arrays, x = weights(config), jnp.ones((1, 9, 16))
    message = "mixer cosformer: 9 tokens; valid: up to length=8, which is part of every weight"
    with pytest.raises(UserError, match=message):
        apply(config, *arrays, x, Call())
    with pytest.raises(UserError, match=message):
        apply(config, *arrays, x[:, :4], Call(position=5))
    apply(config, *arrays, 1, 16, method="init_state")  # it keeps no tokens, so room for more of them is nothing to it


@pytest.mark.slow
def test_performer_approaches_softmax_attention():
    """Many features, small queries and keys: the outputs are those of causal softmax attention within Monte-Carlo
    error."""
    config = Alone(Performer(num_heads=1, num_features=4096), 8, 6)
    params, _ = weights(config)
    projection = config.build(Init(jax.random.key(0))).projection[...]
    params = {**params, "q": 0.3 * params["q"], "k": 0.3 * params["k"]}
    x = draw((2, 6, 8), 0)
    y, _ = run(config, (params, {"projection": projection}), jnp.asarray(x))
    q, k, v = (heads(x, np.asarray(params[name])) for name in "qkv")
    scores = np.einsum("bihk,bjhk->bhij", q, k) / np.sqrt(8)
    scores = np.exp(np.where(np.tril(np.ones((6, 6))), scores, -np.inf))
    mixed = np.einsum("bhij,bjhv->bihv", scores / scores.sum(-1, keepdims=True), v)
    assert_agree(y, np.einsum("bthv,hvd->btd", mixed, np.asarray(params["out"])), 0.02)
    products = projection[:8] @ projection[:8].T
    np.testing.assert_allclose(products, np.diag(np.diagonal(products)), atol=1e-4)


def test_performer_features_follow_the_papers_rule():
    assert Performer(num_heads=4).resolve(256).num_features == 266  # 64 ln 64
    assert Performer(num_heads=4, num_features=7).resolve(256).num_features == 7


def test_smaller_selves_are_leading_slices():
    for spec in (CosFormer(), SimplifiedLinearAttention()):
        small = check_shrink(spec, 32, 16, state=0.5, cut=("embed", "layer/heads", "layer/state"))
        assert (small.num_heads, small.d_state, small.head_dim) == (2, 4, 8)
        check_slices(spec, 32, 16, small)
    small = check_shrink(Performer(), 32, 16, state=5, cut=("embed", "layer/heads", "layer/features"))
    assert (small.num_heads, small.d_state, small.num_features) == (2, 8, 5)
    assert check_slices(Performer(), 32, 16, small)["projection"] == (5, 8)


def test_unknown_map_names_the_valid_ones():
    with pytest.raises(UserError, match="mixer performer: feature_map='softmax'; valid: positive, relu"):
        Performer(feature_map="softmax").resolve(16)
