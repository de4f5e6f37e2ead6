"""Adjusted distributions against a loop in Python, ties, frequencies of draws, keys of rows, bad numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decode.sampling import adjust, sample, text_lengths
from research.errors import UserError
from tests.decode.toys import draw

INF = float("inf")


def naive(logits, temperature, top_k, top_p):
    """The definition, token by token, for one row in float64."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return {order[0]: 0.0}
    order = order[: top_k or len(order)]
    chances = np.exp((logits[order] - logits.max()).astype(np.float64) / temperature)
    chances /= chances.sum()
    kept, total = [], 0.0
    for i, chance in zip(order, chances, strict=True):
        if kept and total >= top_p:
            break
        kept.append(i)
        total += chance
    return {i: float(logits[i] - logits.max()) / temperature for i in kept}


@pytest.mark.parametrize("temperature", [0.0, 0.4, 2.5])
def test_adjust_is_the_definition(temperature):
    rows = draw((6, 11), 3)
    rows[3:] = np.round(2 * rows[3:]) / 2  # ties
    for top_k, top_p in [(0, 1.0), (4, 1.0), (99, 1.0), (0, 0.77), (5, 0.6), (1, 0.9), (0, 1e-6), (3, 0.999)]:
        out = np.asarray(jax.jit(adjust, static_argnums=(1, 2, 3))(rows, temperature, top_k, top_p))
        for row, got in zip(rows, out, strict=True):
            wanted = naive(row, temperature, top_k, top_p)
            assert {i for i in range(11) if np.isfinite(got[i])} == set(wanted), (temperature, top_k, top_p)
            np.testing.assert_allclose([got[i] for i in wanted], list(wanted.values()), rtol=1e-6, atol=1e-6)


def test_numbers_by_hand():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.05, 0.2, 0.25]))
    kept = lambda *options: np.flatnonzero(np.isfinite(adjust(logits, *options))).tolist()
    assert kept(1.0, 0, 0.39) == [1]
    assert kept(1.0, 0, 0.41) == [1, 4]
    assert kept(1.0, 0, 0.9) == [0, 1, 3, 4]
    # Of the three best, renormalised, two hold 0.65 / 0.85 = 0.76; without renormalising it would take all three.
    assert kept(1.0, 3, 0.7) == [1, 4]
    # The nucleus is that of the tempered distribution: squares are 0.01 0.16 0.0025 0.04 0.0625 of 0.275.
    assert kept(0.5, 0, 0.58) == [1]
    assert kept(0.5, 0, 0.59) == [1, 4]


def test_ties_go_to_the_smaller_id_and_sums_that_reach_p_exactly_are_enough():
    kept = lambda *options: np.flatnonzero(
        np.isfinite(adjust(jnp.array([0.0, 1.0, 1.0, 1.0, 1.0, -INF]), *options))
    ).tolist()
    assert kept(1.0, 2, 1.0) == [1, 2]
    assert kept(1.0, 4, 0.5) == [1, 2]
    assert kept(1.0, 4, 0.51) == [1, 2, 3]
    assert kept(0.0) == kept(1.0, 1, 1.0) == kept(1.0, 0, 1e-9) == kept(1e-40) == [1]
    assert kept(1.0, 6, 1.0) == [0, 1, 2, 3, 4]  # what the model rules out stays out


def test_tiny_temperatures_and_low_precision_give_no_nan():
    for temperature in (1e-20, 1e-29, 1e-45):
        out = adjust(jnp.array([[300.0, 296.0, -300.0]], jnp.bfloat16), temperature, 0, 0.9)
        assert out.dtype == jnp.float32 and out.tolist() == [[0.0, -INF, -INF]]


def test_draws_have_the_adjusted_frequencies():
    rows = 20000
    logits = jnp.log(jnp.array([0.1, 0.4, 0.05, 0.2, 0.25]))
    drawn = jax.jit(lambda key, x: sample(key, x, temperature=0.5, top_k=3))(
        jax.random.key(3), jnp.broadcast_to(logits, (rows, 5))
    )
    counts = np.bincount(drawn, minlength=5)
    chances = np.array([0, 0.16, 0, 0.04, 0.0625]) / 0.2625
    assert counts[0] == counts[2] == 0
    assert (abs(counts - rows * chances) <= 4 * np.sqrt(rows * chances)).all(), counts


def test_a_row_draws_alike_in_every_batch():
    logits, key = jnp.asarray(draw((8, 9), 1)), jax.random.key(7)
    run = jax.jit(lambda key, logits, position, rows: sample(key, logits, position, rows=rows))
    rows = jnp.arange(8)
    together = run(key, logits, 5 + 0 * rows, rows)
    order = jnp.array([3, 3, 7, 0, 1, 1, 6, 2])
    np.testing.assert_array_equal(run(key, logits[order], 5 + 0 * rows, order), together[order])
    np.testing.assert_array_equal(jax.jit(sample)(key, logits, 5), together)
    same = jnp.broadcast_to(logits[0] / 4, logits.shape)
    draws = [
        run(k, same, p, r)
        for k, p, r in ((key, rows, 0 * rows), (key, 0 * rows, rows), (jax.random.key(8), 0 * rows, rows))
    ]
    assert all(len(set(d.tolist())) > 3 for d in draws), "positions, rows and keys each give other draws"
    assert len({tuple(d.tolist()) for d in draws}) == 3


def test_greedy_takes_the_first_of_the_largest_and_needs_no_key():
    assert sample(None, jnp.array([[1.0, 2.0, 2.0], [3.0, 3.0, 0.0]]), temperature=0).tolist() == [1, 0]
    assert sample(None, jnp.array([[1.0, 2.0, 2.0]]), temperature=0).dtype == jnp.int32


def test_lengths_end_before_the_first_stop_token():
    tokens = jnp.array([[1, 2, 3, 2], [2, 2, 2, 2], [1, 1, 4, 4], [1, 1, 1, 3]])
    assert text_lengths(tokens, (2, 4)).tolist() == [1, 0, 2, 4]
    assert text_lengths(tokens, ()).tolist() == [4] * 4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(temperature=-0.1), "temperature=-0.1"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=INF), "temperature=inf"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_k=1.5), "top_k=1.5"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.01), "top_p=1.01"),
        (dict(top_p=float("nan")), "top_p=nan"),
    ],
)
def test_bad_numbers_are_named(options, named):
    for call in (
        lambda: adjust(jnp.zeros((1, 3)), **options),
        lambda: sample(jax.random.key(0), jnp.zeros((1, 3)), **options),
    ):
        with pytest.raises(UserError, match=named):
            call()


def test_sampling_without_a_key_says_so():
    with pytest.raises(UserError, match="needs a key"):
        sample(None, jnp.zeros((1, 3)))
