"""Depthwise 2-D convolution, single or several over one input, with the fastest known implementation for the platform
and shape.

XLA:CPU runs a depthwise `lax.conv_general_dilated` at about a hundredth of its matrix rate, and its weight gradient
slower still. The convolution, its input gradient and its weight gradient each get the implementation that the table of
measurements names; other platforms keep the lax convolution, which cuDNN and the TPU compiler know. Several dilated
convolutions of one input are the training form of UniRepLKNet's blocks (Ding et al., 2024, arXiv:2311.15599, section
3.1).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.ops import checks, depthwise_implementations, dispatch, precision
from research.ops import depthwise_geometry as geometry

OP = "depthwise_conv2d"
IMPLEMENTATIONS = tuple(depthwise_implementations.IMPLEMENTATIONS)
MAX_KERNEL_SIZE = 63

Pair = tuple[int, int]
Padding = str | tuple[Pair, Pair]


class Choice(NamedTuple):
    """The implementations of the three directions."""

    conv: str
    input_grad: str
    weight_grad: str


def choose_cpu(branch: geometry.Branch, op: str = OP) -> Choice:
    """The implementations for XLA:CPU, by the table's rows for `op`; a stride counts as it is folded away."""
    branch = geometry.fold_branch(branch)
    at = dict(pixels=math.prod(branch.out), taps=math.prod(branch.size))
    return Choice(*(dispatch.choose(op, direction, **at) for direction in ("forward", "input_grad", "weight_grad")))


# --- one or several branches in chosen implementations
# --------------------------------------------------------------------------


def _groups(names, branches):
    """Implementations with the branches that use them: of one implementation and size of output, they share the
    transform of the input."""
    groups: dict[tuple[str, Pair], list[int]] = {}
    for i, (name, branch) in enumerate(zip(names, branches, strict=True)):
        groups.setdefault((name, branch.out), []).append(i)
    return [(name, indices) for (name, _), indices in groups.items()]


def _pick(indices, items):
    return [items[i] for i in indices]


def _multiplier(x, kernels):
    return kernels[0].shape[-1] // x.shape[-1]


def _conv(choices, branches, x, kernels):
    dtype, stride, x_ = x.dtype, branches[0].stride, precision.wide(x)
    kernels_ = [k.astype(x_.dtype) for k in kernels]
    outputs = [None] * len(kernels)
    for name, indices in _groups([c.conv for c in choices], branches):
        ours = list(zip(_pick(indices, kernels_), _pick(indices, branches), strict=True))
        if name == "naive":
            group = depthwise_implementations.NAIVE.conv(x_, *zip(*ours, strict=True))
        else:
            folded = geometry.fold_input(x_, stride, _multiplier(x, kernels))
            group = depthwise_implementations.IMPLEMENTATIONS[name].conv(
                folded, [geometry.fold_kernel(k, b) for k, b in ours], [geometry.fold_branch(b) for _, b in ours]
            )
            group = [geometry.unfold_output(y, stride) for y in group]
        for i, y in zip(indices, group, strict=True):
            outputs[i] = y.astype(dtype)
    return tuple(outputs)


def _transposed_fold_input(dx, x, stride, multiplier):
    """Gradient with respect to the maps x from that with respect to the folded maps."""
    operand = jax.ShapeDtypeStruct(x.shape, dx.dtype)
    return jax.linear_transpose(lambda v: geometry.fold_input(v, stride, multiplier), operand)(dx)[0]


def _transposed_fold_kernel(dk, branch):
    channels = dk.shape[-1] // math.prod(branch.stride)
    operand = jax.ShapeDtypeStruct((*branch.size, channels), dk.dtype)
    return jax.linear_transpose(lambda v: geometry.fold_kernel(v, branch), operand)(dk)[0]


