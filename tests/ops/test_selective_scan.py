"""The selective scan against the reference values, its reference implementation and a float64 loop; state carried
anywhere; packing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.ops.selective_scan import IMPLEMENTATIONS, selective_scan, selective_scan_step
from tests.ops.compare import assert_agree, assert_lowers_everywhere, draw, filler, outputs_and_grads

FAST = tuple(implementation for implementation in IMPLEMENTATIONS if implementation != "naive")


def operands(batch, length, channels, d_state, dtype=np.float32, lead=None):
    lead = (batch,) if lead is None else lead
    return (
        draw((*lead, length, channels), 0, dtype),
        np.logaddexp(0, draw((*lead, length, channels), 1, dtype) - 1).astype(dtype),
        -np.exp(draw((channels, d_state), 2, dtype)),
        draw((*lead, length, d_state), 3, dtype),
        draw((*lead, length, d_state), 4, dtype),
        draw((channels,), 5, dtype),
        draw((*lead, channels, d_state), 6, dtype),
    )


@functools.partial(jax.jit, static_argnums=0)
def scan(implementation, u, delta, A, B, C, skip, state, segment_ids=None):
    return selective_scan(
        u, delta, A, B, C, skip, initial_state=state, segment_ids=segment_ids, implementation=implementation
    )


def loop(u, delta, A, B, C, skip, state, segment_ids=None):
    """The definition in float64 NumPy, for one leading axis."""
    u, delta, A, B, C, skip, state = (np.asarray(x, np.float64) for x in (u, delta, A, B, C, skip, state))
    ys = []
    for t in range(u.shape[1]):
        if segment_ids is not None and t:
            state = state * (segment_ids[:, t] == segment_ids[:, t - 1])[:, None, None]
        state = np.exp(delta[:, t, :, None] * A) * state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append(np.einsum("bdn,bn->bd", state, C[:, t]) + skip * u[:, t])
    return np.stack(ys, 1), state


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_reference_values(implementation):
    """T=6, E=2, N=3 of the filler, as transformers' mamba_selective_scan computes it (to 1e-8)."""
    u, B, C, z = filler((6, 2), 0), filler((6, 3), 2), filler((6, 3), 3), filler((6, 2), 4)
    delta = np.log1p(np.exp(filler((6, 2), 1, 0.5) - 1 + np.array([0.1, -0.2])))
    A = -np.tile([1.0, 2.0, 3.0], (2, 1))
    y, state = selective_scan(
        *(jnp.asarray(x, jnp.float32) for x in (u, delta, A, B, C)), implementation=implementation
    )
    assert_agree(y[0], np.array([0.25506956, 0.26874779]), 1e-6)
    assert_agree(y[5], np.array([0.49822583, -0.03215712]), 1e-6)
    assert_agree(state, np.array([[0.15088192, 0.42013888, 0.40769928], [-0.12308404, 0.09501747, 0.20414792]]), 1e-6)
    y, _ = selective_scan(
        *(jnp.asarray(x, jnp.float32) for x in (u, delta, A, B, C, np.ones(2))), implementation=implementation
    )
    out = np.asarray(y, np.float64) * z / (1 + np.exp(-z))
    np.testing.assert_allclose([out.sum(), np.square(out).sum()], [-2.72787876, 1.24112823], atol=2e-6)


@pytest.mark.slow_unless(
    "shape0-associative",
    "shape1-associative",
    "shape1-chunked",
    "shape2-associative",
    "shape3-associative",
    "shape4-sequential",
)
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", [(2, 63, 5, 3), (1, 1, 4, 2), (3, 131, 1, 1), (1, 67, 6, 4), (2, 300, 3, 2)])
def test_implementations_agree_with_naive_in_outputs_and_gradients(shape, implementation):
    args = operands(*shape)
    expected = outputs_and_grads(functools.partial(scan, "naive"), *args)
    assert_agree(outputs_and_grads(functools.partial(scan, implementation), *args), expected, 1e-5)


