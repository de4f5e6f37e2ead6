"""Tests generated from the registry: counts and axis names on the real models, gradients on the shrunken twins."""

import dataclasses
import fnmatch
import re

import jax
import numpy as np
import pytest

from research.errors import UserError
from research.models import registry
from research.modules.axes import ROLES, role
from research.modules.moe_options import mixture_of
from research.modules.state import abstract, apply
from tests.models.twins import distinct_twins, fast_jit, images, loss, random_arrays, train_results, twin

NAMES = registry.list_models()
INVARIANT = (r"attention/key/bias$", r"/dw/(large_norm|norms/d\d)/bias$", r"/grn/bias$")
"""Offsets without a gradient in training: one of all keys leaves softmax as it is, one before a batch norm is
subtracted."""

QUICK_TRAINED = (
    "advmoe_vgg16", "attention_small", "deit_base_patch16_224", "encoder_small", "hgrn_small", "mamba2_small",
    "mamba_small", "resnet20_cifar", "vgg16", "vim_micro_patch4_32",
)  # fmt: skip
"""Of every kind of family the twin that compiles soonest with its gradients."""
QUICK_FORWARD = (
    "activator_small", "advmoe_vgg16", "attention_small", "deit_base_patch16_224", "deltanet_small", "encoder_small",
    "gla_small", "hgrn_small", "hmode", "lenet5", "mamba2_small", "moe_small", "performer_small", "resnet20_cifar",
    "routing_small", "sla_small", "vgg16", "vim_base_patch16_224", "window_small", "wrn28_10",
)  # fmt: skip
"""Twins that compile soon without gradients."""


@pytest.mark.parametrize("name", [name for name in NAMES if registry.entry(name).counts is not None])
def test_parameter_count_is_the_published_one(name):
    entry = registry.entry(name)
    assert abstract(entry.config).num_params() == entry.counts


def test_an_image_meets_one_pathway_and_the_router():
    """The published counts of AdvMoE: 2,809,866 on a path, 269,202 in the router, 5,565,450 in all pathways."""
    info = registry.model_info("advmoe_resnet18")
    assert (info["params"], info["active_params"]) == (5_565_450 + 269_202, 2_809_866 + 269_202)


def test_most_models_have_a_published_count():
    own = [n for n in NAMES if registry.entry(n).source == "this repository"]
    rest = [
        n
        for n in NAMES
        if registry.entry(n).counts is None and n not in own and not n.startswith(("vmoe_", "soft_moe_"))
    ]
    assert rest == ["resnet20_cifar", "resnet56_cifar"]


@pytest.mark.parametrize("name", NAMES)
def test_every_axis_has_a_known_role(name):
    shapes = abstract(registry.entry(name).config)
    arrays = {**shapes.params, **shapes.stats}
    assert set(shapes.axes) == set(arrays)
    for array, axes in shapes.axes.items():
        assert len(axes) == len(arrays[array].shape), array
        for axis in axes:
            assert role(axis) in ROLES, (array, axis)


@pytest.mark.parametrize("name", NAMES)
def test_equal_names_have_equal_sizes(name):
    shapes = abstract(registry.entry(name).config)
    sizes = {}
    exempt = ("kernel_h", "kernel_w", "window_h", "window_w")
    for array, struct in {**shapes.params, **shapes.stats}.items():
        for axis, size in zip(shapes.axes[array], struct.shape, strict=True):
            if role(axis) not in exempt:
                assert sizes.setdefault(axis, size) == size, (array, axis)


@pytest.mark.slow_unless(*QUICK_TRAINED)
@pytest.mark.parametrize("name", NAMES)
def test_twin_is_finite_and_every_parameter_gets_a_gradient(name):
    config = twin(name)
    value, grads = train_results(config)
    assert np.isfinite(value)
    assert set(grads) == set(abstract(config).params)
    for path, grad in grads.items():
        assert np.isfinite(grad).all(), path
        if not any(re.search(pattern, path) for pattern in INVARIANT):
            assert np.abs(grad).max() > 1e-6, path


@pytest.mark.slow
def test_branch_offsets_get_a_gradient_under_running_moments():
    config = twin("unireplknet_a")
    params, stats = random_arrays(config)
    _, grads = fast_jit(jax.value_and_grad(lambda p: loss(config, p, stats, images(config), mode="eval")))(params)
    for path, grad in grads.items():
        assert np.abs(grad).max() > 1e-6, path


@pytest.mark.slow_unless(*QUICK_FORWARD)
@pytest.mark.parametrize("name", [names[0] for names in distinct_twins().values()])
def test_forward_gives_finite_logits_and_eval_keeps_the_statistics(name):
    config = twin(name)
    params, stats = random_arrays(config)
    out, after = fast_jit(lambda p, s, x: apply(config, p, s, x, mode="eval"))(params, stats, images(config))
    assert out.shape[0] == 3 and out.shape[-1] == (8 if config.family == "hmode" else 10) and np.isfinite(out).all()
    assert float(np.std(out, axis=0).max()) > 1e-3
    for name in stats:
        np.testing.assert_array_equal(after[name], stats[name])


