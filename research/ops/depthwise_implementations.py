"""The implementations of depthwise convolution by name, with lax's own as the reference implementation.

All implementations have the same three functions, for one input and N kernels, each with its `Branch` (see
`depthwise_geometry`):

    conv(x, kernels, branches)                      -> N outputs, [B, *out, C] each
    input_grad(kernels, grads, branches, extent)    -> gradient of x, [B, *extent, C]
    weight_grad(x, grads, branches)                 -> N kernel gradients, [Kh, Kw, C] each

Kernels are [Kh, Kw, C]; the naive implementation alone takes strides and [Kh, Kw, C * M]. Equal subexpressions (the
transform of x in conv and weight_grad, of the output gradients in both gradients) are written alike, so that XLA
computes them once within one program. Arrays are computed in the dtype that they come in.
"""

import jax
from jax import lax

from research.ops import depthwise_dft, depthwise_shift, depthwise_toeplitz
from research.ops.depthwise_tiles import Implementation


def _lax_conv_single(x, kernel, branch):
    axes = zip(branch.out, branch.stride, branch.dilation, branch.size, x.shape[1:3], branch.low, strict=True)
    pads = [(lo, (o - 1) * s + d * (k - 1) + 1 - e - lo) for o, s, d, k, e, lo in axes]
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        branch.stride,
        pads,
        rhs_dilation=branch.dilation,
        feature_group_count=x.shape[-1],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )


def _lax_conv(x, kernels, branches):
    return tuple(_lax_conv_single(x, k, b) for k, b in zip(kernels, branches, strict=True))


def _lax_input_grad(kernels, grads, branches, extent, channels=None):
    x = jax.ShapeDtypeStruct((grads[0].shape[0], *extent, channels or grads[0].shape[-1]), grads[0].dtype)
    return jax.linear_transpose(lambda x: _lax_conv(x, kernels, branches), x)(tuple(grads))[0]


def _lax_weight_grad(x, grads, branches):
    def single(g, branch):
        kernel = jax.ShapeDtypeStruct((*branch.size, g.shape[-1]), x.dtype)
        return jax.linear_transpose(lambda k: _lax_conv_single(x, k, branch), kernel)(g)[0]

    return tuple(map(single, grads, branches))


NAIVE = Implementation(_lax_conv, _lax_input_grad, _lax_weight_grad)
SHIFT = Implementation(depthwise_shift.conv, depthwise_shift.input_grad, depthwise_shift.weight_grad)
IMPLEMENTATIONS = {
    "naive": NAIVE,
    "shift": SHIFT,
    "toeplitz": depthwise_toeplitz.IMPLEMENTATION,
    "dft": depthwise_dft.IMPLEMENTATION,
}
