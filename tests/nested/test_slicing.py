"""Slices of a full network against numpy, and a sub-network in place against the extracted one, for every family."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.models import registry
from research.modules.axes import Kind, role
from research.modules.state import Abstract, abstract
from research.nested.slicing import CUTS, axis_indices, extract, slice_like
from tests.models.twins import fast_jit, images, loss, loss_and_logits, random_arrays, train_results, twin

POINTS = {
    "unireplknet_a": {"width": 0.5, "depth": 0.5, "ffn": 0.5, "kernel": 7, "keep": "even"},
    "resnet18": {"width": (1.0, 0.5, 0.75, 0.5), "depth": (1, 2, 1, 2), "inner": 0.5, "keep": "even"},
    "resnet50": {"width": 0.5, "depth": 0.5, "inner": 0.5},
    "advmoe_resnet18": {"width": (1.0, 0.5, 0.75, 0.5), "depth": (1, 2, 1, 2), "experts": 2, "keep": "even"},
    "advmoe_vgg16": {"width": 0.5, "depth": (1, 2, 2), "ffn": 0.5, "experts": 1},
    "advmoe_wrn28_10": {"width": 0.5, "depth": (1, 2, 1), "inner": 0.5, "experts": 2},
    "deit_tiny_distilled_patch16_224": {"width": 0.5, "depth": 3, "ffn": 0.75, "heads": 3, "keep": "even"},
    "vim_tiny_patch16_224": {"width": 0.5, "depth": 3, "state": 0.5, "keep": "even"},
    "vmamba_tiny_s1l8": {"width": 0.5, "depth": (1, 2), "ffn": 0.5, "keep": "even"},
    "hmode": {"width": 0.5},
    "lenet5": {"width": 0.5},
    "hybrid_small": {"width": 0.5, "depth": 0.5, "ffn": 0.5, "state": 0.5, "heads": 1},
    "domain_encoder_small": {"width": 0.5, "depth": 1, "ffn": 0.5, "heads": 1},
    "gla_small": {"width": 0.5, "depth": 0.5, "ffn": 0.5, "heads": 1},
    "customised": {"width": 0.5, "rank": 0.5},
}
"""One sub-network per kind of network, cut in every dimension that it has."""


@functools.lru_cache
def pair(name):
    full = twin(name)
    return full, full.shrink(**POINTS[name])


def test_every_family_is_covered():
    assert {registry.entry(n).config.family for n in POINTS} == {
        registry.entry(n).config.family for n in registry.list_models()
    }


@functools.lru_cache
def results(name):
    """Returns loss and gradients (in place: with respect to the full network's parameters; extracted) and logits."""
    full, small = pair(name)
    params, stats = random_arrays(full)
    shapes, x = (abstract(full), abstract(small)), images(full)

    def in_place(params, stats, x):
        cut = lambda arrays: slice_like(arrays, *shapes)
        return loss_and_logits(small, cut(params), cut(stats), x)

    (value, logits), grads = fast_jit(jax.value_and_grad(in_place, has_aux=True))(params, stats, x)
    own, own_stats = extract(full, small, params, stats)
    alone = functools.partial(loss_and_logits, small)
    (own_value, own_logits), own_grads = fast_jit(jax.value_and_grad(alone, has_aux=True))(own, own_stats, x)
    return (float(value), logits, grads), (float(own_value), own_logits, own_grads)


@pytest.mark.slow_unless("lenet5")
@pytest.mark.parametrize("name", POINTS)
def test_extracted_network_equals_the_one_in_place(name):
    (value, logits, _), (own_value, own_logits, _) = results(name)
    np.testing.assert_allclose(own_value, value, rtol=1e-6)
    np.testing.assert_allclose(own_logits, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.slow_unless("advmoe_vgg16", "gla_small", "lenet5")
@pytest.mark.parametrize("name", POINTS)
def test_gradient_is_zero_outside_the_slice_and_the_extracted_one_inside(name):
    full, small = pair(name)
    (_, _, grads), (_, _, own_grads) = results(name)
    cut = fast_jit(lambda arrays: slice_like(arrays, abstract(full), abstract(small)))
    inside, held = cut(grads), cut({k: jnp.arange(v.size).reshape(v.shape) for k, v in grads.items()})
    outside_values = 0
    for path, grad in grads.items():
        outside = np.ones(grad.size, bool)
        if path in held:
            outside[np.asarray(held[path]).reshape(-1)] = False
            largest = max(np.abs(own_grads[path]).max(), 1e-2)
            np.testing.assert_allclose(inside[path], own_grads[path], rtol=1e-4, atol=1e-5 * largest, err_msg=path)
        np.testing.assert_array_equal(np.asarray(grad).reshape(-1)[outside], 0, err_msg=path)
        outside_values += outside.sum()
    assert outside_values == abstract(full).num_params() - abstract(small).num_params() > 0


@pytest.mark.slow_unless("advmoe_vgg16", "deit_tiny_distilled_patch16_224", "gla_small", "hmode")
@pytest.mark.parametrize("name", POINTS)
def test_full_size_slice_is_the_plain_program(name):
    """The traced programs are the same text, so logits and gradients agree bit for bit."""
    full, _ = pair(name)
    shapes = abstract(full)
    params, stats = shapes.params, shapes.stats
    cut = lambda arrays: slice_like(arrays, shapes, shapes)
    sliced = jax.value_and_grad(lambda p, s, x: loss(full, cut(p), cut(s), x))
    plain = jax.value_and_grad(lambda p, s, x: loss(full, p, s, x))
    text = lambda f: re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(f)(dict(params), dict(stats), images(full))))
    assert text(sliced) == text(plain)


