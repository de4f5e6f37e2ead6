"""SSD: reference values of Mamba-2's scan, groups, steps and carried state (the machinery is tested with linear
attention)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.segment_sums import segment_sum
from research.ops.ssd import ssd, ssd_step
from tests.ops.compare import assert_agree, assert_lowers_everywhere, draw, filler, outputs_and_grads


def operands(batch, length, heads, width, groups, d_state):
    return (
        draw((batch, length, heads, width), 0),
        np.logaddexp(0, draw((batch, length, heads), 1)).astype(np.float32),
        -np.exp(draw((heads,), 2)),
        draw((batch, length, groups, d_state), 3),
        draw((batch, length, groups, d_state), 4),
        draw((heads,), 5),
    )


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_reference_values(chunk_size):
    """T=6, H=2, P=2, N=3, G=1 of the filler, as transformers' mamba2_chunk_scan computes it (to 5e-8)."""
    dt = np.log1p(np.exp(filler((6, 2), 1, 0.5) - 1 + np.array([0.1, -0.2])))
    args = (
        filler((6, 2, 2), 0),
        dt,
        np.array([-1.0, -2.0]),
        filler((6, 1, 3), 2),
        filler((6, 1, 3), 3),
        np.array([1.0, 0.5]),
    )
    y, state = jax.jit(functools.partial(ssd, chunk_size=chunk_size))(*(jnp.asarray(x, jnp.float32) for x in args))
    assert_agree(y[0].ravel(), np.array([0.89928725, 1.37562565, 0.66701559, 0.25885066]), 1e-6)
    assert_agree(y[5].ravel(), np.array([1.71774602, 0.65126965, -0.51023093, -1.08194932]), 1e-6)
    np.testing.assert_allclose([y.sum(), np.square(y).sum()], [2.41004, 17.70308684], rtol=2e-6)
    h1 = np.array([[-0.20278601, -0.15619993, -0.03615059], [-0.37539615, -0.34240980, -0.14838277]])
    assert_agree(state[1], h1, 1e-6)


@pytest.mark.slow
def test_chunked_agrees_with_naive_with_groups_and_carried_state():
    args = operands(2, 75, 6, 3, 2, 4)
    initial = draw((2, 6, 3, 4), 6)
    run = lambda implementation: lambda *a: ssd(*a[:-1], initial_state=a[-1], implementation=implementation)
    expected = outputs_and_grads(run("naive"), *args, initial)
    assert_agree(outputs_and_grads(run("chunked"), *args, initial), expected, 1e-5)
    x, dt, A, B, C, skip = args
    _, state = ssd(x[:, :20], dt[:, :20], A, B[:, :20], C[:, :20], skip, initial_state=initial)
    assert_agree(
        ssd(x[:, 20:], dt[:, 20:], A, B[:, 20:], C[:, 20:], skip, initial_state=state)[1], expected[0][1], 1e-5
    )


def test_equals_the_quadratic_masked_form():
    """Y = ((C B^T) * exp(segsum(dt A))) (dt X): the dual form of the paper's section 3."""
    x, dt, A, B, C, _ = operands(1, 50, 2, 3, 1, 4)
    mask = np.exp(segment_sum(jnp.asarray(dt * A).transpose(0, 2, 1)))
    scores = np.einsum("bin,bjn->bij", C[:, :, 0], B[:, :, 0])[:, None] * mask
    assert_agree(ssd(x, dt, A, B, C)[0], np.einsum("bhij,bjhp->bihp", scores, x * dt[..., None]), 1e-5)


def test_steps_equal_the_scan():
    x, dt, A, B, C, skip = args = operands(2, 6, 4, 3, 2, 5)
    y, final = ssd(*args)
    state = np.zeros((2, 4, 3, 5), np.float32)
    for t in range(6):
        out, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], skip, state=state)
        assert_agree(out, y[:, t], 1e-5)
    assert_agree(state, final, 1e-5)


def test_lowers_for_accelerators_and_names_bad_input():
    args = operands(1, 512, 4, 3, 2, 4)
    assert_lowers_everywhere(functools.partial(ssd, implementation="auto"), *args)
    x, dt, A, B, C, _ = args
    with pytest.raises(ValueError, match=r"ssd: A has shape \(3,\); expected \[H\] = \(4\)"):
        ssd(x, dt, A[:3], B, C)
    with pytest.raises(ValueError, match="B is of 3 groups; expected a divisor of the 4 heads"):
        ssd(x, dt, A, np.repeat(B[:, :, :1], 3, 2), np.repeat(C[:, :, :1], 3, 2))
