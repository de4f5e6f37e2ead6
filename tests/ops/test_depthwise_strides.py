"""2-D depthwise convolution beyond stride 1 and SAME: even kernels, strides, explicit padding, multipliers, leading
axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.ops.depthwise import depthwise_conv2d, depthwise_conv2d_multi
from tests.ops.compare import draw
from tests.ops.test_depthwise import FAST_IMPLEMENTATIONS, agree

# (B, H, W, C), (Kh, Kw), M, options
CASES = [
    ((2, 7, 6, 3), (2, 4), 1, {}),  # even: one zero more at the high end
    ((1, 13, 11, 2), (3, 3), 2, {"stride": 2}),
    ((2, 12, 9, 2), (6, 5), 1, {"stride": (3, 2), "dilation": (1, 2)}),
    ((1, 9, 8, 2), (3, 2), 3, {"padding": "VALID", "dilation": 2}),
    ((1, 5, 7, 1), (4, 3), 1, {"padding": ((9, 0), (0, 6)), "stride": (2, 1)}),  # more padding than the kernel reaches
    ((1, 63, 5, 2), (63, 1), 1, {}),
    ((1, 71, 37, 1), (8, 5), 1, {"padding": "VALID"}),  # tiles of the Toeplitz implementation
    ((2, 16, 16, 2), (4, 4), 1, {"stride": 4, "padding": "VALID"}),  # patches
    ((1, 6, 5, 2), (2, 2), 1, {"stride": 7}),  # a stride beyond the map
    # Blocks of the shift implementation's weight gradient, with rows left over.
    pytest.param((5, 29, 23, 96), (3, 3), 1, {}, marks=pytest.mark.slow),
]


def _direct(x, kernel, stride, dilation, padding):
    """The definition in float64: kernel [Kh, Kw, C, M], all options pairs."""
    batch, *extent, channels = x.shape
    outs, lows, highs = [], [], []
    for e, k, s, d, p in zip(extent, kernel.shape[:2], stride, dilation, padding, strict=True):
        span = d * (k - 1) + 1
        if p == "SAME":
            total = max((-(-e // s) - 1) * s + span - e, 0)
            p = total // 2, total - total // 2
        low, high = (0, 0) if p == "VALID" else p
        lows, highs, outs = [*lows, low], [*highs, high], [*outs, (e + low + high - span) // s + 1]
    padded = np.pad(x.astype(np.float64), ((0, 0), (lows[0], highs[0]), (lows[1], highs[1]), (0, 0)))
    y = np.zeros((batch, *outs, channels, kernel.shape[3]))
    for i, j in np.ndindex(*kernel.shape[:2]):
        rows = i * dilation[0] + stride[0] * np.arange(outs[0])
        columns = j * dilation[1] + stride[1] * np.arange(outs[1])
        y += padded[:, rows][:, :, columns][..., None] * kernel[i, j]
    return y.reshape(batch, *outs, -1)


def _pairs(options):
    pair = lambda v: (v, v) if isinstance(v, (int, str)) else v
    return {
        name: pair(options.get(name, default))
        for name, default in (("stride", 1), ("dilation", 1), ("padding", "SAME"))
    }


def _kernel(size, channels, multiplier):
    return draw((*size, channels, multiplier) if multiplier > 1 else (*size, channels), 1)


def _outputs_and_grads(x, kernel, g, implementation, options):
    y, vjp = jax.vjp(lambda x, k: depthwise_conv2d(x, k, implementation=implementation, **options), x, kernel)
    return y, vjp(g)


def _jitted(implementation, options):
    return jax.jit(functools.partial(_outputs_and_grads, implementation=implementation, options=options))


@pytest.mark.parametrize("shape, size, multiplier, options", CASES)
def test_implementations_agree_with_naive_and_naive_with_the_definition(shape, size, multiplier, options):
    x, kernel = draw(shape, 0), _kernel(size, shape[-1], multiplier)
    y = _direct(x, kernel.reshape(*size, shape[-1], multiplier), **_pairs(options)).astype(np.float32)
    g = draw(y.shape, 2)
    expected = _jitted("naive", options)(x, kernel, g)
    agree(expected[0], y, 1e-5)
    for implementation in FAST_IMPLEMENTATIONS:
        agree(_jitted(implementation, options)(x, kernel, g), expected, 1e-5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.sampled_from(["SAME", ((22, 0), (3, 21))]),
    multiplier=st.integers(1, 2),
    implementation=st.sampled_from(FAST_IMPLEMENTATIONS),
)
def test_any_geometry_agrees_with_the_definition(
    height, width, size, stride, dilation, padding, multiplier, implementation
):
    x, kernel, options = (
        draw((2, height, width, 2), 0),
        _kernel(size, 2, multiplier),
        dict(stride=stride, dilation=dilation),
    )
    expected = _direct(x, kernel.reshape(*size, 2, multiplier), **_pairs(options | {"padding": padding})).astype(
        np.float32
    )
    y = jax.jit(functools.partial(depthwise_conv2d, padding=padding, implementation=implementation, **options))(
        x, kernel
    )
    np.testing.assert_allclose(y, expected, atol=1e-5 * max(np.max(np.abs(expected)), 1.0), rtol=0)


@pytest.mark.parametrize("implementation", FAST_IMPLEMENTATIONS)
def test_leading_axes_are_kept(implementation):
    x, kernel = draw((2, 3, 5, 6, 2), 0), draw((3, 2, 2), 1)
    expected = _direct(x.reshape(6, 5, 6, 2), kernel[..., None], (2, 1), (1, 1), ("SAME", "SAME")).astype(np.float32)
    agree(
        depthwise_conv2d(x, kernel, stride=(2, 1), implementation=implementation), expected.reshape(2, 3, 3, 6, 2), 1e-5
    )
    agree(depthwise_conv2d(x[0, 0], kernel, stride=(2, 1), implementation=implementation), expected[0], 1e-5)


@pytest.mark.parametrize("implementation", FAST_IMPLEMENTATIONS)
@pytest.mark.parametrize("stride, padding", [(2, "SAME"), (1, "VALID")])
def test_multi_of_other_sizes_of_output_agrees_with_singles(implementation, stride, padding):
    x, kernels, dilations = draw((2, 19, 15, 2), 0), tuple(draw((k, k, 2, 2), k) for k in (5, 2, 3)), (1, 3, (2, 1))

    def total(multi):
        def loss(x, kernels):
            outs = multi(x, kernels)
            return sum(jnp.sum(y * draw(y.shape, 7 + i)) for i, y in enumerate(outs)), outs

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    options = dict(stride=stride, padding=padding)
    actual = total(lambda x, ks: depthwise_conv2d_multi(x, ks, dilations, implementation=implementation, **options))(
        x, kernels
    )
    singles = lambda x, ks: tuple(
        depthwise_conv2d(x, k, dilation=d, implementation="naive", **options)
        for k, d in zip(ks, dilations, strict=True)
    )
    agree(actual, total(singles)(x, kernels), 1e-5)


@pytest.mark.parametrize("implementation", ["auto", "shift", "toeplitz", "dft"])
def test_strides_and_multipliers_in_bfloat16_and_float64(implementation):
    options = {"stride": 2}
    x, kernel, g = draw((2, 9, 8, 2), 0), draw((4, 3, 2, 2), 1), draw((2, 5, 4, 4), 2)
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (x, kernel, g))
    expected = _jitted("naive", options)(*jax.tree.map(lambda a: a.astype(jnp.float32), low))
    actual = _jitted(implementation, options)(*low)
    assert {a.dtype for a in jax.tree.leaves(actual)} == {jnp.dtype(jnp.bfloat16)}
    agree(jax.tree.map(lambda a: a.astype(jnp.float32), actual), expected, 2e-2)
    with jax.enable_x64(True):
        operands = [a.astype(np.float64) for a in (x, kernel, g)]
        agree(_jitted(implementation, options)(*operands), _jitted("naive", options)(*operands), 1e-10)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_to_lax_convolutions_elsewhere(platform):
    x, kernel, g = jnp.zeros((2, 9, 8, 3)), jnp.zeros((4, 3, 3, 2)), jnp.zeros((2, 5, 4, 6))
    program = jax.export.export(_jitted("auto", {"stride": 2}), platforms=[platform])(x, kernel, g).mlir_module()
    assert program.count("stablehlo.convolution") == 3 and "stablehlo.while" not in program
