"""Routing attention as a mixer: implementations, routing of prefixes against the op, the online k-means, its
sub-networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.modules.mixers.base import Call
from research.modules.mixers.routing import Routing, route_prefixes
from research.modules.state import merge, split
from research.ops.routing_attention import init_centroids, routing_attention
from tests.modules.mixers.agreement import Functions, check_forms, check_shrink, num_params
from tests.ops.compare import assert_agree, draw

SMALL = Routing(num_heads=3, num_local_heads=1, head_dim=6, num_clusters=3, window=4, local_window=5)


@pytest.mark.slow
def test_all_implementations_compute_the_same_where_every_cluster_takes_all():
    check_forms(Routing(num_heads=4, num_local_heads=2, num_clusters=2, window=128, local_window=5), 16, 21)


def test_prefixes_are_routed_as_the_op_routes_them():
    """Every prefix of its own, by the op; twenty tokens are five that return, so that many scores are equal."""
    tokens, heads, size, window = 20, 2, 4, 4
    query, value = draw((2, 5, heads, size), 0)[:, np.arange(tokens) % 5], draw((2, tokens, heads, 3), 1)
    query[:, 10:] += 0.1 * draw((2, 10, heads, size), 2)
    centroids = init_centroids(jax.random.key(1), heads, 3, size).centroids
    place = lambda x: jnp.pad(x, ((0, 0), (0, 3), (0, 0), (0, 0)), constant_values=5.0)
    route = jax.jit(functools.partial(route_prefixes, window=window))
    actual = route(place(query), place(value), jnp.zeros((2, tokens + 3), jnp.int32), centroids, jnp.arange(tokens))
    op = jax.jit(lambda q, v, mask: routing_attention(q, None, v, centroids, window=window, mask=mask))
    for t in range(tokens):
        mask = jnp.broadcast_to(jnp.arange(tokens) <= t, (2, tokens))
        assert_agree(actual[:, t], op(query, value, mask)[:, t], 1e-5, floor=0.1)
    assert float(jnp.abs(actual).max()) > 0.1
    assert (np.asarray(actual) == 0).all(-1).any(), "some token is in no cluster"


@pytest.mark.slow
def test_generation_is_the_parallel_form_of_every_prefix():
    mixer, x = Functions(SMALL, 16, 11), draw((2, 11, 16), 3)
    some = np.array([0, 3, 6, 10])
    prefixes = jnp.stack([mixer.call(mixer.weights, x[:, : t + 1])[0][:, -1] for t in some], 1)
    start = mixer.start(2, 13)
    stepped, after = mixer.steps(mixer.weights, x, None, start)
    assert_agree(stepped[:, some], prefixes, 1e-5)
    called, state = mixer.call(mixer.weights, x, None, start, 0)
    assert_agree(called, stepped, 1e-5)
    assert_agree(state, after, 1e-5)
    first, state = mixer.call(mixer.weights, x[:, :6], None, start, 0)
    second, _ = mixer.call(mixer.weights, x[:, 6:], None, state, 6)
    assert_agree(jnp.concatenate([first, second], 1), stepped, 1e-5)
    assert float(jnp.abs(mixer.call(mixer.weights, x)[0] - stepped).max()) > 1e-2, (
        "the parallel form looks at the whole sequence"
    )


def test_documents_do_not_compete_in_generation():
    mixer, x = Functions(SMALL, 16, 11), draw((2, 11, 16), 4)
    ids = jnp.broadcast_to((jnp.arange(11) >= 5).astype(jnp.int32), (2, 11))
    packed, _ = mixer.call(mixer.weights, x, ids, mixer.start(2, 11), 0)
    alone, _ = mixer.steps(mixer.weights, x[:, 5:], None, mixer.start(2, 11))
    assert_agree(packed[:, 5:], alone, 1e-5)


@functools.partial(jax.jit, static_argnames=("graphdef", "mode"))
def run(graphdef, params, stats, x, mode):
    """((loss, y, stats after), gradients of the auxiliary loss)."""

    def loss(params, stats):
        module = merge(graphdef, params, stats)
        y, _ = module(x, Call(mode=mode))
        if mode == "train":
            module.after_update()
        after = split(module)[2]
        return after["aux_loss"], (y, after)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, stats)


def test_means_follow_their_tokens_in_training():
    """Two steps against the sheet in numpy: counts from zero, sums from the means, queries counted twice."""
    mixer = Functions(SMALL, 16, 8)
    params, stats = mixer.weights
    np.testing.assert_array_equal(stats["sums"], stats["centroids"])
    assert not stats["counts"].any() and stats["aux_loss"].shape == ()
    np.testing.assert_allclose(jnp.square(stats["centroids"]).mean(-1), 1, rtol=1e-5)
    mu, sums = (np.asarray(stats[name], np.float64) for name in ("centroids", "sums"))
    counts = np.zeros(mu.shape[:2])
    for step in range(2):
        x = draw((2, 8, 16), 10 + step)
        q = np.einsum("btd,dhk->bthk", x, np.asarray(params["query"], np.float64)).reshape(16, 2, 6)
        q = (q - q.mean(-1, keepdims=True)) / np.sqrt(q.var(-1, keepdims=True) + 1e-6)
        best = np.einsum("thk,hck->thc", q, mu).argmax(-1)
        error = np.mean([(q[t, h] - mu[h, best[t, h]]) ** 2 for t in range(16) for h in range(2)])
        (loss, (_, after)), (grads, stat_grads) = run(mixer.graphdef, params, stats, x, "train")
        np.testing.assert_allclose(loss, 2e-4 * error, rtol=1e-4)
        assert not any(np.any(g) for g in jax.tree.leaves(stat_grads))
        assert float(jnp.abs(grads["query"]).max()) > 1e-6 and not any(
            np.any(g) for name, g in grads.items() if name != "query"
        )
        member = best[..., None] == np.arange(3)
        counts = 0.999 * counts + 0.001 * 2 * member.sum(0)
        sums = 0.999 * sums + 0.001 * 2 * np.einsum("thc,thk->hck", member, q)
        total = counts.sum(-1, keepdims=True)
        mu = sums / ((counts + 1e-5) / (total + 3e-5) * total)[..., None]
        assert_agree([after[k] for k in ("centroids", "counts", "sums")], [mu, counts, sums], 1e-4)
        stats = after


@pytest.mark.parametrize("mode", ["eval", "calibrate"])
def test_means_stay_outside_training(mode):
    mixer, x = Functions(SMALL, 16, 8), draw((2, 8, 16), 5)
    params, stats = mixer.weights
    (_, (y, after)), _ = run(mixer.graphdef, params, {**stats, "aux_loss": jnp.float32(3)}, x, mode)
    assert after["aux_loss"] == 3
    for name in ("centroids", "counts", "sums"):
        np.testing.assert_array_equal(after[name], stats[name])
    (_, (trained, _)), _ = run(mixer.graphdef, params, stats, x, "train")
    assert_agree(trained, y, 1e-6)  # a training step attends by the means before it


def test_counts_of_parameters():
    assert num_params(Routing(num_heads=8, num_local_heads=6), 64) == 4 * 64 * 48 + 3 * 64 * 16
    assert num_params(Routing(num_heads=8, num_local_heads=0), 64) == 3 * 64**2


def test_smaller_selves_keep_clusters_and_both_kinds():
    spec = Routing(num_heads=8, num_local_heads=6, num_clusters=4)
    small = check_shrink(spec, 32, 16, cut=("embed", "layer/local/heads", "layer/routing/heads"))
    assert (small.num_heads, small.num_local_heads, small.head_dim, small.num_clusters) == (4, 3, 4, 4)
    kinds = lambda **choice: (lambda s: (s.num_local_heads, s.num_heads - s.num_local_heads))(
        spec.resolve(32).shrink(**{"width": 1.0, "state": None, **choice})
    )
    assert (
        kinds(heads=None) == (6, 2)
        and kinds(heads=2) == (1, 1)
        and kinds(heads=0.01) == (1, 1)
        and kinds(heads=7) == (5, 2)
    )
    for full in range(1, 9):
        for local in range(full):
            for few in range(1 + (local > 0), full + 1):
                small = Routing(num_heads=full, num_local_heads=local, head_dim=2).shrink(1.0, few, None)
                assert (
                    small.num_heads == few
                    and small.num_local_heads <= local
                    and small.num_heads - small.num_local_heads <= full - local
                )
    with pytest.raises(UserError, match=r"heads=1; valid: 2 \(one of each kind\) to 8"):
        kinds(heads=1)


@pytest.mark.parametrize(
    "spec, message",
    [
        (Routing(num_heads=4, num_local_heads=4), "mixer routing: num_local_heads=4; valid: 0 to 3"),
        (Routing(num_clusters=0), "clusters=0; valid: whole numbers from 1"),
        (Routing(num_heads=3, num_local_heads=1), r"num_heads=3 does not divide the width 16"),
        (Routing(num_heads=16), "head_dim=1 is odd"),
    ],
)
def test_sizes_that_do_not_fit(spec, message):
    with pytest.raises(UserError, match=message):
        spec.resolve(16)
