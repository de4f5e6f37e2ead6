"""Mixtures of experts: every dispatch against the weighted sum over all experts, in outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.expert_dispatch import (
    chosen_by_experts,
    combine_matrix,
    dropless,
    every_expert,
    in_slots,
    with_places,
)
from research.ops.expert_routing import expert_choice, places, top_k_choice
from tests.models.twins import fast_jit
from tests.ops.compare import assert_agree

TOKENS, WIDTH, HIDDEN = 37, 6, 5


def draw(num_experts, gated=True, seed=0, biased=False):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernels = {"up": normal(num_experts, WIDTH, HIDDEN), "down": normal(num_experts, HIDDEN, WIDTH)}
    if gated:
        kernels["gate"] = normal(num_experts, WIDTH, HIDDEN)
    if biased:
        kernels |= {"up_bias": normal(num_experts, HIDDEN), "down_bias": normal(num_experts, WIDTH)}
    return normal(TOKENS, WIDTH), normal(TOKENS, num_experts), kernels, normal(TOKENS, WIDTH)


def assert_same(ours, definition, *arguments, dy):
    """Outputs and gradients of both, in all arguments."""

    def both(f, dy, arguments):
        y, vjp = jax.vjp(f, *arguments)
        return y, vjp(dy)

    assert_agree(
        fast_jit(functools.partial(both, ours))(dy, arguments),
        fast_jit(functools.partial(both, definition))(dy, arguments),
        1e-5,
    )


def router(logits, k):
    return top_k_choice(logits, k, renormalize=k > 1)


@pytest.mark.slow_unless("blocks-3-1", "naive-1-1", "naive-16-4", "naive-2-2", "naive-64-8", "naive-8-2")
@pytest.mark.parametrize("num_experts, k", [(1, 1), (2, 2), (3, 1), (8, 2), (8, 8), (16, 4), (64, 8), (64, 1)])
@pytest.mark.parametrize("implementation", ["blocks", "naive"])
def test_dropless_is_the_weighted_sum(num_experts, k, implementation):
    x, logits, kernels, dy = draw(num_experts)

    def ours(x, logits, kernels):
        routed = router(logits, k)
        return dropless(x, routed.experts, routed.weights, kernels, implementation=implementation)

    def definition(x, logits, kernels):
        routed = router(logits, k)
        return every_expert(x, combine_matrix(routed.experts, routed.weights, num_experts), kernels)

    assert_same(ours, definition, x, logits, kernels, dy=dy)


@pytest.mark.parametrize("dispatch", ["blocks", "naive", "places", "experts"])
def test_biases_are_of_the_expert(dispatch):
    x, logits, kernels, dy = draw(5, gated=False, biased=True)

    def ours(x, logits, kernels):
        if dispatch == "experts":
            slots = expert_choice(logits, 9)
            return chosen_by_experts(x[None], slots.tokens[None], slots.weights[None], kernels, activation="gelu")[0]
        routed = router(logits, 2)
        if dispatch == "places":
            queue = places(routed.experts, 5)
            return with_places(x, routed.experts, routed.weights, queue, TOKENS, kernels, activation="gelu")
        return dropless(x, routed.experts, routed.weights, kernels, activation="gelu", implementation=dispatch)

    def definition(x, logits, kernels):
        routed = router(logits, 2)
        combine = combine_matrix(routed.experts, routed.weights, 5)
        if dispatch == "experts":
            slots = expert_choice(logits, 9)
            combine = (slots.weights[..., None] * jax.nn.one_hot(slots.tokens, TOKENS)).sum(1).T
        outputs = [jax.nn.gelu(x @ kernels["up"][e] + kernels["up_bias"][e], approximate=False) for e in range(5)]
        outputs = [y @ kernels["down"][e] + kernels["down_bias"][e] for e, y in enumerate(outputs)]
        return sum(combine[:, e, None] * y for e, y in enumerate(outputs))

    assert_same(ours, definition, x, logits, kernels, dy=dy)


@pytest.mark.parametrize("num_experts, k", [(1, 1), (3, 2), (8, 2), (64, 8)])
@pytest.mark.parametrize("order", ["choice", "token"])
def test_with_places_for_all_is_the_weighted_sum(num_experts, k, order):
    x, logits, kernels, dy = draw(num_experts)

    def ours(x, logits, kernels):
        routed = router(logits, k)
        return with_places(
            x, routed.experts, routed.weights, places(routed.experts, num_experts, order=order), TOKENS, kernels
        )

    def definition(x, logits, kernels):
        routed = router(logits, k)
        return every_expert(x, combine_matrix(routed.experts, routed.weights, num_experts), kernels)

    assert_same(ours, definition, x, logits, kernels, dy=dy)


@pytest.mark.parametrize("capacity", [1, 3, 8])
def test_who_finds_no_place_adds_nothing(capacity):
    x, logits, kernels, dy = draw(4)

    def ours(x, logits, kernels):
        routed = router(logits, 2)
        return with_places(x, routed.experts, routed.weights, places(routed.experts, 4), capacity, kernels)

    def definition(x, logits, kernels):
        routed = router(logits, 2)
        kept = places(routed.experts, 4) < capacity
        return every_expert(x, combine_matrix(routed.experts, jnp.where(kept, routed.weights, 0), 4), kernels)

    assert_same(ours, definition, x, logits, kernels, dy=dy)
    routed = router(logits, 2)
    lost = np.asarray((places(routed.experts, 4) >= capacity).all(-1))
    assert lost.any() and not np.asarray(ours(x, logits, kernels))[lost].any()


@pytest.mark.parametrize("activation, gated", [("silu", True), ("gelu", True), ("gelu", False), ("relu", False)])
def test_one_expert_of_weight_one_is_a_plain_ffn(activation, gated):
    x, _, kernels, dy = draw(1, gated)
    experts, weights = jnp.zeros((TOKENS, 1), jnp.int32), jnp.ones((TOKENS, 1))
    act = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=False), "relu": jax.nn.relu}[activation]

    def plain(x, kernels):
        up = x @ kernels["up"][0]
        return (act(x @ kernels["gate"][0]) * up if gated else act(up)) @ kernels["down"][0]

    assert_same(
        lambda x, kernels: dropless(x, experts, weights, kernels, activation=activation), plain, x, kernels, dy=dy
    )


@pytest.mark.parametrize("dispatch", ["dropless", "places"])
def test_empty_and_overfull_experts(dispatch):
    """All tokens on one expert: the right answer, and gradients that are finite, and zero for the others."""
    x, _, kernels, dy = draw(5)
    experts, weights = jnp.full((TOKENS, 1), 3), jnp.ones((TOKENS, 1))

    def run(x, kernels):
        if dispatch == "dropless":
            return dropless(x, experts, weights, kernels)
        return with_places(x, experts, weights, places(experts, 5), TOKENS, kernels)

    y, vjp = jax.vjp(run, x, kernels)
    one = {name: kernel[3:4] for name, kernel in kernels.items()}
    assert_agree(y, in_slots(x[None], one)[0], 1e-5)
    for grad in vjp(dy)[1].values():
        assert np.isfinite(grad).all() and grad[3].any() and not np.delete(np.asarray(grad), 3, 0).any()


@pytest.mark.parametrize("dispatch", ["dropless", "places"])
def test_no_expert_is_nobody(dispatch):
    """Choices of expert E take part nowhere: neither in the sum nor in a queue."""
    x, logits, kernels, dy = draw(4)
    routed = router(logits, 2)
    absent = jnp.arange(TOKENS) % 3 == 0
    experts = jnp.where(absent[:, None], 4, routed.experts)

    def run(x, weights, kernels):
        if dispatch == "dropless":
            return dropless(x, experts, weights, kernels)
        return with_places(x, experts, weights, places(experts, 4), TOKENS, kernels)

    def definition(x, weights, kernels):
        return every_expert(x, combine_matrix(experts, weights, 4), kernels)

    assert_same(run, definition, x, routed.weights, kernels, dy=dy)
    assert not np.asarray(run(x, routed.weights, kernels))[np.asarray(absent)].any()


def test_chosen_by_experts_is_the_weighted_sum():
    """Of two groups, one the other with its tokens and logits turned round."""
    x, logits, kernels, dy = draw(4)
    both = lambda a: jnp.stack([a, a[::-1] + 0.1])

    def ours(x, logits, kernels):
        slots = expert_choice(logits, 9)
        return chosen_by_experts(x, slots.tokens, slots.weights, kernels)

    def definition(x, logits, kernels):
        slots = expert_choice(logits, 9)
        chosen = jax.nn.one_hot(slots.tokens, TOKENS)  # [G, E, C, T]
        combine = jnp.einsum("gect,gec->gte", chosen, slots.weights)
        return jnp.stack([every_expert(x[g], combine[g], kernels) for g in range(2)])

    assert_same(ours, definition, both(x), both(logits), kernels, dy=both(dy))


@pytest.mark.slow
def test_equal_experts_with_weights_of_sum_one_are_the_dense_ffn():
    x, logits, kernels, _ = draw(6)
    equal = {name: jnp.broadcast_to(kernel[:1], kernel.shape) for name, kernel in kernels.items()}
    dense = in_slots(x[None], {name: kernel[:1] for name, kernel in kernels.items()})[0]
    routed = top_k_choice(logits, 2, renormalize=True)
    assert_agree(dropless(x, routed.experts, routed.weights, equal), dense, 1e-5)
    raw = top_k_choice(logits, 1)
    assert_agree(dropless(x, raw.experts, raw.weights, equal), raw.scores.max(-1, keepdims=True) * dense, 1e-5)


def test_the_order_of_tokens_and_of_experts_does_not_matter():
    x, logits, kernels, _ = draw(6)
    order, turn = np.random.default_rng(3).permutation(6), np.random.default_rng(4).permutation(TOKENS)

    def run(x, logits, kernels):
        routed = router(logits, 2)
        return dropless(x, routed.experts, routed.weights, kernels)

    y = run(x, logits, kernels)
    assert_agree(run(x[turn], logits[turn], kernels), y[turn], 1e-5)
    assert_agree(run(x, logits[:, order], {name: kernel[order] for name, kernel in kernels.items()}), y, 1e-5)


@pytest.mark.slow
def test_activations_do_not_grow_with_the_number_of_experts():
    """Temporaries of forward and backward at 4 and at 64 experts, the gradients of the kernels left out."""
    tokens, width, hidden, k = 512, 64, 128, 2

    def temporaries(num_experts):
        def loss(x, logits, kernels):
            routed = router(logits, k)
            return (dropless(x, routed.experts, routed.weights, kernels, implementation="blocks") ** 2).sum()

        shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
        kernels = {
            "up": shape(num_experts, width, hidden),
            "gate": shape(num_experts, width, hidden),
            "down": shape(num_experts, hidden, width),
        }
        program = (
            jax.jit(jax.grad(loss, (0, 1, 2)))
            .lower(shape(tokens, width), shape(tokens, num_experts), kernels)
            .compile()
        )
        return program.memory_analysis().temp_size_in_bytes

    few, many = temporaries(4), temporaries(64)
    weights = 60 * 3 * width * hidden * 4  # gradients of the kernels, held once more while a loop fills them
    assert many - few < 1.5 * weights + 0.2 * few, (few, many)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_it_lowers_for_accelerators(platform):
    x, logits, kernels, _ = draw(4)

    def loss(x, logits, kernels):
        routed = router(logits, 2)
        one = dropless(x, routed.experts, routed.weights, kernels)
        two = with_places(x, routed.experts, routed.weights, places(routed.experts, 4), 8, kernels)
        return (one * two).sum()

    jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=[platform])(x, logits, kernels)


def test_invalid_arguments_are_named():
    x, logits, kernels, _ = draw(4)
    routed = router(logits, 2)
    with pytest.raises(ValueError, match="dropless: activation is 'tanh'; expected silu, gelu, relu"):
        dropless(x, routed.experts, routed.weights, kernels, activation="tanh")
    with pytest.raises(ValueError, match=r"dropless: weights has shape \(37, 3\); expected \[T k\] = \(37, 2\)"):
        dropless(x, routed.experts, jnp.ones((TOKENS, 3)), kernels)
    with pytest.raises(ValueError, match=r"with_places: down has shape \(4, 6, 5\); expected \[E F D\] = \(4, 5, 6\)"):
        with_places(x, routed.experts, routed.weights, routed.experts, 3, {**kernels, "down": kernels["up"]})
