"""Depthwise 2-D convolution, single or several over one input, with the fastest known form for the platform and shape.

XLA:CPU runs a depthwise `lax.conv_general_dilated` at about a hundredth of its matrix rate, and its weight gradient
slower still. The convolution, its input gradient and its weight gradient each get the form that a small table of
measurements names; other platforms keep the lax convolution, which cuDNN and the TPU compiler know. Several dilated
convolutions of one input are the training form of UniRepLKNet's blocks (Ding et al., 2024, arXiv:2311.15599, section 3.1).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from research.ops import depthwise_forms

VALID_FORMS = ("auto", "cpu", *depthwise_forms.FORMS)
MAX_KERNEL_SIZE = 31


class Choice(NamedTuple):
    """The forms of the three directions."""

    conv: str
    input_grad: str
    weight_grad: str


class _Rule(NamedTuple):
    """Applies to maps of at most `pixels` and kernels of at most `taps` a side; the first rule that applies wins."""

    pixels: float
    taps: float
    choice: Choice


# Medians on two x86-64 cores: on small maps the matrices are small and batched; few taps stream at memory speed; the
# cost of the DFT hardly depends on the kernel.
_CPU_RULES = (
    _Rule(pixels=100, taps=math.inf, choice=Choice("toeplitz", "toeplitz", "toeplitz")),
    _Rule(pixels=math.inf, taps=3, choice=Choice("shift", "shift", "shift")),
    _Rule(pixels=math.inf, taps=math.inf, choice=Choice("dft", "dft", "dft")),
)


def choose_cpu(height: int, width: int, size: tuple[int, int]) -> Choice:
    """The forms for XLA:CPU on maps of height x width with a kernel of `size` taps."""
    return next(r.choice for r in _CPU_RULES if height * width <= r.pixels and max(size) <= r.taps)


def _groups(names):
    """Forms with the branches that use them: branches of one form share the transform of the input."""
    return {name: [i for i, other in enumerate(names) if other == name] for name in names}


def _pick(branches, items):
    return [items[i] for i in branches]


def _conv(choices, x, kernels, dilations):
    dtype = _compute_dtype(x)
    x_, kernels_ = x.astype(dtype), [k.astype(dtype) for k in kernels]
    outputs = [None] * len(kernels)
    for name, branches in _groups([c.conv for c in choices]).items():
        group = depthwise_forms.FORMS[name].conv(x_, _pick(branches, kernels_), _pick(branches, dilations))
        for i, y in zip(branches, group, strict=True):
            outputs[i] = y.astype(x.dtype)
    return tuple(outputs)


def _grads(choices, x, kernels, grads, dilations):
    dtype = _compute_dtype(x)
    x_, kernels_, grads_ = jax.tree.map(lambda a: a.astype(dtype), (x, tuple(kernels), tuple(grads)))
    dx = functools.reduce(
        jnp.add,
        [
            depthwise_forms.FORMS[name].input_grad(_pick(group, kernels_), _pick(group, grads_), _pick(group, dilations))
            for name, group in _groups([c.input_grad for c in choices]).items()
        ],
    )
    dks = [None] * len(kernels)
    for name, branches in _groups([c.weight_grad for c in choices]).items():
        sizes = [kernels[i].shape[:2] for i in branches]
        weight_grad = depthwise_forms.FORMS[name].weight_grad
        group = weight_grad(x_, _pick(branches, grads_), sizes, _pick(branches, dilations))
        for i, dk in zip(branches, group, strict=True):
            dks[i] = dk.astype(kernels[i].dtype)
    return dx.astype(x.dtype), tuple(dks)


def _compute_dtype(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _per_platform(form, x, kernels, function, *operands):
    """Calls function(choices, *operands), one choice a branch, for the platform that the program is compiled for."""

    def uniform(name):
        return (Choice(name, name, name),) * len(kernels)

    if form not in ("auto", "cpu"):
        return function(uniform(form), *operands)
    choices = tuple(choose_cpu(*x.shape[1:3], k.shape[:2]) for k in kernels)
    if form == "cpu":
        return function(choices, *operands)
    return lax.platform_dependent(
        *operands, cpu=functools.partial(function, choices), default=functools.partial(function, uniform("naive"))
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernels, dilations, form):
    def conv(choices, x, kernels):
        return _conv(choices, x, kernels, dilations)

    return _per_platform(form, x, kernels, conv, x, kernels)


def _depthwise_fwd(x, kernels, dilations, form):
    return _depthwise(x, kernels, dilations, form), (x, kernels)


def _depthwise_bwd(dilations, form, residuals, grads):
    x, kernels = residuals

    def both_grads(choices, x, kernels, grads):
        return _grads(choices, x, kernels, grads, dilations)

    return _per_platform(form, x, kernels, both_grads, x, kernels, grads)


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
      form: 'auto' (by platform and shape), 'cpu' (by shape, for a CPU: half the tracing of 'auto'), or 'naive', 'shift', 'toeplitz' or 'dft' in all directions.

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
        raise ValueError(
            f"a kernel of {kernel.shape[-3:-1]} taps cannot be centred in {size}: give a size that is larger by an even number"
        )
    return depthwise_forms.window(kernel, 1, size)
