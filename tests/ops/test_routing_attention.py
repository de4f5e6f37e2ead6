"""Routing attention against dense masks and a loop in float64; members, statistics and loss against their
definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.ops import routing_attention as routing
from research.ops.attention import softmax_attention
from research.ops.routing_attention import (
    assign,
    cluster_sums,
    commitment_loss,
    init_centroids,
    routing_attention,
    spherical,
    update_centroids,
)
from tests.ops.compare import assert_agree, draw


def _operands(tokens, clusters, batch=(2,), heads=3, size=4, value_size=5, dtype=np.float32):
    """Query, key, value, gradient of the output, centroids."""
    sizes = size, size, value_size, value_size
    arrays = tuple(draw((*batch, tokens, heads, n), i, dtype) for i, n in enumerate(sizes))
    return *arrays, np.asarray(init_centroids(jax.random.key(0), heads, clusters, size).centroids, dtype)


@functools.partial(jax.jit, static_argnames=("shared", "options"))
def _run(query, key, value, d_out, centroids, mask, segment_ids, shared, options):
    attend = lambda q, k, v: routing_attention(
        q, None if shared else k, v, centroids, mask=mask, segment_ids=segment_ids, **dict(options)
    )
    out, vjp = jax.vjp(attend, query, key, value)
    return out, vjp(d_out)


def _outputs_and_grads(*arrays, shared=True, mask=None, segment_ids=None, **options):
    return _run(*arrays, mask, segment_ids, shared, tuple(options.items()))


def _output(*arrays, **options):
    return np.asarray(_outputs_and_grads(*arrays, **options)[0])


agree = functools.partial(assert_agree, dtypes=True, floor=0.1)


def _normal(x):
    x = x.astype(np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def _definition(query, key, value, centroids, window, causal):
    """Section 4.1 of the fact sheet with loops, in float64, for one example."""
    query, key = _normal(query), _normal(key)
    out = np.zeros((*query.shape[:2], value.shape[-1]))
    for head in range(query.shape[1]):
        count = np.zeros(len(query))
        for mean in centroids[head]:
            rows, columns = (np.sort(np.argsort(-(x[:, head] @ mean), kind="stable")[:window]) for x in (query, key))
            for t in rows:
                seen = columns[columns <= t] if causal else columns
                if len(seen):
                    logits = key[seen, head] @ query[t, head]
                    weights = np.exp(logits - logits.max())
                    out[t, head] += weights @ value[seen, head] / weights.sum()
                    count[t] += 1
        out[:, head] /= (count + 1e-2)[:, None]
    return out


@pytest.mark.slow_unless("False-False-gathered", "False-True-gathered", "True-False-naive")
@pytest.mark.parametrize("implementation", routing.IMPLEMENTATIONS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_implementations_are_the_definition(causal, shared, implementation):
    query, key, value, _, centroids = arrays = _operands(31, 4, batch=())
    expected = _definition(query, query if shared else key, value, centroids, 7, causal).astype(np.float32)
    agree(_output(*arrays, shared=shared, window=7, causal=causal, implementation=implementation), expected, 1e-5)


# tokens, clusters, window, causal, shared, padded and packed
CASES = [
    (1, 1, 1, True, True, False),
    (1, 3, 1, True, False, False),
    (63, 7, 9, True, True, False),
    (63, 8, 20, True, False, True),
    (67, 5, 67, False, True, True),
    (97, 13, 5, False, False, False),
]


@pytest.mark.slow_unless("(1, 1, 1, True, True, False)", "(1, 3, 1, True, False, False)")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gathered_agrees_with_naive_in_outputs_and_gradients(case):
    tokens, clusters, window, causal, shared, masked = case
    arrays, options = _operands(tokens, clusters), dict(window=window, causal=causal, shared=shared)
    if masked:
        rng = np.random.default_rng(7)
        options |= dict(mask=rng.random((2, tokens)) > 0.3, segment_ids=np.sort(rng.integers(0, 3, (2, tokens)), -1))
    expected = _outputs_and_grads(*arrays, **options, implementation="naive")
    for implementation in ("gathered", "auto"):
        agree(_outputs_and_grads(*arrays, **options, implementation=implementation), expected, 1e-5)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 70),
    clusters=st.integers(1, 9),
    share=st.floats(0, 1),
    causal=st.booleans(),
    shared=st.booleans(),
)
def test_any_shape_agrees_with_the_definition(tokens, clusters, share, causal, shared):
    query, key, value, _, centroids = arrays = _operands(tokens, clusters, batch=())
    window = 1 + int(share * (tokens - 1))
    expected = _definition(query, query if shared else key, value, centroids, window, causal).astype(np.float32)
    agree(_output(*arrays, shared=shared, window=window, causal=causal), expected, 1e-5)


@pytest.mark.slow_unless("naive")
@pytest.mark.parametrize("implementation", routing.IMPLEMENTATIONS)
def test_one_cluster_of_all_tokens_is_full_attention_over_1_01(implementation):
    arrays = _operands(37, 1)
    normal = spherical(arrays[0])
    expected = softmax_attention(normal, normal, arrays[2], causal=True, scale=1.0, implementation="naive") / 1.01
    agree(_output(*arrays, window=37, implementation=implementation), np.asarray(expected), 1e-5)


def test_each_cluster_has_the_window_best_distinct_tokens_in_order_and_others_give_zero():
    query, _, _, _, centroids = arrays = _operands(50, 4)
    at = np.asarray(routing._members(spherical(query), centroids, 6, None))
    assert at.shape == (2, 3, 4, 6) and (np.diff(at, axis=-1) > 0).all()
    scores = np.einsum("bthk,hck->bhct", _normal(query), centroids)
    taken = np.zeros(scores.shape, bool)
    np.put_along_axis(taken, at, True, -1)
    assert (np.where(taken, scores, np.inf).min(-1) >= np.where(taken, -np.inf, scores).max(-1) - 1e-6).all()
    alone = ~taken.any(2).swapaxes(1, 2)
    out = _output(*arrays, window=6)
    assert alone.any() and (out[alone] == 0).all() and (np.abs(out[~alone]).max(-1) > 0).all()


@pytest.mark.parametrize("implementation", routing.IMPLEMENTATIONS)
@pytest.mark.parametrize("shared", [True, False])
def test_values_flow_only_forwards_within_the_chosen_clusters(shared, implementation):
    """Values do not decide what a cluster takes: with them alone changed, causality is exact."""
    query, key, value, d_out, centroids = _operands(60, 5)
    later = np.concatenate([value[:, :40], 9 * value[:, 40:]], 1)
    a, b = (
        _output(query, key, v, d_out, centroids, shared=shared, window=20, implementation=implementation)
        for v in (value, later)
    )
    np.testing.assert_array_equal(a[:, :40], b[:, :40])
    assert not np.allclose(a[:, 40:], b[:, 40:])


def test_decoding_with_later_tokens_masked_out_does_not_see_them():
    query, key, value, d_out, centroids = _operands(40, 4)
    mask = np.arange(40)[None] < np.array([[25], [40]])
    changed = tuple(np.where(mask[..., None, None], x, 5 * x + 1) for x in (query, key, value))
    a, b = (_output(*x, d_out, centroids, window=8, mask=mask) for x in ((query, key, value), changed))
    np.testing.assert_array_equal(a, b)
    assert (a[0, 25:] == 0).all()
    short = _output(*(x[:1, :25] for x in (query, key, value, d_out)), centroids, window=8)
    np.testing.assert_allclose(a[:1, :25], short, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_and_float64():
    *arrays, centroids = _operands(63, 6)
    half = tuple(jnp.asarray(x, jnp.bfloat16) for x in arrays)
    exact = _outputs_and_grads(*(x.astype(jnp.float32) for x in half), centroids, window=12, implementation="naive")
    actual = _outputs_and_grads(*half, centroids, window=12)
    assert {x.dtype for x in jax.tree.leaves(actual)} == {jnp.dtype(jnp.bfloat16)}
    agree(jax.tree.map(lambda x: x.astype(jnp.float32), actual), exact, 2e-2)
    with jax.enable_x64(True):
        double = _operands(63, 6, dtype=np.float64)
        expected = _outputs_and_grads(*double, window=12, shared=False, implementation="naive")
        assert expected[0].dtype == np.float64
        agree(_outputs_and_grads(*double, window=12, shared=False), expected, 1e-10)


def test_statistics_count_and_sum_the_assigned_tokens_without_padding():
    query, _, _, _, centroids = _operands(29, 4)
    mask = np.random.default_rng(3).random((2, 29)) > 0.4
    counts, sums = cluster_sums(query, centroids, mask)
    normal = _normal(query)
    nearest = np.einsum("bthk,hck->bthc", normal, centroids).argmax(-1)
    np.testing.assert_array_equal(assign(query, centroids), nearest)
    for head in range(3):
        for cluster in range(4):
            members = normal[:, :, head][mask & (nearest[:, :, head] == cluster)]
            assert counts[head, cluster] == len(members)
            np.testing.assert_allclose(sums[head, cluster], members.sum(0), atol=1e-5)
    assert float(counts.sum()) == 3 * mask.sum()


def test_centroids_move_as_the_averages_say():
    state = init_centroids(jax.random.key(1), 2, 5, 4)
    np.testing.assert_allclose(jnp.linalg.norm(state.centroids, axis=-1), 2, rtol=1e-4)
    query = draw((3, 200, 2, 4), 0)
    counts, sums = cluster_sums(query, state.centroids)
    new = update_centroids(state, counts, sums, decay=0.9)
    count, total = 0.1 * np.asarray(counts, np.float64), 0.1 * np.asarray(counts, np.float64).sum(-1, keepdims=True)
    smooth = (count + 1e-5) / (total + 5e-5) * total
    np.testing.assert_allclose(new.centroids, (0.9 * state.centroids + 0.1 * sums) / smooth[..., None], rtol=1e-5)
    # Averages that belong to the means (count n, sum n mu) move by at most (1 - decay) of the way to the members' mean.
    steady = routing.CentroidState(state.centroids, counts, counts[..., None] * state.centroids)
    moved = update_centroids(steady, counts, sums, decay=0.9).centroids - state.centroids
    way = sums / counts[..., None] - state.centroids
    np.testing.assert_allclose(moved, 0.1 * way, atol=1e-4)


def test_commitment_loss_is_the_distance_and_does_not_move_the_means():
    query, _, _, _, centroids = _operands(29, 4)
    mask = np.random.default_rng(3).random((2, 29)) > 0.4
    normal = _normal(query)
    nearest = np.einsum("bthk,hck->bthc", normal, centroids).argmax(-1)
    square = (normal - centroids[np.arange(3), nearest]) ** 2
    loss, (d_query, d_centroids) = jax.value_and_grad(commitment_loss, (0, 1))(
        jnp.asarray(query), jnp.asarray(centroids)
    )
    np.testing.assert_allclose(loss, square.mean(), rtol=1e-5)
    np.testing.assert_allclose(commitment_loss(query, centroids, mask), square[mask].mean(), rtol=1e-5)
    assert float(jnp.abs(d_centroids).max()) == 0 < float(jnp.abs(d_query).max())


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_other_platforms_without_a_loop(platform):
    tokens, means = jax.ShapeDtypeStruct((1, 500, 2, 16), jnp.float32), jax.ShapeDtypeStruct((2, 20, 16), jnp.float32)
    run = jax.jit(jax.grad(lambda q, v, m: routing_attention(q, None, v, m, window=25).sum(), (0, 1)))
    assert "stablehlo.while" not in jax.export.export(run, platforms=[platform])(tokens, tokens, means).mlir_module()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(window=10), "routing_attention: window is 10; expected 1 to the number of tokens, 9"),
        (dict(window=0), "window is 0; expected 1 to"),
        (dict(key=jnp.zeros((2, 9, 3, 5))), r"key has shape \(2, 9, 3, 5\).*\(2, 9, 3, 4\)"),
        (dict(centroids=jnp.zeros((2, 7, 4))), r"centroids has shape \(2, 7, 4\).*\(3, C, 4\)"),
        (dict(mask=jnp.ones((2, 8), bool)), r"mask has shape \(2, 8\).*\(2, 9\)"),
        (dict(implementation="dense"), "implementation is 'dense'; expected one of auto, cpu, naive, gathered"),
    ],
)
def test_errors_name_argument_shape_and_what_was_expected(change, message):
    tokens = jnp.zeros((2, 9, 3, 4))
    arguments = dict(query=tokens, key=None, value=tokens, centroids=jnp.zeros((3, 7, 4)), window=3) | change
    with pytest.raises(ValueError, match=message):
        routing_attention(**arguments)
