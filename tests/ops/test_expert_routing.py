"""Routers: the worked vectors of the families, capacities as their libraries compute them, and what each router
promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.ops.expert_routing import (
    balanced_bias,
    capacity,
    entropy,
    expert_choice,
    expert_fractions,
    give_up_second,
    importance_loss,
    jitter,
    load_balance_loss,
    load_loss,
    places,
    soft_slots,
    top_k_choice,
    z_loss,
)

PROBABILITIES = np.array(
    [[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.55, 0.40, 0.05], [0.1, 0.15, 0.75]]
)
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))
"""Six tokens, three experts: the sheet's example of who is dropped with two places an expert."""


def choice(**options):
    return top_k_choice(LOGITS, 2, **options)


def kept(experts, found, places_per_expert):
    experts, found = np.asarray(experts), np.asarray(found)
    return {(t, int(experts[t, i])) for t, i in np.argwhere(found < places_per_expert)}


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(order="choice"), {(0, 0), (1, 0), (3, 1), (5, 2), (0, 1), (1, 2)}),
        (dict(order="choice", by_priority=True), {(5, 2), (2, 0), (0, 0), (3, 1), (5, 1), (1, 2)}),
        (dict(order="token"), {(0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (3, 2)}),
    ],
)
def test_who_finds_a_place(options, expected):
    routed = choice()
    np.testing.assert_array_equal(routed.experts, [[0, 1], [0, 2], [0, 1], [1, 2], [0, 1], [2, 1]])
    # The first choice's score as the table prints it: t1 and t3 tie at .5, and in float32 logs they would not.
    priority = jnp.asarray(PROBABILITIES.max(1), jnp.float32) if options.pop("by_priority", False) else None
    found = jax.jit(lambda experts: places(experts, 3, priority=priority, **options))(routed.experts)
    assert kept(routed.experts, found, 2) == expected


def test_expert_choice_takes_its_best_tokens():
    taken = expert_choice(LOGITS, 2)
    np.testing.assert_array_equal(taken.tokens, [[2, 0], [3, 4], [5, 1]])
    np.testing.assert_allclose(taken.weights, [[0.7, 0.6], [0.5, 0.4], [0.75, 0.4]], rtol=1e-6)


def naive_places(experts, num_experts, order, priority):
    tokens = range(len(experts)) if priority is None else sorted(range(len(experts)), key=lambda t: -priority[t])
    k = len(experts[0])
    pairs = (
        [(t, i) for i in range(k) for t in tokens] if order == "choice" else [(t, i) for t in tokens for i in range(k)]
    )
    seen, found = [0] * (num_experts + 1), np.zeros((len(experts), k), int)
    for t, i in pairs:
        found[t, i] = seen[experts[t][i]]
        seen[experts[t][i]] += 1
    return found


@pytest.mark.parametrize("order", ["choice", "token"])
@pytest.mark.parametrize("by_priority", [False, True])
@pytest.mark.parametrize("num_tokens, num_experts, k", [(1, 1, 1), (40, 9, 4), (64, 3, 2)])
@settings(deadline=None, max_examples=10, derandomize=True)
@given(seed=st.integers(0, 99))
def test_places_are_those_of_a_queue(num_tokens, num_experts, k, order, by_priority, seed):
    rng = np.random.default_rng(seed)
    experts = rng.integers(0, num_experts + 1, (num_tokens, k))
    priority = np.round(rng.random(num_tokens), 1).astype(np.float32) if by_priority else None  # with ties
    found = places(
        jnp.asarray(experts), num_experts, order=order, priority=None if priority is None else jnp.asarray(priority)
    )
    np.testing.assert_array_equal(found, naive_places(experts, num_experts, order, priority))


@pytest.mark.parametrize(
    "rule, first, second, third",
    [
        ("mesh", 80, 12, 4), ("flaxformer", 80, 12, 4), ("v_moe", 160, 28, 8), ("maxtext", 160, 25, 7),
        ("megablocks", 160, 25, 7), ("tutel", 160, 26, 8), ("llm_random", 160, 25, 7), ("fixed", 1, 1, 1),
    ],
)  # fmt: skip
def test_capacity_is_that_of_each_library(rule, first, second, third):
    assert capacity(rule, 4096, 64, 2, 1.25) == first
    assert capacity(rule, 100, 8, 2, 1.0) == second
    assert capacity(rule, 10, 3, 2, 1.1) == third


def test_fixed_capacity_is_its_factor():
    assert capacity("fixed", 10, 3, 2, 64.0) == 64 and capacity("fixed", 1000, 3, 2, 64.0) == 64