def test_full_size_slice_gives_the_same_bits():
    full, _ = pair("deit_tiny_distilled_patch16_224")
    params, stats = random_arrays(full)
    shapes = abstract(full)
    sliced = jax.value_and_grad(lambda p, s, x: loss(full, slice_like(p, shapes, shapes), s, x))
    value, grads = fast_jit(sliced)(params, stats, images(full))
    plain_value, plain_grads = train_results(full)
    assert float(value) == plain_value
    for path, grad in grads.items():
        np.testing.assert_array_equal(grad, plain_grads[path], err_msg=path)


@pytest.mark.parametrize("name", POINTS)
def test_perturbing_what_lies_outside_changes_no_bit(name):
    """The smaller network's arrays, hence its outputs, hold no bit of what is outside: there everything is NaN."""
    full, small = pair(name)
    cut = fast_jit(lambda arrays: slice_like(arrays, abstract(full), abstract(small)))
    for part, group in zip(("params", "stats"), random_arrays(full), strict=True):
        numbered = {k: jnp.arange(v.size).reshape(v.shape) for k, v in group.items()}
        held = cut(numbered)
        noisy = {}
        for path, value in group.items():
            flat = np.full(value.size, np.nan, np.float32)
            if path in held:
                index = np.asarray(held[path]).reshape(-1)
                flat[index] = np.asarray(value).reshape(-1)[index]
            noisy[path] = flat.reshape(value.shape)
        expected = cut(group)
        for path, value in cut(noisy).items():
            np.testing.assert_array_equal(value, expected[path], err_msg=f"{part} {path}")


LARGE_BUDGET = {"customised": {"budget": 1.0}}
"""Beside a narrow backbone local expert and gate exceed the usual one."""


@pytest.mark.slow_unless("activator_small", "advmoe_vgg16", "customised", "hmode", "lenet5", "vim_base_patch16_224")
@pytest.mark.parametrize("name", registry.list_models())
def test_nested_choices_hold_nested_indices(name):
    """theta(m) is a subset of theta(m') for m <= m', on the real sizes, and the largest holds everything."""
    full = registry.model_config(name, **LARGE_BUDGET.get(name, {}))
    shrink = lambda w, d: full.shrink(width=w, **({"depth": d} if "depth" in full.elastic else {}))
    # A family without depth has some of these twice.
    chain = list(
        dict.fromkeys(shrink(w, d) for w, d in ((0.25, 0.25), (0.5, 0.5), (0.5, 1.0), (0.75, 1.0), (1.0, 1.0)))
    )
    for small, large in itertools.pairwise(chain):
        assert abstract(small).num_params() < abstract(large).num_params()
        for path, target in abstract(small).params.items():
            for i, axis in enumerate(abstract(full).axes[path]):
                whole = abstract(full).params[path].shape[i]
                index = [
                    set(
                        axis_indices(
                            axis, whole, s.params[path].shape[i], abstract(full).kept.get(axis), s.kept.get(axis)
                        )
                    )
                    for s in (abstract(small), abstract(large))
                ]
                assert index[0] <= index[1], (path, axis)
                assert len(index[0]) == target.shape[i]
    assert chain[-1] == full


