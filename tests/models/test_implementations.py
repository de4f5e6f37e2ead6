"""The config field `implementation`: every op of a model takes what it asks, and what it asks wrongly is told in one
line."""

import functools

import jax
import numpy as np
import pytest

from research.errors import UserError
from research.models import registry
from research.models.implementations import on_cpu
from research.modules.state import apply, initialize
from research.ops import dispatch
from tests.models.twins import fast_jit

CASES = [
    (
        "unireplknet_a",
        dict(
            depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), kernel_sizes=((3,), (7,), (7,), (7,)), image_size=64, num_classes=3
        ),
        "naive",
    ),
    (
        "unireplknet_a",
        dict(
            depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), kernel_sizes=((3,), (7,), (7,), (7,)), image_size=64, num_classes=3
        ),
        "depthwise_conv2d=dft, reparam_conv=moments",
    ),
    ("vit_tiny_patch16_224", dict(dim=16, depth=1, num_heads=2, head_dim=8, image_size=32, num_classes=3), "naive"),
    (
        "vit_tiny_patch16_224",
        dict(dim=16, depth=1, num_heads=2, head_dim=8, image_size=32, num_classes=3),
        "softmax_attention=chunked",
    ),
]


@pytest.mark.slow_unless("vit_tiny_patch16_224--softmax_attention=chunked")
@pytest.mark.parametrize("name, fields, implementation", CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_one_field_changes_the_implementation_and_not_the_function(name, fields, implementation):
    outputs, programs = [], []
    for choice in ("auto", implementation):
        config = registry.model_config(name, implementation=choice, **fields)
        params, stats = fast_jit(functools.partial(initialize, config))(jax.random.key(0))
        images = np.random.default_rng(0).normal(size=(2, *config.input_shape())).astype(np.float32)
        run = fast_jit(lambda p, s, x, config=config: apply(config, p, s, x, mode="eval")[0])
        outputs.append(np.asarray(run(params, stats, images)))
        programs.append(run.lower(params, stats, images).as_text())
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-4 * np.abs(outputs[0]).max())
    assert programs[0] != programs[1]


@pytest.mark.parametrize(
    "implementation, expected",
    [
        ("auto", "cpu"),
        ("naive", "naive"),
        ("depthwise_conv2d=dft", "depthwise_conv2d=dft, cpu"),
        ("depthwise_conv2d=dft, naive", "depthwise_conv2d=dft, naive"),
    ],
)
def test_what_is_left_open_is_chosen_for_a_cpu(implementation, expected):
    assert on_cpu(implementation) == expected
    assert dispatch.resolve(on_cpu(implementation), "depthwise_conv2d", ("naive", "dft")) != "auto"


@pytest.mark.parametrize(
    "name, implementation, message",
    [
        (
            "unireplknet_a",
            "fast",
            "unireplknet: depthwise_conv2d: implementation is 'fast'; expected one of auto, cpu, naive",
        ),
        (
            "unireplknet_a",
            "softmax_attention=naive",
            "names 'softmax_attention'; its ops: depthwise_conv2d, reparam_conv",
        ),
        (
            "vit_tiny_patch16_224",
            "dft",
            "vit: softmax_attention: implementation is 'dft'; expected one of auto, cpu, naive, fused, chunked",
        ),
    ],
)
def test_a_wrong_implementation_is_told_when_the_config_is_made(name, implementation, message):
    with pytest.raises(UserError, match=message):
        registry.model_config(name, implementation=implementation)
