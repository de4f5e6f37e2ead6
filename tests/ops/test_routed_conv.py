"""The routed convolution: every implementation against the loop over images in numpy's sense, in outputs and gradients;
mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.routed_conv import IMPLEMENTATIONS, routed_conv
from tests.models.test_resnet import naive_conv
from tests.models.twins import fast_jit
from tests.ops.compare import assert_agree, assert_lowers_everywhere


def draw(batch=6, side=(5, 4), inputs=3, experts=3, outputs=2, window=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, *side, inputs)).astype(np.float32)
    kernel = rng.normal(size=(window, window, inputs, experts, outputs)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(rng.integers(0, experts, batch), jnp.int32)


def both(x, kernel, chosen, dy, **options):
    y, vjp = jax.vjp(lambda x, kernel: routed_conv(x, kernel, chosen, **options), x, kernel)
    return y, vjp(dy)


def test_naive_is_the_convolution_with_the_kernel_of_each_image_s_expert():
    x, kernel, chosen = draw()
    expected = np.stack(
        [naive_conv(np.asarray(i), np.asarray(kernel[..., e, :]), 2) for i, e in zip(x, chosen, strict=True)]
    )
    assert len(set(chosen.tolist())) > 1
    assert_agree(routed_conv(x, kernel, chosen, stride=2, implementation="naive"), expected, 1e-6)


@pytest.mark.slow_unless(
    "{'experts': 1}-each",
    "{'side': (2, 2), 'batch': 5, 'experts': 4}-auto",
    "{'side': (2, 2), 'batch': 5, 'experts': 4}-grouped",
    "{'side': (2, 2), 'batch': 5, 'experts': 4}-matrix",
    "{'window': 1}-all",
    "{}-matrix",
)
@pytest.mark.parametrize(
    "implementation", [implementation for implementation in IMPLEMENTATIONS if implementation != "naive"] + ["auto"]
)
@pytest.mark.parametrize(
    "shape", [{}, {"window": 1}, {"experts": 1}, {"side": (2, 2), "batch": 5, "experts": 4}], ids=str
)
def test_implementations_agree_with_the_naive_one_in_outputs_and_gradients(implementation, shape):
    x, kernel, chosen = draw(**shape)
    for stride in (1, 2):
        y = routed_conv(x, kernel, chosen, stride=stride, implementation="naive")
        dy = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        ours, naive = (
            fast_jit(functools.partial(both, stride=stride, implementation=f))(x, kernel, chosen, dy)
            for f in (implementation, "naive")
        )
        assert_agree(ours, naive, 1e-5)


@pytest.mark.slow_unless("all", "each", "matrix", "naive")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_expert_without_images_gets_a_zero_gradient_and_may_hold_anything(implementation):
    x, kernel, _ = draw()
    chosen = jnp.full(6, 1, jnp.int32)
    y = routed_conv(x, kernel, chosen, implementation=implementation)
    grad = jax.grad(lambda kernel: (routed_conv(x, kernel, chosen, implementation=implementation) ** 2).sum())(kernel)
    assert not np.asarray(grad[..., [0, 2], :]).any() and np.asarray(grad[..., 1, :]).any()
    broken = kernel.at[..., 2, :].set(jnp.nan)
    np.testing.assert_array_equal(routed_conv(x, broken, chosen, implementation=implementation), y)


def test_lowers_for_accelerators():
    x, kernel, chosen = draw()
    assert_lowers_everywhere(lambda x, kernel: routed_conv(x, kernel, chosen), x, kernel)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"implementation": "fast"},
            "implementation is 'fast'; expected one of auto, cpu, naive, all, each, matrix, grouped",
        ),
        ({"experts": jnp.zeros(5, jnp.int32)}, r"experts has shape \(5,\)"),
        ({"kernel": jnp.zeros((2, 2, 3, 3, 2))}, "windows 2x2; expected odd sides"),
    ],
)
def test_mistakes(change, message):
    x, kernel, chosen = draw()
    arguments = {"x": x, "kernel": kernel, "experts": chosen, **change}
    with pytest.raises(ValueError, match=message):
        routed_conv(**arguments)
