"""Retention: its implementations, an independent recurrence with rotated keys, decays, published counts,
sub-networks."""

import numpy as np
import pytest

from research.errors import UserError
from research.modules.mixers.retention import Retention, log_decays
from tests.modules.mixers.agreement import check_forms, check_shrink, num_params
from tests.modules.mixers.recurrent import check_recurrent, check_slices, heads, recurrence, rms, silu
from tests.ops.compare import assert_agree


def turned(x):
    """Features i and i + K/2 as one complex number, turned by position * 10000^(-2i/K)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.slow
def test_implementations_agree_and_follow_the_recurrence():
    w, x, y = check_recurrent(Retention(num_heads=2), 16, 9)
    q, k, v = (heads(x, w[name]) for name in "qkv")
    decay = np.array([31 / 32, 63 / 64])[:, None]
    mixed = rms(recurrence(turned(q) / np.sqrt(8), turned(k), v, decay=decay), w["norm/scale"]) * silu(
        heads(x, w["gate"])
    )
    assert_agree(y, np.einsum("bthv,hvd->btd", mixed, w["out"]), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 3, 65, 128])
def test_implementations_agree_at_other_lengths(length):
    check_forms(Retention(num_heads=2), 16, length)


def test_decays_of_the_paper():
    np.testing.assert_allclose(np.exp(log_decays(4)), [0.96875, 0.984375, 0.9921875, 0.99609375], rtol=1e-6)


@pytest.mark.parametrize("dim, total", [(1024, 380_165_120), (2048, 1_351_727_104)])
def test_published_counts(dim, total):
    """The whole language models: 8 heads, 24 layers, SwiGLU of ratio 2, vocabulary 32000, untied."""
    hidden = {1024: 1536, 2048: 2816}[dim]
    layer = num_params(Retention(num_heads=8), dim)
    assert layer == 8 * dim**2 + 2 * dim // 8
    assert 24 * (layer + 3 * dim * hidden + 2 * dim) + 2 * 32000 * dim + dim == total


def test_smaller_selves_are_leading_slices_with_whole_keys():
    spec = Retention(num_heads=4)
    small = check_shrink(spec, 32, 16, state=0.5, cut=("embed", "layer/heads"))
    assert (small.num_heads, small.d_state, small.head_dim) == (2, 8, 16)
    assert check_slices(spec, 32, 16, small)["out"] == (2, 16, 16)


def test_odd_keys_are_refused():
    with pytest.raises(UserError, match="mixer retention: d_state=3; valid: even numbers"):
        Retention(num_heads=2).resolve(6)