def _grads(choices, branches, x, kernels, grads):
    stride, multiplier = branches[0].stride, _multiplier(x, kernels)
    x_, kernels_, grads_ = (
        precision.wide(x),
        [k.astype(precision.wide(x).dtype) for k in kernels],
        [precision.wide(g) for g in grads],
    )
    folded_x, folded_branches = geometry.fold_input(x_, stride, multiplier), [geometry.fold_branch(b) for b in branches]
    folded_grads = [geometry.spread_grad(g, stride) for g in grads_]
    terms, folded_terms, dks = [], [], [None] * len(kernels)
    for name, indices in _groups([c.input_grad for c in choices], branches):
        ks, bs = _pick(indices, kernels_), _pick(indices, branches)
        if name == "naive":
            terms.append(
                depthwise_implementations.NAIVE.input_grad(ks, _pick(indices, grads_), bs, x.shape[1:3], x.shape[-1])
            )
        else:
            ks, bs = [geometry.fold_kernel(k, b) for k, b in zip(ks, bs, strict=True)], _pick(indices, folded_branches)
            input_grad = depthwise_implementations.IMPLEMENTATIONS[name].input_grad
            folded_terms.append(input_grad(ks, _pick(indices, folded_grads), bs, folded_x.shape[1:3]))
    if folded_terms:
        terms.append(_transposed_fold_input(functools.reduce(jnp.add, folded_terms), x, stride, multiplier))
    for name, indices in _groups([c.weight_grad for c in choices], branches):
        if name == "naive":
            group = depthwise_implementations.NAIVE.weight_grad(x_, _pick(indices, grads_), _pick(indices, branches))
        else:
            weight_grad = depthwise_implementations.IMPLEMENTATIONS[name].weight_grad
            group = weight_grad(folded_x, _pick(indices, folded_grads), _pick(indices, folded_branches))
            group = [_transposed_fold_kernel(dk, branches[i]) for i, dk in zip(indices, group, strict=True)]
        for i, dk in zip(indices, group, strict=True):
            dks[i] = dk.astype(kernels[i].dtype)
    return functools.reduce(jnp.add, terms).astype(x.dtype), tuple(dks)


# --- the differentiable op --------------------------------------------------------------------------------------------