@pytest.mark.parametrize(
    "name", ["resnet18", "deit_tiny_distilled_patch16_224", pytest.param("unireplknet_a", marks=pytest.mark.slow)]
)
def test_remat_and_unrolling_change_nothing(name):
    value, grads = train_results(twin(name))
    other, other_grads = train_results(twin(name, remat="full", unroll=name == "resnet18"))
    np.testing.assert_allclose(other, value, rtol=1e-5)
    for path, grad in grads.items():
        np.testing.assert_allclose(
            other_grads[path], grad, rtol=2e-4, atol=1e-5 * np.abs(grad).max() + 5e-6, err_msg=path
        )


def test_remat_is_really_in_the_program():
    def jaxpr(config):
        params, stats = random_arrays(config)
        return str(jax.make_jaxpr(jax.grad(lambda p: loss(config, p, stats, images(config))))(params))

    for name in ("resnet18", "vit_tiny_patch16_224", "unireplknet_a"):
        implementation = (
            {"implementation": "naive"} if hasattr(twin(name), "implementation") else {}
        )  # an implementation of an op may recompute by itself
        assert "remat" not in jaxpr(twin(name, **implementation)) and "remat" in jaxpr(
            twin(name, remat="full", **implementation)
        ), name


@pytest.mark.parametrize("name", NAMES)
def test_config_is_hashable_and_full_size_shrink_is_the_identity(name):
    config = registry.entry(name).config
    assert hash(config) == hash(dataclasses.replace(config))
    assert config.shrink() == config
    assert set(config.elastic) >= (
        {"width"} if config.family in ("customised", "hmode", "lenet") else {"width", "depth", "keep"}
    )


def test_patterns_unknown_names_and_unknown_fields():
    assert registry.list_models("unireplknet_*") == fnmatch.filter(NAMES, "unireplknet_*")
    assert len(registry.list_models("unireplknet_*")) == 9
    with pytest.raises(UserError, match="unknown model 'resnet51'; near: resnet5"):
        registry.entry("resnet51")
    with pytest.raises(UserError, match="no field 'num_clases'; near: num_classes"):
        registry.model_config("resnet18", num_clases=3)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_declares_what_its_arrays_show(name):
    config = twin(name)
    shapes = abstract(config)
    assert (mixture_of(config) is not None) == any(key.endswith("/load") for key in shapes.stats)
    assert (config.pathways > 1) == (
        any(key.startswith(config.router) for key in shapes.params) if config.router else False
    )
    assert config.merges == (abstract(config.deployed()).params != shapes.params)


def test_sizes_in_a_list_count_from_1():
    with pytest.raises(UserError, match="model.dims=8; valid: a list of whole numbers from 1 up to 16,777,216"):
        registry.model_config("unireplknet_a", dims=8)
    with pytest.raises(UserError, match=r"model.dims=\(0, 8\); valid: a list of whole numbers from 1"):
        registry.model_config("unireplknet_a", dims=(0, 8))


def test_derived_fields_follow_their_sources():
    assert registry.model_config("unireplknet_a", dims=(8, 16, 24, 32)).mlp_dims == (32, 64, 96, 128)
    assert registry.model_config("resnet50", dims=(32, 64, 128, 256)).inner_dims == (8, 16, 32, 64)
    assert registry.model_config("resnet50", depths=(1, 2, 1, 1)).kept_layers == ((0,), (0, 1), (0,), (0,))
    assert registry.model_config("vit_tiny_patch16_224", dim=64).mlp_dim == 256


EMBEDDED = {
    config.family: config
    for config in map(twin, NAMES)
    if config.embedding is not None and config.family != "customised"
}


def test_classifiers_of_images_have_an_embedding():
    expected = {"lenet", "resnet", "unireplknet", "vgg", "vim", "vit", "vmamba", "wide_resnet"}
    assert EMBEDDED.keys() == expected
    without = {
        name
        for name in NAMES
        if name != "customised" and twin(name).embedding is None and len(twin(name).input_shape()) == 3
    }
    assert without == {name for name in NAMES if name.startswith(("advmoe_", "deit_")) and "distilled" in name} | {
        name for name in NAMES if name.startswith("advmoe_") or name == "hmode"
    }


@pytest.mark.slow_unless("lenet", "vit")
@pytest.mark.parametrize("family", EMBEDDED)
def test_the_outputs_are_the_head_s_of_the_embedding(family):
    config = EMBEDDED[family]
    params, stats = random_arrays(config)
    size, axis = config.embedding
    assert axis in abstract(config).axes["head/kernel"]
    run = lambda method: fast_jit(lambda p, s, x: apply(config, p, s, x, method=method)[0])
    embedded = run("embed")(params, stats, images(config))
    assert embedded.shape == (3, size)
    head = run("head")(params, stats, embedded)
    np.testing.assert_allclose(head, run("__call__")(params, stats, images(config)), rtol=1e-4, atol=1e-5)
