"""HGRN: its implementations, an independent recurrence, published counts, bounds of the forget gate, sub-networks."""

import jax
import numpy as np
import pytest

from research.errors import UserError
from research.modules.axes import Init
from research.modules.mixers.hgrn import HGRN
from tests.modules.mixers.agreement import check_forms, check_shrink, num_params
from tests.modules.mixers.recurrent import check_recurrent, check_slices, rms, sigmoid, silu
from tests.ops.compare import assert_agree


def test_implementations_agree_and_follow_the_recurrence():
    w, x, y = check_recurrent(HGRN(expand=1.5), 16, 9)
    bound = sigmoid(w["bound"])
    forget = bound + (1 - bound) * sigmoid(x @ w["forget"])
    written = silu(x @ w["input"]) * (1 - forget)
    hidden, states = np.zeros_like(written[:, 0]), []
    for t in range(x.shape[1]):
        hidden = forget[:, t] * hidden + written[:, t]
        states.append(hidden)
    mixed = rms(np.stack(states, 1), w["norm/scale"]) * silu(x @ w["gate"])
    assert_agree(y, mixed @ w["out"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 3, 65, 128])
def test_implementations_agree_at_other_lengths(length):
    check_forms(HGRN(), 16, length)


@pytest.mark.parametrize("dim, total", [(1024, 373_916_672), (2048, 1_364_396_032)])
def test_published_counts(dim, total):
    """The published models keep one table of bounds; ours are as many, one row in each layer."""
    hidden = {1024: 2816, 2048: 5632}[dim]
    layer = num_params(HGRN(), dim)
    assert 24 * (layer + 3 * dim * hidden + 2 * dim) + 2 * 32000 * dim + dim == total


def test_the_bound_is_kept_precise_and_a_gate_at_its_end_forgets_nothing():
    module = HGRN(lower_bound=0.25).resolve(8).build(8, 4, "layer", Init(jax.random.key(0)), "auto")
    assert module.bound.precise
    module.forget[...] = np.full((8, 8), 1e3, np.float32)
    forget, written, _ = module._gates(np.ones((1, 8), np.float32))
    np.testing.assert_array_equal(forget, 1)
    np.testing.assert_array_equal(written, 0)
    forget, _, _ = module._gates(-np.ones((1, 8), np.float32))
    np.testing.assert_allclose(forget, 0.25, rtol=1e-6)


def test_smaller_selves_are_leading_slices():
    small = check_shrink(HGRN(), 32, 16, cut=("embed", "layer/inner"))
    assert small.d_inner == 16 and check_slices(HGRN(), 32, 16, small)["bound"] == (16,)


def test_bounds_outside_the_open_interval_are_refused():
    with pytest.raises(UserError, match="mixer hgrn: lower_bound=1.0; valid: numbers between 0 and 1"):
        HGRN(lower_bound=1.0).resolve(8)


@pytest.mark.slow
def test_a_short_convolution_before_it():
    check_recurrent(HGRN(d_conv=3), 16, 9)
    assert num_params(HGRN(d_conv=3), 16) == num_params(HGRN(), 16) + 4 * 16