def _per_platform(implementation, op, branches, function, *operands):
    """Calls function(choices, branches, *operands), one choice a branch, for the platform that the program is compiled
    for."""

    def uniform(name):
        return functools.partial(function, (Choice(name, name, name),) * len(branches), branches)

    if implementation not in ("auto", "cpu"):
        return uniform(implementation)(*operands)
    by_shape = functools.partial(function, tuple(choose_cpu(b, op) for b in branches), branches)
    return dispatch.per_platform(implementation, by_shape, uniform("naive"), *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve(
    x: Float[Array, "B H W C"],
    kernels: tuple[Array, ...],
    branches: tuple[geometry.Branch, ...],
    implementation: str,
    op: str,
):
    """Convolves maps with kernels [Kh, Kw, C * M] whose branches share one stride; what the ops in one and two
    dimensions call."""
    return _per_platform(implementation, op, branches, _conv, x, kernels)


def _convolve_fwd(x, kernels, branches, implementation, op):
    return convolve(x, kernels, branches, implementation, op), (x, kernels)


def _convolve_bwd(branches, implementation, op, residuals, grads):
    return _per_platform(implementation, op, branches, _grads, *residuals, grads)


convolve.defvjp(_convolve_fwd, _convolve_bwd)


# --- the public functions ---------------------------------------------------------------------------------------------


def _pair(op, argument, value):
    pair = (value, value) if isinstance(value, int) else tuple(value)
    checks.require(
        len(pair) == 2 and all(v >= 1 for v in pair), op, argument, value, "an integer of at least 1, or two of them"
    )
    return pair


def _padding(op, padding):
    if isinstance(padding, str):
        checks.require(
            padding in ("SAME", "VALID"), op, "padding", repr(padding), '"SAME", "VALID" or ((low, high), (low, high))'
        )
        return padding, padding
    pairs = tuple(tuple(int(p) for p in pair) for pair in padding)
    valid = len(pairs) == 2 and all(len(pair) == 2 and min(pair) >= 0 for pair in pairs)
    checks.require(valid, op, "padding", padding, '"SAME", "VALID" or ((low, high), (low, high)) of at least 0')
    return pairs


def _branch(op, x, kernel, stride, dilation, padding):
    size, extent = tuple(kernel.shape[:2]), x.shape[-3:-1]
    checks.require(
        max(size) <= MAX_KERNEL_SIZE and min(size) >= 1, op, "kernel", size, f"1 to {MAX_KERNEL_SIZE} taps a side"
    )
    axes = zip(extent, size, dilation, stride, _padding(op, padding), strict=True)
    out, low = zip(*(geometry.extent_and_low(*axis) for axis in axes), strict=True)
    checks.require(
        min(out) >= 1, op, "x", tuple(x.shape), f"maps no smaller than the kernel of {size} taps at dilation {dilation}"
    )
    return geometry.Branch(size, dilation, low, out, stride)


def depthwise_conv2d(
    x: Float[Array, "*B H W C"],
    kernel: Float[Array, "Kh Kw C"] | Float[Array, "Kh Kw C M"],
    *,
    stride: int | Pair = 1,
    dilation: int | Pair = 1,
    padding: Padding = "SAME",
    implementation: str = "auto",
) -> Float[Array, "*B Ho Wo D"]:
    """Depthwise cross-correlation with zero padding, as torch.nn.Conv2d(groups=C) computes it.

    Args:
      x: maps [*B, H, W, C], float32, bfloat16 (sums are float32) or float64.
      kernel: one filter a channel [Kh, Kw, C], 1 to 63 taps a side, odd or even; it may be larger than the map. [Kh,
        Kw, C, M] gives each channel M outputs, of which output m of channel c is channel c * M + m.
      stride: distance between outputs, in pixels; one number or (rows, columns).
      dilation: distance between taps, in pixels; one number or (rows, columns).
      padding: "SAME" (ceil(H / stride) outputs; of an odd number of zeros the greater part is at the high end),
        "VALID", or ((low, high), (low, high)) zeros about rows and columns.
      implementation: 'auto' (by platform and shape), 'cpu' (by shape, for a CPU: half the tracing of 'auto'), or
        'naive', 'shift', 'toeplitz' or 'dft' in all directions.

    Returns:
      Maps [*B, Ho, Wo, C * M] in the dtype of x. Differentiable once, in reverse.

    Raises:
      ValueError: for an unknown implementation or padding, a kernel that is too large or of other channels, a stride or
        dilation below 1.

    Source: depthwise convolution as in Xception (Chollet 2017, arXiv:1610.02357), section 2.
    """
    return depthwise_conv2d_multi(
        x, (kernel,), (dilation,), stride=stride, padding=padding, implementation=implementation
    )[0]


def depthwise_conv2d_multi(
    x: Float[Array, "*B H W C"],
    kernels: Sequence[Float[Array, "_ _ C"] | Float[Array, "_ _ C M"]],
    dilations: Sequence[int | Pair],
    *,
    stride: int | Pair = 1,
    padding: Padding = "SAME",
    implementation: str = "auto",
) -> tuple[Float[Array, "*B _ _ D"], ...]:
    """Several depthwise convolutions of one input, which is transformed once: the dilated branches of UniRepLKNet.

    Args:
      x: maps [*B, H, W, C].
      kernels: one [Kh, Kw, C] or [Kh, Kw, C, M] a branch, each as in `depthwise_conv2d`; sizes may differ, M may not.
      dilations: one per kernel.
      stride: as in `depthwise_conv2d`, for all branches.
      padding: as in `depthwise_conv2d`, for all branches.
      implementation: as in `depthwise_conv2d`.

    Returns:
      One output [*B, Ho, Wo, C * M] per kernel, in order.

    Raises:
      ValueError: as in `depthwise_conv2d`, or when kernels and dilations differ in number or are empty.

    Source: UniRepLKNet (Ding et al. 2024, arXiv:2311.15599), section 3.1.
    """
    implementation = dispatch.resolve(implementation, OP, IMPLEMENTATIONS)
    counts = f"{len(kernels)} kernels with {len(dilations)} dilations"
    checks.require(len(kernels) == len(dilations) > 0, OP, "kernels", counts, "one dilation per kernel, at least one")
    pattern = "Kh{0} Kw{0} C M" if kernels[0].ndim == 4 else "Kh{0} Kw{0} C"
    arguments = {f"kernel {i}" if i else "kernel": (k, pattern.format(i or "")) for i, k in enumerate(kernels)}
    checks.shapes(OP, x=(x, "*B H W C"), **arguments)
    stride = _pair(OP, "stride", stride)
    branches = tuple(
        _branch(OP, x, k, stride, _pair(OP, "dilation", d), padding) for k, d in zip(kernels, dilations, strict=True)
    )
    flat = x.reshape(-1, *x.shape[-3:])
    outputs = convolve(flat, tuple(k.reshape(*k.shape[:2], -1) for k in kernels), branches, implementation, OP)
    return tuple(y.reshape(*x.shape[:-3], *y.shape[1:]) for y in outputs)


def dilate_kernel(kernel: Float[Array, "*lead Kh Kw C"], dilation: int) -> Float[Array, "*lead Dh Dw C"]:
    """Spreads taps by zeros: [..., Kh, Kw, C] to [..., dilation * (Kh - 1) + 1, dilation * (Kw - 1) + 1, C]."""
    size = geometry.pair(dilation * (k - 1) + 1 for k in kernel.shape[-3:-1])
    return geometry.place(kernel, (dilation, dilation), (0, 0), size)


def centre_pad_kernel(kernel: Float[Array, "*lead Kh Kw C"], size: int | Pair) -> Float[Array, "*lead Sh Sw C"]:
    """Centres a kernel [..., Kh, Kw, C] in zeros: [..., size, size, C], or [..., *size, C].

    Raises:
      ValueError: when the kernel is larger than `size` or cannot be centred in it.
    """
    sides = (size, size) if isinstance(size, int) else geometry.pair(size)
    taps = tuple(kernel.shape[-3:-1])
    fits = all(s >= k and (s - k) % 2 == 0 for k, s in zip(taps, sides, strict=True))
    checks.require(
        fits, "centre_pad_kernel", "size", sides, f"{taps}, the taps of the kernel, plus an even number a side"
    )
    before = geometry.pair((s - k) // 2 for k, s in zip(taps, sides, strict=True))
    return geometry.place(kernel, (1, 1), before, sides)
