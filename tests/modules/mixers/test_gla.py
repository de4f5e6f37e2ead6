"""Gated linear attention: its implementations, an independent recurrence, published counts, sub-networks."""

import numpy as np
import pytest

from research.errors import UserError
from research.modules.mixers.gla import GatedLinearAttention
from tests.modules.mixers.agreement import check_forms, check_shrink, num_params
from tests.modules.mixers.recurrent import check_recurrent, check_slices, heads, recurrence, rms, sigmoid, silu
from tests.ops.compare import assert_agree


@pytest.mark.slow
def test_implementations_agree_and_follow_the_recurrence():
    w, x, y = check_recurrent(GatedLinearAttention(num_heads=2, gate_low_rank_dim=3, gate_logit_normalizer=2.0), 16, 5)
    q, k, v = (heads(x, w[name]) for name in "qkv")
    decay = sigmoid(heads(x @ w["decay_down"], w["decay_up"]) + w["decay_bias"]) ** (1 / 2.0)
    mixed = rms(recurrence(q / np.sqrt(4), k, v, decay=decay), w["norm/scale"]) * silu(heads(x, w["gate"]))
    assert_agree(y, np.einsum("bthv,hvd->btd", mixed, w["out"]), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 3, 65, 128])
def test_implementations_agree_at_other_lengths(length):
    check_forms(GatedLinearAttention(num_heads=2, gate_low_rank_dim=3), 16, length)


@pytest.mark.parametrize("dim, total", [(1024, 374_475_776), (2048, 1_365_514_240)])
def test_published_counts(dim, total):
    """Layer formula, and the whole language models: 24 layers, SwiGLU, vocabulary 32000, untied."""
    keys, values, hidden = dim // 2, dim, {1024: 2816, 2048: 5632}[dim]
    layer = num_params(GatedLinearAttention(), dim)
    assert layer == 2 * dim * keys + 2 * dim * values + dim * 16 + 16 * keys + keys + values * dim + values // 4
    assert 24 * (layer + 3 * dim * hidden + 2 * dim) + 2 * 32000 * dim + dim == total


def test_smaller_selves_are_leading_slices():
    spec = GatedLinearAttention(num_heads=4)
    small = check_shrink(spec, 32, 16, state=3, cut=("embed", "layer/heads", "layer/state"))
    assert (small.num_heads, small.d_state, small.head_dim, small.gate_low_rank_dim) == (2, 3, 8, 16)
    assert check_slices(spec, 32, 16, small)["q"] == (16, 2, 3)
    assert check_shrink(spec, 32, 32, width=1.0, heads=0.75, cut=("layer/heads",)).num_heads == 3


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(
        UserError, match="mixer gla: dim=6 gives num_heads=4 keys of 0 and values of 1 features; valid: at least 1"
    ):
        GatedLinearAttention().resolve(6)
    with pytest.raises(UserError, match="mixer gla: num_heads=0"):
        GatedLinearAttention(num_heads=0).resolve(16)
