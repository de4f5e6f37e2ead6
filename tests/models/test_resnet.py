"""ResNet against a naive numpy twin, pixel by pixel; stems, strides, initial values, mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import registry
from research.models.resnet import ResNetConfig, max_pool
from research.modules.state import abstract, apply, initialize
from tests.models.twins import fast_jit, images, random_arrays


def naive_conv(x, kernel, stride):
    """Cross-correlation of one map [H, W, I], zero padding of half the kernel's size on every side."""
    size = kernel.shape[0]
    padded = np.pad(x, ((size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    height, width = ((n + 2 * (size // 2) - size) // stride + 1 for n in x.shape[:2])
    y = np.zeros((height, width, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            patch = padded[i * stride : i * stride + size, j * stride : j * stride + size]
            y[i, j] = np.tensordot(patch, kernel, 3)
    return y


def naive_pool(x):
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    size = [(n - 1) // 2 + 1 for n in x.shape[:2]]
    return np.array(
        [[padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((0, 1)) for j in range(size[1])] for i in range(size[0])]
    )


def naive_unit(arrays, prefix, x, stride=1):
    """Convolution and batch norm under running moments; stacked arrays hold one layer."""
    get = lambda name, ndim: np.asarray(arrays[f"{prefix}/{name}"]).reshape(arrays[f"{prefix}/{name}"].shape[-ndim:])
    y = naive_conv(x, get("conv/kernel", 4), stride)
    return (y - get("norm/mean", 1)) / np.sqrt(get("norm/var", 1) + 1e-5) * get("norm/scale", 1) + get("norm/bias", 1)


def naive_block(arrays, prefix, x, strides):
    y = x
    for i, stride in enumerate(strides):
        y = naive_unit(arrays, f"{prefix}/convs/{i}", np.maximum(y, 0) if i else y, stride)
    shortcut = (
        naive_unit(arrays, f"{prefix}/shortcut", x, max(strides)) if f"{prefix}/shortcut/conv/kernel" in arrays else x
    )
    return np.maximum(shortcut + y, 0)


@pytest.mark.parametrize(
    ("block", "strides", "stem"),
    [("bottleneck", (1, 2, 1), "imagenet"), ("basic", (2, 1), "imagenet"), ("basic", (2, 1), "medium")],
)
def test_agrees_with_the_naive_twin_at_an_odd_size(block, strides, stem):
    config = ResNetConfig(block=block, depths=(1, 2), dims=(8, 12), stem=stem, num_classes=5, image_size=13)
    with jax.enable_x64(True):
        params, stats = random_arrays(config, dtype=np.float64)
        x = images(config, 1, dtype=np.float64)
        outs, _ = fast_jit(functools.partial(apply, config, method="features"))(params, stats, x)
        logits, _ = fast_jit(functools.partial(apply, config))(params, stats, x)
        arrays = {k: np.asarray(v) for k, v in {**params, **stats}.items()}
    y = np.maximum(naive_unit(arrays, "stem", np.asarray(x[0]), 2), 0)
    y = naive_pool(y) if stem == "imagenet" else y
    expected = [y]
    one = (1,) * len(strides)
    for prefix, s in (("stages/0/block0", one), ("stages/1/block0", strides), ("stages/1/blocks/layer", one)):
        y = naive_block(arrays, prefix, y, s)
        expected.append(y)
    for ours, naive in zip(outs, [expected[0], expected[1], expected[3]], strict=True):
        np.testing.assert_allclose(ours[0], naive, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        logits[0], expected[-1].mean((0, 1)) @ arrays["head/kernel"] + arrays["head/bias"], rtol=0, atol=1e-12
    )


def test_max_pool_pads_with_minus_infinity_and_passes_gradients():
    x = -1 - jnp.asarray(np.random.default_rng(0).random((1, 5, 4, 2)), jnp.float32)
    np.testing.assert_array_equal(max_pool(x)[0], naive_pool(np.asarray(x[0])))
    grad = jax.jit(jax.grad(lambda x: max_pool(x).sum()))(x)
    assert float(grad.sum()) == 3 * 2 * 2


def test_training_step_of_the_statistics_and_calibration():
    config = ResNetConfig(depths=(1,), dims=(8,), stem="small", num_classes=5, image_size=6)
    params, stats = random_arrays(config)
    x = images(config, 4)
    stem = np.stack(
        [naive_conv(np.asarray(i, np.float64), np.asarray(params["stem/conv/kernel"], np.float64), 1) for i in x]
    )
    mean, var = stem.mean((0, 1, 2)), stem.var((0, 1, 2))
    for mode, keep in (("train", 0.9), ("calibrate", 0.0)):
        new = fast_jit(functools.partial(apply, config, mode=mode))(params, stats, x)[1]
        np.testing.assert_allclose(
            new["stem/norm/mean"], keep * stats["stem/norm/mean"] + (1 - keep) * mean, rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            new["stem/norm/var"], keep * stats["stem/norm/var"] + (1 - keep) * var, rtol=1e-4, atol=1e-5
        )
    train = fast_jit(functools.partial(apply, config, mode="calibrate"))(params, stats, x)
    again = fast_jit(functools.partial(apply, config, mode="eval"))(params, train[1], x)[0]
    np.testing.assert_allclose(again, train[0], rtol=1e-4, atol=1e-4)


def test_statistics_given_as_numpy_arrays_are_not_written_to():
    config = ResNetConfig(depths=(1,), dims=(8,), stem="small", num_classes=5, image_size=6)
    params, stats = ({k: np.array(v) for k, v in group.items()} for group in random_arrays(config))
    before = {k: v.copy() for k, v in stats.items()}
    apply(config, params, stats, images(config), mode="train")
    for name in stats:
        np.testing.assert_array_equal(stats[name], before[name])


def test_initial_values():
    config = ResNetConfig(
        block="bottleneck",
        depths=(1,),
        dims=(256,),
        num_classes=10,
        stem="small",
        image_size=32,
        zero_init_residual=True,
    )
    params, _ = fast_jit(functools.partial(initialize, config))(jax.random.key(0))
    kernel = params["stages/0/block0/convs/1/conv/kernel"]
    assert float(kernel.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert (params["stages/0/block0/convs/2/norm/scale"] == 0).all() and (
        params["stages/0/block0/shortcut/norm/scale"] == 1
    ).all()
    assert np.abs(params["head/kernel"]).max() <= 1 / 16 and float(params["head/kernel"].std()) == pytest.approx(
        1 / 16 / 3**0.5, rel=0.05
    )
    plain, _ = fast_jit(functools.partial(initialize, ResNetConfig(depths=(1,), dims=(8,))))(jax.random.key(0))
    assert (plain["stages/0/block0/convs/1/norm/scale"] == 1).all()


def test_coupling_and_shapes():
    shapes = abstract(registry.entry("resnet50").config)
    assert shapes.axes["stem/conv/kernel"] == ("window_h", "window_w", "image", "stem")
    assert shapes.axes["stages/1/block0/shortcut/conv/kernel"][2:] == ("stage1/embed", "stage2/embed")
    assert shapes.axes["stages/1/blocks/layer/convs/1/conv/kernel"] == (
        "stage2/layers", "window_h", "window_w", "stage2/layer/first/bottleneck",
        "stage2/layer/second/bottleneck")  # fmt: skip
    assert shapes.params["stages/2/blocks/layer/convs/1/conv/kernel"].shape == (5, 3, 3, 256, 256)
    basic = abstract(registry.entry("resnet18").config)
    assert (
        basic.axes["stem/conv/kernel"][-1] == "stage1/embed"
        and "stages/0/block0/shortcut/conv/kernel" not in basic.params
    )
    config = registry.entry("resnet50").config
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    outs, _ = jax.eval_shape(functools.partial(apply, config, method="features"), shapes.params, shapes.stats, x)
    assert [o.shape[1:] for o in outs] == [(56, 56, 64), (56, 56, 256), (28, 28, 512), (14, 14, 1024), (7, 7, 2048)]


def test_a_stem_of_its_own_width_is_projected_and_stays_so():
    config = registry.model_config("resnet18_cifar", dims=(8, 16, 32, 64), stem_dim=12)
    assert abstract(config).axes["stages/0/block0/shortcut/conv/kernel"][2:] == ("stem", "stage1/embed")
    assert config.shrink(width=0.9).stem_dim == 12
    with pytest.raises(UserError, match=r"width=0.1 gives stem and stage 1 equally many channels \(4\)"):
        config.shrink(width=0.1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"block": "wide"}, "unknown block 'wide'; valid: basic, bottleneck"),
        ({"stem": "patch"}, "unknown stem 'patch'; valid: imagenet, medium, small"),
        ({"depths": (1, 1, 1)}, "need one entry per stage"),
        ({"depths": (1, 0, 1, 1)}, "valid: a list of whole numbers from 1"),
        ({"image_size": 16}, "smaller than the total stride 32; use stem='small'"),
        ({"num_experts": -1}, "num_experts=-1; valid: a whole number from 0"),
        ({"router_dims": (8, 16)}, "need one whole number from 1 per stage"),
        ({"router_dims": (8, 4, 16)}, "must not fall"),
        ({"implementation": "fast"}, "routed_conv: implementation is 'fast'"),
    ],
)
def test_bad_configs_are_refused_in_one_line(bad, message):
    with pytest.raises(UserError, match=message) as error:
        registry.model_config("resnet18", **bad)
    assert "\n" not in str(error.value)
