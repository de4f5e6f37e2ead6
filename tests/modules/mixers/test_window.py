"""Sliding-window attention as a mixer: its implementations, a twin in numpy, its reach and its state."""

import numpy as np
import pytest

from research.errors import UserError
from research.modules.mixers.window import Window
from tests.modules.mixers.agreement import Functions, check_forms, check_shrink, num_params
from tests.modules.mixers.test_attention import twin
from tests.ops.compare import assert_agree, draw

SPEC = Window(num_heads=4, num_kv_heads=2, window=5)


@pytest.mark.slow
def test_all_implementations_compute_the_same():
    check_forms(SPEC, 16, 65)


def test_a_window_of_one_token_has_no_state():
    check_forms(Window(num_heads=2, window=1), 8, 4, naive=False)


def test_window_attention_is_its_definition():
    mixer, x = Functions(SPEC, 16, 12), draw((1, 12, 16), 3)
    y, state = mixer.call(mixer.weights, x)
    assert_agree(y[0], twin(mixer.weights[0], mixer.spec, x[0].astype(np.float64), window=5).astype(np.float32), 1e-5)
    assert state["k"].shape == (1, 4, 2, 4) and mixer.start(1, 10_000)["k"].shape == (1, 4, 2, 4)


def test_tokens_before_the_window_do_not_matter():
    mixer, x = Functions(SPEC, 16, 12), draw((1, 12, 16), 4)
    y, moved = (
        mixer.call(mixer.weights, x)[0],
        mixer.call(mixer.weights, np.concatenate([x[:, :3] + 1, x[:, 3:]], 1))[0],
    )
    assert_agree(moved[:, 7:], y[:, 7:], 1e-6)
    assert float(abs(moved[:, 6] - y[:, 6]).max()) > 1e-4


def test_counts_and_smaller_selves():
    assert num_params(Window(num_heads=8), 64) == 4 * 64**2
    small = check_shrink(SPEC, 32, 16, cut=("embed", "layer/heads"))
    assert isinstance(small, Window) and (small.num_heads, small.head_dim, small.window) == (2, 8, 5)


def test_no_window():
    with pytest.raises(UserError, match="mixer window: window=0; valid: whole numbers from 1"):
        Window(window=0).resolve(16)
