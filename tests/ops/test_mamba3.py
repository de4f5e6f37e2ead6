"""Mamba-3's recurrence: reference values, the parallel form against the loop of steps, pieces, segments, rotations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.mamba3 import cumulative_turns, rotate, trapezoidal_scan, trapezoidal_step, wrap
from research.ops.ssd import ssd
from tests.ops.compare import assert_agree, assert_lowers_everywhere, draw, filler, outputs_and_grads

run = jax.jit(trapezoidal_scan, static_argnames=("implementation", "chunk_size"))
step = jax.jit(trapezoidal_step)


def operands(batch, length, rank, heads, width, d_state):
    dt = np.logaddexp(0, draw((batch, length, heads), 1)).astype(np.float32)
    return (
        draw((batch, length, rank, heads, width), 0),
        dt,
        -dt * np.exp(draw((batch, length, heads), 2)),
        (1 / (1 + np.exp(-draw((batch, length, heads), 3)))).astype(np.float32),
        draw((batch, length, rank, heads, d_state), 4),
        draw((batch, length, rank, heads, d_state), 5),
        draw((heads,), 6),
    )


def state_of(batch, rank, heads, width, d_state):
    shapes = {
        "ssm": (batch, heads, width, d_state),
        "x": (batch, rank, heads, width),
        "b": (batch, rank, heads, d_state),
    }
    return {name: draw(shape, i + 10) for i, (name, shape) in enumerate(shapes.items())}


def implementations(name, **options):
    return lambda *args: trapezoidal_scan(
        *args[:7],
        initial_state=dict(zip(("ssm", "x", "b"), args[7:], strict=True)) if args[7:] else None,
        implementation=name,
        **options,
    )


@pytest.mark.parametrize("implementation", ["naive", "chunked"])
def test_reference_values(implementation):
    """T=6, N=4, P=2, one rotated pair, of the filler, by the formulas of the paper in float64 (unit norms, biases and
    skip)."""
    unit = lambda a: a / np.sqrt(np.square(a).mean(-1, keepdims=True) + 1e-5) + 1
    dt = np.log1p(np.exp(filler((6,), 3) - 1))[:, None]
    raw = filler((6, 1), 4)
    decay = dt * np.minimum(-np.where(raw >= 0, 1 + raw, 1 / (1 - np.minimum(raw, 0))), -1e-4)
    turns = jax.jit(cumulative_turns)(jnp.asarray(np.tanh(filler((1, 6, 1, 1), 6)) * dt[..., None] / 2, jnp.float32))[0]
    maps = [rotate(jnp.asarray(unit(filler((6, 1, 4), k)), jnp.float32), turns)[:, None] for k in (1, 0)]
    x, mix = filler((6, 1, 1, 2), 2), 1 / (1 + np.exp(-filler((6, 1), 5)))
    y, _ = run(
        *(jnp.asarray(a, jnp.float32) for a in (x, dt, decay, mix, *maps, np.ones(1))), implementation=implementation
    )
    expected = [
        *([0.78445505, -0.46904526], [-0.75696262, -1.02403098], [-1.56896803, -0.72419795]),
        *([0.48395734, 0.94577998], [3.25915160, 1.51942498], [-0.38487215, -1.44337047]),
    ]
    assert_agree(y[:, 0, 0], np.array(expected), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "packed"), [(1, False), (3, True)])
def test_chunked_agrees_with_the_loop_of_steps_with_carried_state(rank, packed):
    args = operands(2, 37, rank, 3, 4, 6)
    initial = state_of(2, rank, 3, 4, 6)
    ids = np.sort(np.random.default_rng(0).integers(0, 5, (2, 37))) if packed else None
    expected = outputs_and_grads(implementations("naive", segment_ids=ids), *args, *initial.values())
    actual = outputs_and_grads(implementations("chunked", segment_ids=ids, chunk_size=8), *args, *initial.values())
    assert_agree(actual, expected, 2e-5)


def test_pieces_and_steps_equal_the_whole():
    args = operands(2, 12, 2, 3, 4, 5)
    skip = args[-1]
    y, final = run(*args)
    part = lambda s: [a[:, s] for a in args[:-1]]
    _, state = run(*part(slice(5)), skip)
    for t in range(5, 12):
        out, state = step(*part(t), skip, state=state)
        assert_agree(out, y[:, t], 1e-5)
    assert_agree(state, final, 1e-5)
    _, state = run(*part(slice(5)), skip)
    assert_agree(run(*part(slice(5, 12)), skip, initial_state=state), (y[:, 5:], final), 1e-5)


def test_packed_segments_equal_separate_runs():
    args = operands(1, 12, 2, 2, 3, 4)
    ids = np.array([[0] * 5 + [3] + [1] * 6])
    y, final = run(*args, segment_ids=ids)
    runs = [
        run(*(a[:, s] for a in args[:-1]), args[-1], implementation="naive")
        for s in (slice(5), slice(5, 6), slice(6, 12))
    ]
    assert_agree((y, final), (jnp.concatenate([run[0] for run in runs], 1), runs[-1][1]), 1e-5)


def test_is_the_rule_of_mamba_2_at_the_end_of_the_step():
    x, dt, _, _, B, C, skip = operands(2, 9, 1, 3, 4, 5)
    A = -np.exp(draw((3,), 8))
    y, state = run(x, dt, dt * A, np.ones_like(dt), B, C, skip)
    expected, final = ssd(x[:, :, 0], dt, A, B[:, :, 0], C[:, :, 0], skip)
    assert_agree((y[:, :, 0], state["ssm"]), (expected, final), 1e-5)


def test_turns_stay_precise_and_rotations_are_relative():
    steps = np.random.default_rng(0).uniform(0, 0.5, (1, 4096, 2)).astype(np.float32)
    turns = jax.jit(cumulative_turns)(jnp.asarray(steps), jnp.full((1, 2), 0.25))
    exact = 0.25 + np.cumsum(steps.astype(np.float64), 1)
    assert np.abs(turns).max() <= 0.5
    assert np.abs(np.exp(2j * np.pi * np.asarray(turns, np.float64)) - np.exp(2j * np.pi * exact)).max() < 1e-5
    x, y = draw((3, 7), 1), draw((3, 7), 2)
    a, b = (np.float32(turn) * np.ones((3, 2), np.float32) for turn in (0.3, 0.1))
    assert_agree((rotate(x, a) * rotate(y, b)).sum(-1), (rotate(x, a - b) * y).sum(-1), 1e-6)
    assert_agree(
        rotate(x, np.full((3, 2), 0.25, np.float32)),
        np.stack([-x[:, 1], x[:, 0], -x[:, 3], x[:, 2], *x[:, 4:].T], 1),
        1e-6,
    )
    assert jax.grad(lambda t: wrap(3 * t))(0.4) == 3


def test_reduced_precision_keeps_its_dtype_and_a_wide_state():
    args = operands(1, 20, 1, 2, 4, 4)
    y, state = run(*(jnp.asarray(a, jnp.bfloat16) if i in (0, 4, 5) else a for i, a in enumerate(args)))
    assert y.dtype == jnp.bfloat16 and {a.dtype for a in state.values()} == {jnp.dtype(jnp.float32)}
    assert_agree(y, run(*args)[0], 2e-2)


def test_lowers_for_accelerators_and_names_bad_input():
    args = operands(1, 128, 2, 2, 4, 4)
    assert_lowers_everywhere(functools.partial(trapezoidal_scan, implementation="auto"), *args)
    x, dt, decay, mix, B, C, skip = args
    with pytest.raises(
        ValueError, match=r"trapezoidal_scan: C has shape \(1, 128, 2, 2, 3\); expected \[\*B T R H N\]"
    ):
        trapezoidal_scan(x, dt, decay, mix, B, C[..., :3], skip)
    with pytest.raises(ValueError, match="state x has shape"):
        trapezoidal_step(*(a[:, 0] for a in args[:-1]), skip, state=state_of(1, 1, 2, 4, 4))
