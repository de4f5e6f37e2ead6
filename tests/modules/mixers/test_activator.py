"""Activator: a twin in numpy, no way between tokens, its count."""

import math

import numpy as np
import pytest

from research.modules.mixers.activator import Activator
from tests.modules.mixers.agreement import Functions, check_forms, check_shrink, num_params
from tests.ops.compare import assert_agree, draw


@pytest.mark.parametrize("length", [1, 5])
def test_all_implementations_compute_the_same(length):
    check_forms(Activator(), 16, length, naive=False)


def test_gated_unit_is_its_definition():
    mixer, x = Functions(Activator(d_inner=10), 6, 4), draw((2, 4, 6), 3)
    w = {name: np.asarray(value, np.float64) for name, value in mixer.weights[0].items()}
    w["norm/scale"] = w["norm/scale"] + np.arange(10) / 5
    norm = lambda a: (
        (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5) * w["norm/scale"] + w["norm/bias"]
    )
    gate, up = x @ w["gate"] + w["gate_bias"], x @ w["up"] + w["up_bias"]
    gelu = gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
    expected = (norm(gelu) * norm(up)) @ w["out"] + w["out_bias"]
    weights = {**mixer.weights[0], "norm/scale": w["norm/scale"].astype(np.float32)}, mixer.weights[1]
    assert_agree(mixer.call(weights, x)[0], expected.astype(np.float32), 1e-5)


def test_tokens_do_not_see_each_other():
    mixer, x = Functions(Activator(), 16, 4), draw((1, 4, 16), 4)
    y, moved = (mixer.call(mixer.weights, a)[0] for a in (x, np.concatenate([x[:, :1] + 1, x[:, 1:]], 1)))
    np.testing.assert_array_equal(moved[:, 1:], y[:, 1:])
    assert float(abs(moved[:, 0] - y[:, 0]).max()) > 1e-2


def test_counts_and_smaller_selves():
    assert num_params(Activator(), 256) == 3 * 256 * 512 + 4 * 512 + 256  # the gating unit of the CIFAR model
    small = check_shrink(Activator(), 32, 16, cut=("embed", "layer/inner"))
    assert small.d_inner == 32
