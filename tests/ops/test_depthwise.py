"""Every implementation of the depthwise convolution against the reference implementation, in outputs and both
gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.ops.depthwise import (
    IMPLEMENTATIONS,
    centre_pad_kernel,
    depthwise_conv2d,
    depthwise_conv2d_multi,
    dilate_kernel,
)
from tests.ops.compare import assert_agree, draw

FAST_IMPLEMENTATIONS = (
    "auto",
    "cpu",
    *(implementation for implementation in IMPLEMENTATIONS if implementation != "naive"),
)
BRANCHES = ((13, 13), 1), ((5, 5), 1), ((7, 7), 2), ((3, 3), 3), ((3, 3), 4), ((3, 3), 5)

# (B, H, W, C), (Kh, Kw), dilation
CASES = [
    ((2, 7, 5, 3), (3, 3), 1),
    ((1, 4, 6, 1), (13, 7), 1),  # kernel larger than the map
    ((3, 5, 5, 4), (5, 3), 3),
    ((2, 1, 3, 2), (3, 5), 2),  # a map of one row
    ((2, 6, 7, 3), (7, 7), 5),
    ((2, 3, 2, 2), (31, 31), 1),
    ((2, 14, 11, 5), (13, 13), 1),  # beyond the Toeplitz maps of the table
    ((2, 17, 12, 1), (1, 1), 4),
    ((2, 20, 33, 32), (3, 3), 2),  # the accumulating weight gradient of the shift implementation
]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _outputs_and_grads(x, kernels, grads, dilations, implementation):
    outputs, vjp = jax.vjp(
        lambda x, ks: depthwise_conv2d_multi(x, ks, dilations, implementation=implementation), x, kernels
    )
    return outputs, vjp(grads)


agree = functools.partial(assert_agree, dtypes=True)


def _operands(shape, sizes, dtype=np.float32):
    kernels = tuple(draw((*size, shape[-1]), 10 + i, dtype) for i, size in enumerate(sizes))
    grads = tuple(draw(shape, 30 + i, dtype) for i in range(len(sizes)))
    return draw(shape, 0, dtype), kernels, grads


def _direct(x, kernel, dilation):
    """The definition, with loops, in float64."""
    _, height, width, _ = x.shape
    ph, pw = (dilation * (k - 1) // 2 for k in kernel.shape[:2])
    padded = np.pad(x.astype(np.float64), ((0, 0), (ph, ph), (pw, pw), (0, 0)))
    y = np.zeros(x.shape)
    for i, j in np.ndindex(*kernel.shape[:2]):
        y += kernel[i, j] * padded[:, i * dilation : i * dilation + height, j * dilation : j * dilation + width]
    return y


@pytest.mark.parametrize("shape, size, dilation", CASES[:5])
def test_naive_is_the_definition(shape, size, dilation):
    x, (kernel,), _ = _operands(shape, [size])
    y = depthwise_conv2d(x, kernel, dilation=dilation, implementation="naive")
    agree(y, _direct(x, kernel, dilation).astype(np.float32), 1e-5)


@pytest.mark.slow_unless(
    "shape0-size0-1-shift",
    "shape1-size1-1-toeplitz",
    "shape2-size2-3-shift",
    "shape3-size3-2-shift",
    "shape4-size4-5-toeplitz",
    "shape5-size5-1-toeplitz",
    "shape6-size6-1-dft",
    "shape7-size7-4-auto",
    "shape7-size7-4-cpu",
    "shape8-size8-2-shift",
)
@pytest.mark.parametrize("implementation", FAST_IMPLEMENTATIONS)
@pytest.mark.parametrize("shape, size, dilation", CASES)
def test_implementations_agree_with_naive(shape, size, dilation, implementation):
    operands = _operands(shape, [size])
    expected = _outputs_and_grads(*operands, (dilation,), "naive")
    agree(_outputs_and_grads(*operands, (dilation,), implementation), expected, 1e-5)


@pytest.mark.parametrize("implementation", FAST_IMPLEMENTATIONS)
def test_implementations_agree_in_float64(implementation):
    with jax.enable_x64(True):
        for shape, size, dilation in CASES[:3]:
            operands = _operands(shape, [size], np.float64)
            expected = _outputs_and_grads(*operands, (dilation,), "naive")
            assert expected[0][0].dtype == np.float64
            agree(_outputs_and_grads(*operands, (dilation,), implementation), expected, 1e-10)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.integers(1, 4),
    half_h=st.integers(0, 6),
    half_w=st.integers(0, 6),
    dilation=st.integers(1, 5),
    implementation=st.sampled_from(FAST_IMPLEMENTATIONS),
)
def test_any_shape_agrees_with_the_definition(batch, height, width, channels, half_h, half_w, dilation, implementation):
    x, (kernel,), _ = _operands((batch, height, width, channels), [(2 * half_h + 1, 2 * half_w + 1)])
    expected = _direct(x, kernel, dilation).astype(np.float32)
    y = jax.jit(functools.partial(depthwise_conv2d, dilation=dilation, implementation=implementation))(x, kernel)
    np.testing.assert_allclose(y, expected, atol=1e-5 * max(np.max(np.abs(expected)), 1.0), rtol=0)


@pytest.mark.slow_unless("shape0-auto", "shape0-cpu", "shape0-shift", "shape0-toeplitz", "shape1-dft")
@pytest.mark.parametrize("implementation", FAST_IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (2, 15, 14, 2)])
def test_multi_agrees_with_singles(shape, implementation):
    sizes, dilations = zip(*BRANCHES, strict=True)
    x, kernels, grads = _operands(shape, sizes)
    outputs, (dx, dks) = _outputs_and_grads(x, kernels, grads, dilations, implementation)
    singles = [
        _outputs_and_grads(x, (k,), (g,), (d,), "naive") for k, g, d in zip(kernels, grads, dilations, strict=True)
    ]
    agree(outputs, [y for (y,), _ in singles], 1e-5)
    agree(dks, [dk for _, (_, (dk,)) in singles], 1e-5)
    agree(dx, sum(dx_1 for _, (dx_1, _) in singles), 1e-5)


@pytest.mark.parametrize("implementation", ("auto", "cpu", *IMPLEMENTATIONS))
def test_bfloat16_keeps_its_dtype_and_sums_in_float32(implementation):
    x, kernels, grads = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), _operands((2, 9, 7, 3), [(7, 7)]))
    expected = _outputs_and_grads(*jax.tree.map(lambda a: a.astype(jnp.float32), (x, kernels, grads)), (1,), "naive")
    actual = _outputs_and_grads(x, kernels, grads, (1,), implementation)
    assert {a.dtype for a in jax.tree.leaves(actual)} == {jnp.dtype(jnp.bfloat16)}
    agree(jax.tree.map(lambda a: a.astype(jnp.float32), actual), expected, 2.0**-8)


@pytest.mark.parametrize("implementation", ["auto", "shift", "dft"])
def test_vmap_of_grad_agrees_with_a_loop_of_naive(implementation):
    x, kernels = draw((3, 2, 6, 5, 2), 0), draw((3, 3, 3, 2), 1)

    def grad(implementation):
        return jax.grad(
            lambda x, k: jnp.sum(depthwise_conv2d(x, k, dilation=2, implementation=implementation) ** 2), argnums=(0, 1)
        )

    actual = jax.jit(jax.vmap(grad(implementation)))(x, kernels)
    naive = jax.jit(grad("naive"))
    expected = jax.tree.map(lambda *a: jnp.stack(a), *[naive(x[i], kernels[i]) for i in range(3)])
    agree(actual, expected, 1e-5)


@pytest.mark.parametrize("platform, convolutions", [("cpu", 0), ("cuda", 3), ("tpu", 3)])
def test_auto_follows_the_platform_of_the_program(platform, convolutions):
    x, kernels, grads = _operands((2, 7, 7, 3), [(5, 5)])
    traced = _outputs_and_grads.trace(x, kernels, grads, (1,), "auto")
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.convolution") == convolutions


def test_dilate_and_centre_pad_place_every_tap():
    kernel = draw((2, 3, 5, 4), 0)
    dilated = dilate_kernel(kernel, 3)
    assert dilated.shape == (2, 7, 13, 4) and np.sum(dilated != 0) == kernel.size
    np.testing.assert_array_equal(dilated[:, ::3, ::3], kernel)
    padded = centre_pad_kernel(kernel, (5, 9))
    assert padded.shape == (2, 5, 9, 4) and np.sum(padded != 0) == kernel.size
    np.testing.assert_array_equal(padded[:, 1:4, 2:7], kernel)
    x = draw((1, 6, 8, 4), 1)
    agree(
        depthwise_conv2d(x, centre_pad_kernel(dilate_kernel(kernel[0], 2), 13), implementation="naive"),
        depthwise_conv2d(x, kernel[0], dilation=2, implementation="naive"),
        1e-5,
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(implementation="fft"),
            "depthwise_conv2d: implementation is 'fft'.*auto, cpu, naive, shift, toeplitz, dft",
        ),
        (dict(size=(64, 3)), r"kernel is \(64, 3\); expected 1 to 63 taps a side"),
        (dict(channels=5), r"kernel has shape \(3, 3, 5\); expected \[Kh Kw C\] = \(3, 3, 3\)"),
        (dict(dilation=0), "dilation is 0; expected an integer of at least 1"),
        (dict(stride=(1, 0)), r"stride is \(1, 0\); expected an integer of at least 1, or two"),
        (dict(padding="CAUSAL"), 'padding is \'CAUSAL\'; expected "SAME", "VALID"'),
        (dict(padding=((0, 1), (-1, 0))), r"padding is \(\(0, 1\), \(-1, 0\)\); expected"),
        (
            dict(padding="VALID", size=(5, 1)),
            r"x is \(1, 4, 4, 3\); expected maps no smaller than the kernel of \(5, 1\)",
        ),
    ],
)
def test_invalid_arguments_name_what_was_expected(arguments, message):
    options = dict(arguments)
    kernel = jnp.zeros((*options.pop("size", (3, 3)), options.pop("channels", 3)))
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(jnp.zeros((1, 4, 4, 3)), kernel, **options)


def test_multi_wants_one_dilation_per_kernel():
    with pytest.raises(ValueError, match="2 kernels with 1 dilations; expected one dilation per kernel"):
        depthwise_conv2d_multi(jnp.zeros((1, 4, 4, 3)), [jnp.zeros((3, 3, 3))] * 2, [1])
    with pytest.raises(ValueError, match="at least one"):
        depthwise_conv2d_multi(jnp.zeros((1, 4, 4, 3)), [], [])


def test_a_kernel_off_the_centre_is_refused():
    with pytest.raises(
        ValueError, match=r"size is \(4, 4\); expected \(3, 3\), the taps of the kernel, plus an even number"
    ):
        centre_pad_kernel(jnp.zeros((3, 3, 1)), 4)