def test_losses_of_the_example():
    routed = choice()
    assert load_balance_loss(routed.scores, routed.experts[:, :1]) == pytest.approx(1.1625, rel=1e-6)
    assert load_balance_loss(routed.scores, routed.experts) == pytest.approx(1.995833, rel=1e-6)


def test_published_loss_vectors():
    gates = jnp.array([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]])
    assert load_balance_loss(gates, gates.argmax(-1)[:, None]) == pytest.approx(1.0875, rel=1e-6)
    assert importance_loss(gates) == pytest.approx(0.03875, rel=1e-5)
    logits = jnp.array([[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]])
    noise = jnp.array([[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]])
    assert load_loss(logits, logits + noise, 2, 0.1) == pytest.approx(0.485738, rel=1e-5)


def test_balance_loss_at_its_ends():
    """1 at uniform scores, E at collapse, below 1 in between: no code may take 1 for its floor."""
    uniform = jnp.full((12, 4), 0.25)
    any_choice = jnp.zeros((12, 1), jnp.int32)
    assert load_balance_loss(uniform, any_choice) == pytest.approx(1)
    assert load_balance_loss(jnp.eye(4)[jnp.zeros(12, int)], any_choice) == pytest.approx(4)
    scores = jnp.array([[0.33, 0.34, 0.33]] * 9 + [[0.0, 0.0, 1.0]])
    assert load_balance_loss(scores, scores.argmax(-1)[:, None]) == pytest.approx(0.945, rel=1e-3)
    fractions = lambda s: expert_fractions(s.argmax(-1)[:, None], 3).sum()
    assert not np.asarray(jax.grad(fractions)(scores)).any()
    assert np.asarray(jax.grad(lambda s: load_balance_loss(s, s.argmax(-1)[:, None]))(scores)).any()


@pytest.mark.parametrize("experts, expected", [(2, 0.4805), (4, 1.9218), (8, 4.3241), (256, 30.749)])
def test_z_loss_of_zero_logits(experts, expected):
    assert z_loss(jnp.zeros((5, experts))) == pytest.approx(expected, rel=1e-4)


def test_a_mask_leaves_padding_out():
    mask = jnp.array([True] * 4 + [False] * 2)
    routed, short = choice(), top_k_choice(LOGITS[:4], 2)
    assert load_balance_loss(routed.scores, routed.experts, mask=mask) == pytest.approx(
        float(load_balance_loss(short.scores, short.experts)), rel=1e-6
    )
    assert z_loss(3 * LOGITS, mask) == pytest.approx(float(z_loss(3 * LOGITS[:4])), rel=1e-6)


def test_renormalised_softmax_is_the_softmax_of_the_chosen_logits():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (50, 16)), jnp.float32)
    routed = top_k_choice(logits, 4, renormalize=True)
    chosen = jnp.take_along_axis(logits, routed.experts, -1)
    np.testing.assert_allclose(routed.weights, jax.nn.softmax(chosen), rtol=1e-5)
    assert (top_k_choice(logits, 4).weights.sum(-1) < 1).all()
    np.testing.assert_array_equal(routed.experts, np.argsort(-np.asarray(logits), -1, kind="stable")[:, :4])


def test_one_renormalised_choice_teaches_the_router_nothing():
    def task(logits, renormalize):
        return (top_k_choice(logits, 1, renormalize=renormalize).weights * jnp.arange(1.0, 7.0)[:, None]).sum()

    assert np.abs(jax.grad(task)(LOGITS, True)).max() < 1e-6 < 1e-2 < np.abs(jax.grad(task)(LOGITS, False)).max()


def test_groups_limit_the_choice():
    scores = jnp.array([[0.9, 0.1, 0.2, 0.15, 0.8, 0.7, 0.3, 0.25]])
    bias = jnp.array([-0.5, 0, 0, 0, 0, 0, 0.1, 0.1])
    options = dict(scoring_func="sigmoid", renormalize=True, scale=2.5, num_expert_groups=4, topk_groups=2)
    logits = jax.scipy.special.logit(scores)
    routed = top_k_choice(logits, 3, bias=bias, **options)
    weights = dict(zip(np.asarray(routed.experts[0]).tolist(), np.asarray(routed.weights[0]).tolist(), strict=True))
    assert weights == pytest.approx({4: 1.1111, 5: 0.9722, 6: 0.4167}, rel=1e-4)
    assert weights[4] + weights[5] + weights[6] == pytest.approx(2.5)
    grad = jax.grad(lambda b: top_k_choice(logits, 3, bias=b, **options).weights.sum())(bias)
    assert not np.asarray(grad).any()


