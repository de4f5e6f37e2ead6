"""Attention as a mixer: its implementations, a twin in numpy, the cache, its sub-networks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.modules.mixers.attention import Attention
from research.modules.mixers.base import Call
from research.modules.state import merge
from tests.modules.mixers.agreement import Functions, check_forms, check_shrink, num_params
from tests.modules.mixers.test_rotary import turned
from tests.ops.compare import assert_agree, draw

GROUPED = Attention(num_heads=4, num_kv_heads=2, head_dim=6)


NORMED = replace(GROUPED, qk_norm=True, qk_norm_eps=0.1)


@pytest.mark.parametrize("length", [1, pytest.param(65, marks=pytest.mark.slow)])
def test_all_implementations_compute_the_same(length):
    check_forms(NORMED if length == 65 else GROUPED, 16, length, naive=length == 65)


def twin(weights, spec, x, window=None):
    """One sequence in float64, query by query; head h reads key head h // (H / G)."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    dim, groups, size = len(w["query"]), spec.num_kv_heads or spec.num_heads, spec.head_dim
    q = (x @ w["query"].reshape(dim, -1)).reshape(-1, spec.num_heads, size)
    k, v = (np.einsum("td,dgk->tgk", x, w[name]) for name in ("key", "value"))
    if spec.qk_norm:
        norm = lambda y, scale: scale * y / np.sqrt(np.square(y).mean(-1, keepdims=True) + spec.qk_norm_eps)
        q, k = norm(q, w["query_norm/scale"]), norm(k, w["key_norm/scale"])
    if spec.rotary:
        q, k = (turned(y, np.arange(len(x)), spec.rope_theta) for y in (q, k))
    out = np.zeros((len(x), spec.num_heads, size))
    for t in range(len(x)):
        first = 0 if window is None else max(t - window + 1, 0)
        last = t + 1 if spec.causal else len(x)
        for h in range(spec.num_heads):
            g = h // (spec.num_heads // groups)
            logits = k[first:last, g] @ q[t, h] / np.sqrt(size)
            p = np.exp(logits - logits.max())
            out[t, h] = p @ v[first:last, g] / p.sum()
    return out.reshape(len(x), -1) @ w["out"].reshape(-1, dim)


@pytest.mark.parametrize(
    "spec",
    [replace(GROUPED, rope_theta=50.0), Attention(num_heads=2, rotary=False), NORMED, replace(GROUPED, causal=False)],
    ids=["grouped, rotary", "plain", "normalised", "both ways"],
)
def test_attention_is_its_definition(spec):
    mixer, x = Functions(spec, 12, 9), draw((1, 9, 12), 3)
    params, stats = mixer.weights
    mixer.weights = {k: 1 + 0.5 * draw(v.shape, len(k)) if k.endswith("scale") else v for k, v in params.items()}, stats
    expected = twin(mixer.weights[0], mixer.spec, x[0].astype(np.float64))
    assert_agree(mixer.call(mixer.weights, x)[0][0], expected.astype(np.float32), 1e-5)


@pytest.mark.slow
def test_a_cache_may_be_written_over_and_holds_more_than_is_read():
    """Three guesses, all wrong: going back to their place gives what never having guessed gives, also from a first
    position known to be 0."""
    mixer, x, guesses = Functions(GROUPED, 16, 8), draw((2, 8, 16), 4), draw((2, 3, 16), 5)
    whole = mixer.call(mixer.weights, x)[0]
    known = jax.jit(
        lambda weights, x, ids, state: merge(mixer.graphdef, *weights)(x, Call(segment_ids=ids, position=0), state)
    )
    _, state = known(mixer.weights, x[:, :4], None, mixer.start(2, 11))
    _, guessed = mixer.call(mixer.weights, guesses, None, state, 4)
    y, _ = mixer.call(mixer.weights, x[:, 4:], None, guessed, 4)
    assert_agree(y, whole[:, 4:], 1e-5)
    ids = jnp.array([[7, 7, 9, 9], [9, 9, 9, 9]])
    y, state = known(mixer.weights, x[:, :4], ids, guessed)
    assert_agree(y, mixer.call(mixer.weights, x[:, :4], ids)[0], 1e-6)
    np.testing.assert_array_equal(state["ids"][:, :4], ids)