def test_naive_is_the_definition():
    args = operands(2, 37, 3, 4)
    assert_agree(scan("naive", *args), loop(*args), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64(implementation):
    with jax.enable_x64(True):
        args = operands(2, 19, 3, 2, np.float64)
        assert_agree(scan(implementation, *args), loop(*args), 1e-12)
        if implementation != "naive":
            expected = outputs_and_grads(functools.partial(scan, "naive"), *args)
            assert_agree(outputs_and_grads(functools.partial(scan, implementation), *args), expected, 1e-10)


@pytest.mark.parametrize("implementation", FAST)
def test_bfloat16_inputs_with_a_float32_state(implementation):
    args = [jnp.asarray(x, jnp.bfloat16) if i in (0, 1, 3, 4) else x for i, x in enumerate(operands(2, 2048, 3, 4))]
    exact = loop(*(np.asarray(x, np.float64) for x in args))
    y, state = jax.jit(functools.partial(scan, implementation))(*args)
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert_agree((y, state), exact, 2e-2)
    assert_agree(state, exact[1], 1e-5)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 80),
    channels=st.integers(1, 5),
    d_state=st.integers(1, 4),
    split=st.integers(1, 79),
    implementation=st.sampled_from(FAST),
)
def test_any_shape_with_the_state_carried_anywhere(batch, length, channels, d_state, split, implementation):
    args = operands(batch, length, channels, d_state)
    expected = loop(*args)
    assert_agree(scan(implementation, *args), expected, 1e-5)
    split = min(split, length)
    u, delta, A, B, C, skip, state = args
    y1, state = scan(implementation, u[:, :split], delta[:, :split], A, B[:, :split], C[:, :split], skip, state)
    y2, state = (
        scan(implementation, u[:, split:], delta[:, split:], A, B[:, split:], C[:, split:], skip, state)
        if split < length
        else (y1[:, :0], state)
    )
    assert_agree((np.concatenate([y1, y2], 1), state), expected, 1e-5)


def test_steps_equal_the_scan():
    u, delta, A, B, C, skip, state = operands(2, 7, 3, 4)
    expected = loop(u, delta, A, B, C, skip, state)
    ys = []
    for t in range(7):
        y, state = selective_scan_step(u[:, t], delta[:, t], A, B[:, t], C[:, t], skip, state=state)
        ys.append(y)
    assert_agree((np.stack(ys, 1), state), expected, 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_sequences_equal_separate_runs(implementation):
    lengths = (1, 15, 70, 4)
    ids = np.repeat(np.arange(len(lengths)), lengths)[None]
    u, delta, A, B, C, skip, state = operands(1, sum(lengths), 3, 2)
    expected = loop(u, delta, A, B, C, skip, state, ids)
    assert_agree(scan(implementation, u, delta, A, B, C, skip, state, ids), expected, 1e-5)
    if implementation != "naive":
        packed = outputs_and_grads(functools.partial(scan, implementation), u, delta, A, B, C, skip, state, ids)
        assert_agree(
            packed, outputs_and_grads(functools.partial(scan, "naive"), u, delta, A, B, C, skip, state, ids), 1e-5
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_output_does_not_move_when_later_inputs_change(implementation):
    args = operands(2, 150, 3, 2)
    changed = [x.copy() for x in args]
    for i in (0, 1, 3, 4):
        changed[i][:, 90:] += 1.0
    assert np.array_equal(scan(implementation, *args)[0][:, :90], scan(implementation, *changed)[0][:, :90])


def test_leading_axes_are_free():
    args = operands(None, 9, 3, 2, lead=(2, 3))
    flat = [x if i in (2, 5) else x.reshape(6, *x.shape[2:]) for i, x in enumerate(args)]
    y, state = scan("auto", *args)
    assert_agree((y.reshape(6, 9, 3), state.reshape(6, 3, 2)), scan("auto", *flat), 1e-6)


def test_stable_at_length_16384_with_strong_decay():
    args = operands(1, 16384, 2, 2)
    args = (args[0], args[1] * 40, *args[2:])
    y, grads = outputs_and_grads(functools.partial(scan, "sequential"), *args)
    assert_agree(y, loop(*args), 1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_lowers_for_accelerators_without_a_long_loop():
    args = operands(1, 2048, 4, 2)
    text = assert_lowers_everywhere(functools.partial(scan, "auto"), *args)
    assert "stablehlo.while" in text  # over chunks of 256, forwards and backwards
    assert "dense<2048> : tensor<i32>" not in text and "dense<8> : tensor<i32>" in text


def test_bad_input_is_named():
    u, delta, A, B, C, _, state = operands(2, 5, 3, 4)
    with pytest.raises(
        ValueError, match=r"selective_scan: B has shape \(2, 5, 3\); expected \[\*B T N\] = \(2, 5, 4\)"
    ):
        selective_scan(u, delta, A, B[..., :3], C)
    with pytest.raises(ValueError, match="initial_state has shape"):
        selective_scan(u, delta, A, B, C, initial_state=state[:1])
    with pytest.raises(ValueError, match="implementation is 'fft'; expected one of auto, cpu, naive, sequential"):
        selective_scan(u, delta, A, B, C, implementation="fft")
