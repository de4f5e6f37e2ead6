"""Routes and routed networks: selection by one-hot scores, the straight-through gradient, one expert, the router, the
counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import registry
from research.modules.axes import Init
from research.modules.routed_conv import THROUGH_GATE, ImageRouter, Route, RoutedConv, choose
from research.modules.state import abstract, apply, merge, split
from research.ops.routed_conv import NUMBERS
from research.train.costs import forward_flops
from tests.models.twins import fast_jit, images, random_arrays, twin

NAMES = ["advmoe_resnet18", "advmoe_vgg16", "advmoe_wrn28_10"]
PLAIN = {"advmoe_resnet18": "resnet18_cifar", "advmoe_vgg16": "vgg16", "advmoe_wrn28_10": "wrn28_10"}


def test_gate_is_exactly_one_and_passes_the_gradient_of_the_chosen_score():
    scores = jnp.asarray([[0.3, -700.0, 0.1], [1e-3, 320.5, 2.0], [5.0, 5.0, 5.0]])
    route = choose(scores, "train")
    np.testing.assert_array_equal(route.experts, [0, 1, 0])
    np.testing.assert_array_equal(route.gate, 1.0)
    weights = jnp.asarray([2.0, 3.0, 4.0])
    grad = jax.grad(lambda s: (choose(s, "train").gate * weights).sum())(scores)
    np.testing.assert_array_equal(grad, [[2, 0, 0], [0, 3, 0], [4, 0, 0]])
    np.testing.assert_array_equal(choose(scores, "eval").gate, 1.0)
    np.testing.assert_array_equal(jax.grad(lambda s: (choose(s, "eval").gate * weights).sum())(scores), 0.0)


@pytest.mark.slow
def test_score_gradient_of_a_layer_is_the_sum_of_cotangent_times_output_and_zero_elsewhere():
    layer = RoutedConv(3, 4, 3, 2, ("stage1/embed", "stage2/embed"), Init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (5, 6, 6, 3))
    scores = jax.random.normal(jax.random.key(2), (5, 2))
    y = layer(x, choose(scores, "train"))
    cotangent = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    grad = jax.grad(lambda s: (layer(x, choose(s, "train")) * cotangent).sum())(scores)
    chosen = np.asarray(scores.argmax(-1))
    np.testing.assert_allclose(grad[np.arange(5), chosen], (cotangent * y).sum((1, 2, 3)), rtol=1e-4)
    np.testing.assert_array_equal(grad[np.arange(5), 1 - chosen], 0)
    by_hand = layer(x, Route(scores.argmax(-1), jnp.ones(5)))
    np.testing.assert_array_equal(y, by_hand)


def test_one_hot_scores_select_a_group_of_the_one_convolution_bit_for_bit():
    layer = RoutedConv(
        3, 4, 3, 3, ("stage1/embed", "stage2/embed"), Init(jax.random.key(0)), implementation="all", stride=2
    )
    x, kernel = jax.random.normal(jax.random.key(1), (5, 6, 6, 3)), layer.kernel[...]
    whole = jax.lax.conv_general_dilated(
        x, kernel.reshape(3, 3, 3, 12), (2, 2), ((1, 1), (1, 1)), dimension_numbers=NUMBERS
    )
    for expert in range(3):
        y = layer(x, choose(jnp.tile(jax.nn.one_hot(expert, 3), (5, 1)), "train"))
        np.testing.assert_array_equal(y, whole[..., 4 * expert : 4 * expert + 4])


def group(config, params, expert):
    """The arrays of the plain network whose routed kernels are those of one expert."""
    plain = {}
    for name, value in params.items():
        if not name.startswith(config.router):
            axes = abstract(config).axes[name]
            plain[name] = np.take(np.asarray(value), expert, axes.index("experts")) if "experts" in axes else value
    return plain


@pytest.mark.parametrize("name", NAMES)
def test_one_hot_scores_give_the_plain_network_with_that_group_s_weights(name):
    config = twin(name)
    params, stats = random_arrays(config)
    x = images(config, 4)
    fields = {
        k: v
        for k, v in registry.entry(name).tiny.items()
        if k not in ("num_experts", "router_dims", "router_depths", "implementation")
    }
    plain = registry.model_config(PLAIN[name], **fields)
    own = {k: v for k, v in stats.items() if not k.startswith(config.router)}
    assert set(abstract(plain).params) == set(group(config, params, 0)) and set(abstract(plain).stats) == set(own)
    for expert in (0, 2):
        scores = jnp.tile(jax.nn.one_hot(expert, 3), (4, 1))
        routed = fast_jit(lambda p, s, x, z: apply(config, p, s, x, z, method="on_path", mode="eval")[0])(
            params, stats, x, scores
        )
        alone = fast_jit(lambda p, s, x: apply(plain, p, s, x, mode="eval")[0])(group(config, params, expert), own, x)
        np.testing.assert_allclose(routed, alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())


@pytest.mark.slow
def test_an_attack_sees_the_gradient_of_the_pathway_and_training_that_of_the_gate_too():
    """In eval mode no gradient of x goes through scores, on which the output does not depend; through the gate it hid
    weak networks."""
    config = twin("advmoe_resnet18")
    params, stats = random_arrays(config)
    x = images(config, 4)

    def gradient(method, mode, *more):
        total = lambda x, *more: apply(config, params, stats, x, *more, method=method, mode=mode)[0].sum()
        return np.asarray(fast_jit(jax.grad(total))(x, *more))

    scores = fast_jit(lambda x: apply(config, params, stats, x, method="scores", mode="eval")[0])(x)
    along = gradient("on_path", "eval", scores)
    np.testing.assert_allclose(gradient("__call__", "eval"), along, rtol=1e-5, atol=1e-5 * np.abs(along).max())
    assert not np.allclose(gradient("__call__", "train"), gradient("on_path", "train", scores), rtol=0.1)


def test_through_gate_is_eval_mode_but_for_the_gradient_of_the_gate():
    config = twin("advmoe_resnet18")
    params, stats = random_arrays(config)
    x = images(config, 4)

    def run(mode):
        def total(x):
            outputs, moved = apply(config, params, stats, x, mode=mode)
            return outputs.sum(), (outputs, moved)

        return jax.tree.map(np.asarray, fast_jit(jax.grad(total, has_aux=True))(x))

    plain, (expected, _) = run("eval")
    gated, (outputs, moved) = run(THROUGH_GATE)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    assert all(np.array_equal(moved[name], stats[name]) for name in stats)
    assert not np.allclose(plain, gated, rtol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_one_expert_is_the_plain_network(name):
    config = dataclasses.replace(twin(name), num_experts=1)
    plain = dataclasses.replace(config, num_experts=0)
    params, stats = random_arrays(config)
    assert (
        not [k for k in params if k.startswith(config.router)]
        and abstract(config).num_params() == abstract(plain).num_params()
    )
    squeezed = {k: v.reshape(abstract(plain).params[k].shape) for k, v in params.items()}
    for mode in ("eval", "train"):
        ours = fast_jit(lambda p, s, x, mode=mode: apply(config, p, s, x, mode=mode)[0])(params, stats, images(config))
        theirs = fast_jit(lambda p, s, x, mode=mode: apply(plain, p, s, x, mode=mode)[0])(
            squeezed, stats, images(config)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.slow
def test_router_is_resnet20_and_scores_stay_float32():
    init = Init(jax.random.key(0))
    router = jax.eval_shape(lambda: split(ImageRouter(3, (16, 32, 64), (3, 3, 3), 2, init))[1])
    assert sum(v.size for v in router.values()) == 269_202
    config = twin("advmoe_resnet18")
    params, stats = random_arrays(config)
    low = {k: v.astype(jnp.bfloat16) for k, v in params.items()}
    scores, _ = apply(config, low, stats, images(config).astype(jnp.bfloat16), method="scores")
    assert scores.dtype == jnp.float32 and scores.shape == (3, 3)


@pytest.mark.slow
def test_shortcut_of_the_router_pads_on_both_sides():
    module = ImageRouter(1, (2, 6), (1, 1), 2, Init(jax.random.key(0)))
    graph, params, stats, _ = split(module)
    block = merge(graph, {k: jnp.zeros_like(v) for k, v in params.items()}, stats).blocks[1]
    x = jnp.arange(1.0, 33).reshape(1, 4, 4, 2)
    y = block(x, "eval")
    np.testing.assert_array_equal(y[..., 2:4], x[:, ::2, ::2])
    assert not np.asarray(y[..., [0, 1, 4, 5]]).any()


@pytest.mark.parametrize(
    "name, backbone, path, macs",
    [
        ("advmoe_resnet18", 5_565_450, 2_809_866, 192.3),
        ("advmoe_vgg16", 7_690_218, 4_013_034, 119.6),
        ("advmoe_wrn28_10", 18_239_602, 9_126_002, 1351.5),
    ],
)
def test_published_counts_and_the_flops_of_one_path(name, backbone, path, macs):
    config = registry.entry(name).config
    shapes = abstract(config)
    router = sum(v.size for k, v in shapes.params.items() if k.startswith(config.router))
    assert router == 269_202 and shapes.num_params() - router == backbone
    assert abstract(config.shrink(experts=1)).num_params() == path
    assert forward_flops(config) / 2e6 == pytest.approx(macs, abs=0.06)


def test_widths_of_the_small_dense_baselines():
    assert abstract(registry.model_config("resnet18_cifar", dims=(32, 64, 128, 256))).num_params() == 2_797_610
    assert abstract(registry.model_config("vgg16", dims=(32, 64, 128, 256, 256))).num_params() == 4_013_034