def test_wrong_pairs_are_refused():
    full, small = pair("resnet18")
    params, _ = random_arrays(full)
    with pytest.raises(ValueError, match="of size 4 cannot be cut .leading. to 8"):
        axis_indices("a/mlp", 4, 8, None, None)
    with pytest.raises(ValueError, match="cannot be cut .whole. to 3"):
        axis_indices("classes", 4, 3, None, None)
    with pytest.raises(ValueError, match="in the smaller network but not in the larger"):
        slice_like(params, abstract(small), abstract(full))
    with pytest.raises(ValueError, match="cannot be cut"):
        slice_like(params, abstract(full), abstract(twin("resnet50")))
    with pytest.raises(ValueError, match=r"layers \[3\] are not in the larger"):
        axis_indices("layers", 3, 1, (0, 1, 2), (3,))
    with pytest.raises(ValueError, match="has no nesting rule"):
        axis_indices("stage1/unheard", 3, 1, None, None)


def fake(axes, shape, kept) -> Abstract:
    return Abstract(
        None, {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, {}, {"w": axes}, kept, {"w": Kind.MATRIX}, frozenset()
    )


@st.composite
def cuts(draw):
    """Returns (axis names, full shape, small shape, kept layers of both, the numpy index along each axis)."""
    axes = draw(st.permutations(["layers", "a/embed", "b/mlp", "kernel_h", "classes"]))[: draw(st.integers(1, 5))]
    full, small, kept, index = [], [], ({}, {}), []
    for axis in axes:
        n = draw(st.integers(1, 7))
        cut = CUTS[role(axis)]
        if cut == "centre":
            n, m = 2 * n - 1, 2 * draw(st.integers(1, n)) - 1
            index.append(np.arange((n - m) // 2, (n - m) // 2 + m))
        elif cut == "kept":
            layers = sorted(draw(st.sets(st.integers(0, 20), min_size=n, max_size=n)))
            chosen = sorted(draw(st.sets(st.sampled_from(layers), min_size=1)))
            kept[0][axis], kept[1][axis] = tuple(layers), tuple(chosen)
            index.append(np.array([layers.index(c) for c in chosen]))
        else:
            m = n if cut == "whole" else draw(st.integers(1, n))
            index.append(np.arange(m))
        full.append(n)
        small.append(len(index[-1]))
    return tuple(axes), tuple(full), tuple(small), kept, index


@settings(max_examples=60, deadline=None)
@given(cuts())
def test_slice_is_numpy_indexing(case):
    axes, full, small, kept, index = case
    x = np.arange(np.prod(full), dtype=np.float32).reshape(full)
    y = slice_like({"w": jnp.asarray(x)}, fake(axes, full, kept[0]), fake(axes, small, kept[1]))["w"]
    np.testing.assert_array_equal(y, x[np.ix_(*index)])


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(parts=st.integers(2, 4), per_part=st.integers(1, 6), data=st.data(), lead=st.integers(1, 3))
def test_shards_take_the_leading_slice_of_each_part(parts, per_part, data, lead):
    n, m = parts * per_part, parts * data.draw(st.integers(1, per_part))
    x = np.arange(lead * n * 2, dtype=np.float32).reshape(lead, n, 2)
    axes = ("classes", "layer/mlp", "a/embed")
    sizes = fake(axes, x.shape, {}), fake(axes, (lead, m, 2), {})
    y = slice_like({"w": jnp.asarray(x)}, *sizes, {"mlp": parts})["w"]
    expected = x.reshape(lead, parts, per_part, 2)[:, :, : m // parts].reshape(lead, m, 2)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(slice_like({"w": jnp.asarray(x)}, *sizes)["w"], x[:, :m])


def test_a_size_that_the_shards_do_not_divide_is_cut_as_one_part():
    x = np.arange(12.0).reshape(12)
    y = slice_like({"w": jnp.asarray(x)}, fake(("mlp",), (12,), {}), fake(("mlp",), (6,), {}), {"mlp": 4})["w"]
    np.testing.assert_array_equal(y, x[:6])


def test_extract_with_shards_equals_slice_with_shards():
    full, small = pair("deit_tiny_distilled_patch16_224")
    params, stats = random_arrays(full)
    shards = {"mlp": 2}
    own, _ = extract(full, small, params, stats, shards)
    hidden = small.mlp_dim // 2
    kernel = np.asarray(params["blocks/layer/mlp/up/kernel"])[list(small.kept_layers)][:, : small.dim]
    half = full.mlp_dim // 2
    expected = np.concatenate([kernel[..., :hidden], kernel[..., half : half + hidden]], -1)
    np.testing.assert_array_equal(own["blocks/layer/mlp/up/kernel"], expected)