def test_experts_outside_the_groups_stay_outside_whatever_their_sign():
    logits = jax.scipy.special.logit(jnp.array([[0.3, 0.2, 0.1, 0.05]]))
    routed = top_k_choice(logits, 2, scoring_func="sigmoid", bias=jnp.full(4, -0.4), num_expert_groups=2, topk_groups=1)
    assert set(np.asarray(routed.experts[0]).tolist()) == {0, 1}


def test_bias_steps_towards_balance():
    load = jnp.bincount(jnp.array([0, 0, 0, 1, 1, 2, 0, 1]), length=4).astype(jnp.float32)
    np.testing.assert_allclose(balanced_bias(jnp.zeros(4), load, 0.001), [-0.001, -0.001, 0.001, 0.001])


def test_bias_evens_out_a_skewed_router():
    skew = jnp.array([2.0, 1.0, 0.0, -1.0])
    bias, spread = jnp.zeros(4), []
    for step in range(300):
        logits = skew + jax.random.normal(jax.random.key(step), (256, 4))
        load = expert_fractions(top_k_choice(logits, 1, scoring_func="sigmoid", bias=bias).experts, 4)
        spread.append(float(load.max() - load.min()))
        bias = balanced_bias(bias, load, 0.005)
    assert np.mean(spread[-20:]) < 0.2 < 0.5 < np.mean(spread[:5])


def test_soft_slots_of_the_example():
    x, phi = jnp.array([[1.0, 0], [0, 1], [1, 1]]), jnp.array([[1.0, 0, 1], [0, 1, -1]])
    dispatch, combine = soft_slots(x, phi)
    np.testing.assert_allclose(dispatch[0], [0.473041, 0.174022, 0.575975], atol=2e-6)
    np.testing.assert_allclose(combine[0], [0.473041, 0.174022, 0.352937], atol=2e-6)
    np.testing.assert_allclose(
        dispatch.T @ x, [[0.825978, 0.526959], [0.526959, 0.825978], [0.859971, 0.424025]], atol=2e-6
    )
    np.testing.assert_allclose(dispatch.sum(0), 1, rtol=1e-6)
    np.testing.assert_allclose(combine.sum(1), 1, rtol=1e-6)


def test_entropy_at_its_ends():
    assert entropy(jnp.full(8, 3.0)) == pytest.approx(np.log(8), rel=1e-6)
    assert entropy(jnp.array([5.0, 0, 0])) == 0


def test_jitter_is_small_and_repeats_under_its_key():
    x = jnp.ones((100, 8))
    noisy = jitter(x, jax.random.key(1), 0.01)
    assert 0.005 < np.abs(noisy - 1).max() <= 0.01
    np.testing.assert_array_equal(noisy, jitter(x, jax.random.key(1), 0.01))


def test_second_choices_are_given_up_by_their_weight():
    scores = jnp.tile(jnp.array([[0.9, 0.1]]), (4000, 1))
    routed = top_k_choice(jnp.log(scores), 2)
    given_up = give_up_second(routed, jax.random.key(0))
    assert (given_up.experts[:, 0] == 0).all()
    assert np.mean(given_up.experts[:, 1] == 2) == pytest.approx(0.5, abs=0.03)
    np.testing.assert_array_equal(given_up.weights[:, 1] == 0, given_up.experts[:, 1] == 2)


def test_scores_are_wide_whatever_the_logits_are_in():
    assert top_k_choice(LOGITS.astype(jnp.bfloat16), 2).weights.dtype == jnp.float32


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: top_k_choice(LOGITS, 4), "top_k_choice: k is 4; expected 1 to the 3 experts"),
        (lambda: top_k_choice(LOGITS, 1, scoring_func="tanh"), "scoring_func is 'tanh'; expected softmax or sigmoid"),
        (
            lambda: top_k_choice(LOGITS, 1, num_expert_groups=2),
            "num_expert_groups is 2; expected a divisor of the 3 experts",
        ),
        (lambda: top_k_choice(LOGITS, 2, num_expert_groups=3, topk_groups=1), "k is 2; expected 1 to the 1 experts"),
        (lambda: expert_choice(LOGITS, 7), "capacity is 7; expected 1 to the 6 tokens"),
        (lambda: capacity("gshard", 8, 2, 1, 1.0), "rule is 'gshard'; expected mesh"),
        (lambda: capacity("mesh", 8, 0, 1, 1.0), "experts is 0; expected a number above 0"),
        (lambda: places(jnp.zeros((3, 1), jnp.int32), 2, order="best"), "order is 'best'; expected choice or token"),
    ],
)
def test_invalid_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
