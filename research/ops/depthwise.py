"""Depthwise 2-D convolution, single or several over one input, with the fastest known form for the platform and shape.

XLA:CPU runs a depthwise `lax.conv_general_dilated` at about a hundredth of its matrix rate, and its weight gradient
slower still. The convolution, its input gradient and its weight gradient each get the form that a small table of
measurements names; other platforms keep the lax convolution, which cuDNN and the TPU compiler know. Several dilated
convolutions of one input are the training form of UniRepLKNet's blocks (Ding et al., 2024, arXiv:2311.15599, section 3.1).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from research.ops import depthwise_forms

VALID_FORMS = ("auto", *depthwise_forms.FORMS)
MAX_KERNEL_SIZE = 31


class Choice(NamedTuple):
    """The forms of the three directions."""

    conv: str
    input_grad: str
    weight_grad: str


def choose_cpu(height: int, width: int, sizes: Sequence[tuple[int, int]], dilations: Sequence[int]) -> Choice:
    """The forms for XLA:CPU; measured on two cores, see the table in the tests' folder of results."""
    if height * width <= 100:
        return Choice("toeplitz", "toeplitz", "toeplitz")
    if len(sizes) == 1 and max(sizes[0]) <= 5:
        return Choice("shift", "shift", "shift")
    return Choice("dft", "dft", "dft")


def _conv(form, x, kernels, dilations):
    dtype = _compute_dtype(x)
    outputs = depthwise_forms.FORMS[form].conv(x.astype(dtype), [k.astype(dtype) for k in kernels], dilations)
    return tuple(y.astype(x.dtype) for y in outputs)


def _grads(choice, x, kernels, grads, dilations):
    dtype = _compute_dtype(x)
    x_, kernels_, grads_ = jax.tree.map(lambda a: a.astype(dtype), (x, tuple(kernels), tuple(grads)))
    dx = depthwise_forms.FORMS[choice.input_grad].input_grad(kernels_, grads_, dilations)
    sizes = [k.shape[:2] for k in kernels]
    dks = depthwise_forms.FORMS[choice.weight_grad].weight_grad(x_, grads_, sizes, dilations)
    return dx.astype(x.dtype), tuple(dk.astype(k.dtype) for dk, k in zip(dks, kernels, strict=True))


def _compute_dtype(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _per_platform(form, x, kernels, dilations, function, *operands):
    """Calls function(choice, *operands) with the choice for the platform that the program is compiled for."""
    if form != "auto":
        return function(Choice(form, form, form), *operands)
    choice = choose_cpu(*x.shape[1:3], [k.shape[:2] for k in kernels], dilations)
    naive = Choice("naive", "naive", "naive")
    return lax.platform_dependent(
        *operands, cpu=functools.partial(function, choice), default=functools.partial(function, naive))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernels, dilations, form):
    def conv(choice, x, kernels):
        return _conv(choice.conv, x, kernels, dilations)

    return _per_platform(form, x, kernels, dilations, conv, x, kernels)


def _depthwise_fwd(x, kernels, dilations, form):
    return _depthwise(x, kernels, dilations, form), (x, kernels)


def _depthwise_bwd(dilations, form, residuals, grads):
    x, kernels = residuals

    def both_grads(choice, x, kernels, grads):
        return _grads(choice, x, kernels, grads, dilations)

    return _per_platform(form, x, kernels, dilations, both_grads, x, kernels, grads)


_depthwise.defvjp(_depthwise_fwd, _depthwise_bwd)