def test_cache_in_bfloat16():
    mixer, x = Functions(GROUPED, 16, 8), draw((2, 6, 16), 6)
    state = mixer.module.init_state(2, 6, jnp.bfloat16)
    y, after = mixer.call(mixer.weights, x, None, state, 0)
    assert y.dtype == jnp.float32 and after["k"].dtype == jnp.bfloat16
    assert_agree(y, mixer.call(mixer.weights, x)[0], 3e-2)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), mixer.weights)
    y, _ = mixer.call(half, jnp.asarray(x, jnp.bfloat16), None, state, 0)
    assert y.dtype == jnp.bfloat16


def test_counts_of_parameters():
    assert num_params(Attention(num_heads=8), 512) == 4 * 512**2
    assert num_params(Attention(num_heads=8, num_kv_heads=2), 512) == 2 * 512**2 + 2 * 512 * 128
    assert num_params(Attention(num_heads=3, head_dim=10, num_kv_heads=1), 32) == 2 * 32 * 30 + 2 * 32 * 10
    assert num_params(Attention(num_heads=8, qk_norm=True), 512) == 4 * 512**2 + 2 * 64


def test_smaller_selves_keep_groups_and_sizes_of_heads():
    small = check_shrink(Attention(num_heads=8, num_kv_heads=2), 32, 16, cut=("embed", "layer/heads"))
    assert (small.num_heads, small.num_kv_heads, small.head_dim) == (4, 2, 4)
    small = check_shrink(Attention(num_heads=8, num_kv_heads=2, qk_norm=True), 32, 16, cut=("embed", "layer/heads"))
    assert small.qk_norm and small.head_dim == 4
    small = check_shrink(Attention(num_heads=4), 32, 32, width=1.0, heads=3, cut=("layer/heads",))
    assert (small.num_heads, small.num_kv_heads, small.head_dim) == (3, 0, 8)
    with pytest.raises(UserError, match="heads=3 is outside its space; valid: multiples of 2 up to 8"):
        Attention(num_heads=8, num_kv_heads=2).resolve(32).shrink(1.0, 3, None)


def test_leading_heads_of_each_group_are_the_sub_network():
    """The full mixer, blind in the output for the heads that were cut, is the mixer of the slices."""
    spec = Attention(num_heads=6, num_kv_heads=2, head_dim=4)
    full, small = Functions(spec, 8, 7), Functions(spec.resolve(8).shrink(1.0, 4, None), 8, 7)
    params, stats = full.weights
    cut = {name: v[tuple(slice(s) for s in small.weights[0][name].shape)] for name, v in params.items()}
    x = draw((2, 7, 8), 7)
    blind = full.call(({**params, "out": params["out"].at[:, 2:].set(0)}, stats), x)[0]
    assert_agree(small.call((cut, stats), x)[0], blind, 1e-5)


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            Attention(num_heads=3, num_kv_heads=2),
            r"mixer attention: num_kv_heads=2 does not divide num_heads=3; valid: \[1, 3\], or 0",
        ),
        (Attention(num_heads=5), r"num_heads=5 does not divide the width 16; valid: \[1, 2, 4, 8, 16\]"),
        (Attention(num_heads=16), "head_dim=1 is odd; valid: even numbers, or rotary=False"),
        (Attention(num_heads=0), "heads=0; valid: whole numbers from 1"),
    ],
)
def test_sizes_that_do_not_fit(spec, message):
    with pytest.raises(UserError, match=message):
        spec.resolve(16)


def test_attention_both_ways_has_no_state():
    mixer, x = Functions(replace(GROUPED, causal=False), 16, 8), draw((1, 4, 16), 7)
    state = Functions(GROUPED, 16, 8).start(1, 8)
    for go_on in (lambda: mixer.module.init_state(1, 8), lambda: mixer.call(mixer.weights, x, None, state, 0)):
        with pytest.raises(UserError, match="mixer attention: causal=False sees later tokens"):
            go_on()
