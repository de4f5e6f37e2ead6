"""Importance sorting keeps the function and orders every coupled axis."""

import functools

import numpy as np
import pytest

from research.modules.state import abstract, apply
from research.nested.importance import channel_importance, coupled_groups, sort_by_importance
from tests.models.twins import fast_jit, images, random_arrays, twin

NAMES = (
    "unireplknet_a", "resnet18", "resnet50", "advmoe_resnet18", "advmoe_vgg16", "advmoe_wrn28_10",
    "vit_tiny_patch16_224", "vim_tiny_patch16_224", "vmamba_tiny_s1l8",
    *(
        f"{kind}_small"
        for kind in ("mamba", "mamba2", "mamba3", "gla", "gated_deltanet", "retention", "performer", "sla")
    ),
)  # fmt: skip


@pytest.mark.slow_unless("mamba_small", "performer_small", "retention_small", "sla_small", "vim_tiny_patch16_224")
@pytest.mark.parametrize("name", NAMES)
def test_sorting_preserves_the_function_and_orders_importance(name):
    config = twin(name)
    shapes, x = abstract(config), images(config)
    params, stats = random_arrays(config)
    run = fast_jit(functools.partial(apply, config))
    before = run(params, stats, x)[0]
    sorted_params, sorted_stats = fast_jit(lambda p, s: sort_by_importance(p, s, shapes))(params, stats)
    after = run(sorted_params, sorted_stats, x)[0]
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    moved, wide = 0, 0
    for axis in coupled_groups(shapes):
        importance = np.asarray(channel_importance(sorted_params, shapes, axis))
        assert importance.ndim, axis
        assert (np.diff(importance, axis=-1) <= 1e-5 * importance.max()).all(), axis
        old = np.asarray(channel_importance(params, shapes, axis))
        np.testing.assert_allclose(np.sort(old, -1)[..., ::-1], importance, rtol=1e-4)
        wide += old.shape[-1] > 2  # two units may be in order by chance
        moved += old.shape[-1] > 2 and not np.allclose(old, importance)
    assert moved >= 0.75 * wide > 0
    for group, other in ((params, sorted_params), (stats, sorted_stats)):
        assert {k: v.shape for k, v in group.items()} == {k: v.shape for k, v in other.items()}


def test_importance_is_the_l1_norm_of_the_readers():
    config = twin("vit_tiny_patch16_224")
    params, _ = random_arrays(config)
    kernel = np.asarray(params["blocks/layer/mlp/down/kernel"])
    np.testing.assert_allclose(
        channel_importance(params, abstract(config), "layer/mlp"), np.abs(kernel).sum(-1), rtol=1e-5
    )
