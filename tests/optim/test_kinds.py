"""Weight decay and Muon follow from what an array is: properties of every registered model, and what came out for some
by name."""

import dataclasses

import jax.numpy as jnp
import pytest

from research.models import registry
from research.modules.axes import Kind, role
from research.modules.state import abstract
from research.optim.muon import matrix_axes
from research.optim.rules import by_kind
from research.optim.stacks import STACKS
from tests.models.twins import distinct_twins, twin

NAMES = [names[0] for names in distinct_twins().values()]
"""One name of every architecture of the registry; the others differ from it in sizes."""
ADDED = ("bias", "_bias")
"""How names of arrays that are added end."""
KERNELS = (
    "kernel",
    "window",
    "table",
    "head",
    "query",
    "key",
    "value",
    "out",
    "up",
    "down",
    "x",
    "z",
    "dt_down",
    "dt_up",
)
"""Last parts of the names of kernels and tables, which decay."""
EXEMPT = (
    "scale",
    "layer_scale",
    "slot_scale",
    "a_log",
    "skip",
    "bound",
    "cls_token",
    "dist_token",
    "positions",
    "spread_x",
    "gather",
)
"""Last parts of the names of arrays that are neither added nor kernels: they do not decay."""


def rules(name):
    """Returns (kinds, decay, matrices, axes) of the tiny twin of a registered model."""
    full = abstract(twin(name))
    axes = {path: full.axes[path] for path in full.params}
    return full.kinds, by_kind(axes, full.kinds), {p: matrix_axes(a, full.kinds[p]) for p, a in axes.items()}, axes


@pytest.mark.parametrize("name", NAMES)
def test_kinds_fit_the_names_and_the_axes(name):
    kinds, decay, matrices, axes = rules(name)
    assert set(kinds) == set(axes)
    for path, names in axes.items():
        tag = path.rsplit("/", 1)[-1]
        within = [role(axis) for axis in names if role(axis) not in ("layers", "directions")]
        if len(within) < 2:
            assert kinds[path] is not Kind.MATRIX and not decay[path] and matrices[path] is None, path
        if tag.endswith(ADDED):
            assert kinds[path] is Kind.BIAS and not decay[path] and matrices[path] is None, path
        if tag in EXEMPT:
            assert kinds[path] not in (Kind.MATRIX, Kind.BIAS) and not decay[path] and matrices[path] is None, path
        if tag in KERNELS:
            assert decay[path], path
        if {"kernel_h", "taps", "tokens"} & set(within):
            assert kinds[path] is not Kind.MATRIX and matrices[path] is None, path
        if matrices[path] is not None:
            used = {*matrices[path].reduction_axis, *matrices[path].output_axis}
            assert used == {i for i, axis in enumerate(names) if role(axis) not in STACKS}, path


@pytest.mark.parametrize(
    "name, not_decayed",
    [
        ("mamba2_small", {"dt_bias", "a_log", "skip", "bias", "scale"}),
        ("mamba3_small", {"dt_bias", "skip", "b_bias", "c_bias", "scale"}),
        ("gla_small", {"decay_bias", "scale"}),
        ("gated_deltanet_small", {"dt_bias", "a_log", "scale"}),
        ("vmamba_micro_32", {"dt_bias", "a_log", "skip", "bias", "scale"}),
        ("vit_tiny_patch16_224", {"bias", "scale", "positions", "cls_token"}),
        ("deit_tiny_distilled_patch16_224", {"bias", "scale", "positions", "cls_token", "dist_token"}),
    ],
)
def test_last_names_of_what_does_not_decay(name, not_decayed):
    _, decay, _, _ = rules(name)
    assert {path.rsplit("/", 1)[-1] for path, factor in decay.items() if not factor} == not_decayed


def test_maps_between_ranks_are_gains_of_each_channel():
    """Mamba-3's `spread` and `gather` multiply channel by channel: neither decay nor Muon touches them."""
    full = abstract(registry.model_config("mamba3_small", mamba3={"mimo_rank": 2}))
    maps = [path for path in full.params if path.endswith(("/spread_x", "/spread_z", "/gather"))]
    assert len(maps) == 3 and all(full.kinds[path] is Kind.GAIN for path in maps)


def test_a_walk_of_an_image_has_matrices_of_its_own():
    """VMamba's four directions lie beside one another, as layers and experts do."""
    _, _, matrices, axes = rules("vmamba_micro_32")
    path = next(p for p in axes if p.endswith("dt_down"))
    assert [role(a) for a in axes[path]][-3:] == ["directions", "inner", "rank"]
    assert matrices[path].reduction_axis == (len(axes[path]) - 2,) and matrices[path].output_axis == (
        len(axes[path]) - 1,
    )


@pytest.mark.parametrize("name", ["mamba3_small", "unireplknet_a", "soft_moe_small_patch16"])
def test_kinds_are_those_of_the_config_whatever_its_size_precision_and_form(name):
    config = twin(name)
    kinds = abstract(config).kinds
    assert abstract(config, jnp.bfloat16).kinds == kinds
    small = abstract(config.shrink(width=0.5)).kinds
    assert small == {path: kinds[path] for path in small} and len(small) == len(kinds)
    merged = abstract(config.deployed()).kinds
    assert {path: kind for path, kind in merged.items() if path in kinds} == {
        path: kinds[path] for path in merged if path in kinds
    }
    if "unroll" in {f.name for f in dataclasses.fields(config)}:
        assert abstract(dataclasses.replace(config, unroll=True)).kinds == kinds