def _check(x, kernels, dilations, form):
    if form not in VALID_FORMS:
        raise ValueError(f"form {form!r} of a depthwise convolution is not one of {', '.join(VALID_FORMS)}")
    if len(kernels) != len(dilations) or not kernels:
        raise ValueError(f"{len(kernels)} kernels with {len(dilations)} dilations: give one dilation per kernel, at least one")
    for kernel, dilation in zip(kernels, dilations, strict=True):
        if kernel.ndim != 3 or kernel.shape[-1] != x.shape[-1]:
            raise ValueError(f"kernel of shape {kernel.shape} for an input of shape {x.shape}: give [Kh, Kw, {x.shape[-1]}]")
        if any(k % 2 == 0 or k > MAX_KERNEL_SIZE for k in kernel.shape[:2]):
            raise ValueError(f"kernel of {kernel.shape[0]}x{kernel.shape[1]} taps: give odd sizes from 1 to {MAX_KERNEL_SIZE}")
        if dilation < 1:
            raise ValueError(f"dilation {dilation}: give an integer of at least 1")


def depthwise_conv2d(
    x: Float[Array, "B H W C"], kernel: Float[Array, "Kh Kw C"], *, dilation: int = 1, form: str = "auto"
) -> Float[Array, "B H W C"]:
    """Depthwise cross-correlation at stride 1 with zero 'SAME' padding, as torch.nn.Conv2d(groups=C) computes it.

    Args:
      x: maps [B, H, W, C], float32, bfloat16 (sums are float32) or float64.
      kernel: one filter a channel [Kh, Kw, C], sizes odd and at most 31; it may be larger than the map.
      dilation: distance between taps, in pixels.
      form: 'auto' (by platform and shape), or 'naive', 'shift', 'toeplitz' or 'dft' in all directions.

    Returns:
      Maps [B, H, W, C] in the dtype of x. Differentiable once.

    Raises:
      ValueError: for an unknown form, an even or too large kernel, a dilation below 1 or shapes that do not fit.
    """
    return depthwise_conv2d_multi(x, (kernel,), (dilation,), form=form)[0]


def depthwise_conv2d_multi(
    x: Float[Array, "B H W C"],
    kernels: Sequence[Float[Array, "Kh Kw C"]],
    dilations: Sequence[int],
    *,
    form: str = "auto",
) -> tuple[Float[Array, "B H W C"], ...]:
    """Several depthwise convolutions of one input, which is transformed once: the dilated branches of UniRepLKNet.

    Args:
      x: maps [B, H, W, C].
      kernels: one [Kh, Kw, C] a branch, each as in `depthwise_conv2d`; sizes may differ.
      dilations: one per kernel.
      form: as in `depthwise_conv2d`.

    Returns:
      One output [B, H, W, C] per kernel, in order.

    Raises:
      ValueError: as in `depthwise_conv2d`, or when kernels and dilations differ in number or are empty.
    """
    kernels, dilations = tuple(kernels), tuple(int(d) for d in dilations)
    _check(x, kernels, dilations, form)
    return _depthwise(x, kernels, dilations, form)


def dilate_kernel(kernel: Float[Array, "*lead Kh Kw C"], dilation: int) -> Float[Array, "*lead Dh Dw C"]:
    """Spreads taps by zeros: [..., Kh, Kw, C] to [..., dilation * (Kh - 1) + 1, dilation * (Kw - 1) + 1, C]."""
    size = [dilation * (k - 1) + 1 for k in kernel.shape[-3:-1]]
    return depthwise_forms.window(kernel, dilation, size)


def centre_pad_kernel(kernel: Float[Array, "*lead Kh Kw C"], size: int | tuple[int, int]) -> Float[Array, "*lead Sh Sw C"]:
    """Centres a kernel [..., Kh, Kw, C] in zeros: [..., size, size, C], or [..., *size, C].

    Raises:
      ValueError: when the kernel is larger than `size` or cannot be centred in it.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    if any(s < k or (s - k) % 2 for k, s in zip(kernel.shape[-3:-1], size, strict=True)):
        raise ValueError(f"a kernel of {kernel.shape[-3:-1]} taps cannot be centred in {size}: give a size that is larger by an even number")
    return depthwise_forms.window(kernel, 1, size)
