"""The diagonal recurrence: every implementation against a float64 loop and the reference implementation, both
directions, states of any rank."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.ops.linear_recurrence import IMPLEMENTATIONS, linear_recurrence
from tests.ops.compare import assert_agree, assert_lowers_everywhere, draw, filler, outputs_and_grads

FAST = tuple(implementation for implementation in IMPLEMENTATIONS if implementation != "naive")


def loop(a, b, h, reverse=False):
    """The definition in float64, time on axis 1."""
    a, b, h = (np.asarray(x, np.float64) for x in (a, b, h))
    states = np.empty(b.shape)
    for t in reversed(range(b.shape[1])) if reverse else range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        states[:, t] = h
    return states, h


def operands(shape, decay_shape=None, dtype=np.float32):
    decay_shape = shape if decay_shape is None else decay_shape
    a = 1 / (1 + np.exp(-draw(decay_shape, 0, dtype) - 1))
    return (
        a.astype(dtype) * np.sign(draw(decay_shape, 3) + 1.5).astype(dtype),
        draw(shape, 1, dtype),
        draw(shape[:1] + shape[2:], 2, dtype),
    )


# scalar, vector and matrix states; decays of their own or shared over an axis
SHAPES = [
    ((2, 63), None),
    ((3, 1, 4), None),
    ((1, 131, 3), (1, 131, 1)),
    ((2, 67, 3, 2), (2, 67, 3, 1)),
    ((2, 70, 3), (1, 70, 3)),
    ((1, 64, 2), None),
]


@pytest.mark.slow_unless(
    "associative-shape1-None-False",
    "chunked-shape3-decay_shape3-False",
    "chunked-shape4-decay_shape4-False",
    "chunked-shape5-None-True",
    "sequential-shape0-None-True",
    "sequential-shape2-decay_shape2-True",
)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape, decay_shape", SHAPES)
@pytest.mark.parametrize("implementation", FAST)
def test_implementations_agree_with_naive_and_the_definition(implementation, shape, decay_shape, reverse):
    args = operands(shape, decay_shape)
    run = lambda implementation: functools.partial(linear_recurrence, reverse=reverse, implementation=implementation)
    actual = outputs_and_grads(run(implementation), *args)
    assert_agree(actual[0], loop(*args, reverse), 1e-5)
    assert_agree(actual, outputs_and_grads(run("naive"), *args), 1e-5)


def test_the_gated_recurrence_of_hgrn():
    """f = sigmoid(W((6,2),3)), i = silu(W((6,2),0)) (1 - f): the last row and the sum of the reference."""
    f = 1 / (1 + np.exp(-filler((1, 6, 2), 3)))
    x = filler((1, 6, 2), 0)
    for implementation in IMPLEMENTATIONS:
        states, _ = linear_recurrence(
            jnp.asarray(f, jnp.float32),
            jnp.asarray(x / (1 + np.exp(-x)) * (1 - f), jnp.float32),
            implementation=implementation,
        )
        np.testing.assert_allclose(states[0, -1], [0.53418381, 0.50913059], atol=1e-6)
        np.testing.assert_allclose(states.sum(), 3.45823099, atol=1e-5)


@pytest.mark.slow_unless("chunked", "naive", "sequential")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_and_bfloat16(implementation):
    with jax.enable_x64(True):
        args = operands((2, 33, 3), dtype=np.float64)
        assert_agree(linear_recurrence(*args, implementation=implementation), loop(*args), 1e-12)
        actual = outputs_and_grads(functools.partial(linear_recurrence, implementation=implementation), *args)
        assert_agree(
            actual, outputs_and_grads(functools.partial(linear_recurrence, implementation="naive"), *args), 1e-10
        )
    args = [jnp.asarray(x, jnp.bfloat16) for x in operands((2, 200, 3))]
    actual = linear_recurrence(*args, implementation=implementation)
    assert actual[0].dtype == jnp.bfloat16
    assert_agree(actual, loop(*(np.asarray(x, np.float64) for x in args)), 1e-2)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 140),
    width=st.integers(1, 5),
    axis=st.integers(0, 2),
    split=st.integers(1, 139),
    reverse=st.booleans(),
    implementation=st.sampled_from(FAST),
)
def test_any_axis_with_the_state_carried_anywhere(length, width, axis, split, reverse, implementation):
    a, b, h = operands((2, length, width))
    expected = loop(a, b, h, reverse)
    move = lambda x: np.moveaxis(x, 1, axis)
    run = functools.partial(linear_recurrence, axis=axis, reverse=reverse, implementation=implementation)
    split = min(split, length)
    pieces = [(slice(0, split)), slice(split, length)][:: -1 if reverse else 1]
    done = []
    for piece in pieces:
        states, h = run(move(a[:, piece]), move(b[:, piece]), h)
        done.append(np.moveaxis(states, axis, 1))
    assert_agree((np.concatenate(done[:: -1 if reverse else 1], 1), h), expected, 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causality(implementation):
    a, b, h = operands((2, 150, 3))
    later = b.copy()
    later[:, 90:] += 1
    assert np.array_equal(
        linear_recurrence(a, b, h, implementation=implementation)[0][:, :90],
        linear_recurrence(a, later, h, implementation=implementation)[0][:, :90],
    )
    earlier = b.copy()
    earlier[:, :90] += 1
    run = functools.partial(linear_recurrence, reverse=True, implementation=implementation)
    assert np.array_equal(run(a, b, h)[0][:, 90:], run(a, earlier, h)[0][:, 90:])


@pytest.mark.parametrize("implementation", FAST)
def test_stable_at_length_16384_where_products_of_decays_underflow(implementation):
    a, b, h = operands((1, 16384, 2))
    a = np.where(np.arange(16384)[None, :, None] % 1000 < 500, np.abs(a) * 1e-6, 1 - 1e-6).astype(np.float32)
    actual = outputs_and_grads(functools.partial(linear_recurrence, implementation=implementation), a, b, h)
    assert_agree(actual[0], loop(a, b, h), 1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(actual))


def test_auto_equals_the_implementations_and_lowers_for_accelerators_without_a_loop():
    args = operands((2, 300, 3))
    assert_agree(linear_recurrence(*args), loop(*args), 1e-5)
    assert "stablehlo.while" not in assert_lowers_everywhere(lambda *a: linear_recurrence(*a), *args)


def test_bad_input_is_named():
    a, b, h = operands((2, 5, 3))
    with pytest.raises(
        ValueError, match=r"linear_recurrence: a is of shape \(2, 4, 3\); expected the shape of b, \(2, 5, 3\)"
    ):
        linear_recurrence(a[:, :4], b)
    with pytest.raises(ValueError, match="initial_state is of shape"):
        linear_recurrence(a, b, h[:1])
    with pytest.raises(ValueError, match="axis is 3"):
        linear_recurrence(a, b, axis=3)
