"""Sum of batch-normalised dilated depthwise convolutions of one input: UniRepLKNet's re-parameterised block in
training.

Batch norm of a convolution needs only the mean and variance of its output, and these follow from the first and
second moments of the input: with T the Toeplitz matrix of a channel's kernel and G = sum over the batch of x x^T,
sum y^2 = tr(T G T^T). So the moments implementation never computes the branches: it makes G once (one matrix product),
gets each branch's factor from it, folds all branches into one kernel, and convolves once. The explicit implementation
is its reference implementation.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from research.ops import batch_norm, depthwise, depthwise_geometry, depthwise_toeplitz, dispatch

OP = "reparam_conv"
IMPLEMENTATIONS = ("moments", *depthwise.IMPLEMENTATIONS)
MOMENTS_PIXELS = 100  # largest map for which the [pixels, pixels] moments pay on a CPU

Result = tuple[Float[Array, "B H W C"], Float[Array, "N C"], Float[Array, "N C"]]


def reparam_conv(
    x: Float[Array, "B H W C"],
    kernels: Sequence[Float[Array, "_ _ C"]],
    dilations: Sequence[int],
    scales: Float[Array, "N C"],
    biases: Float[Array, "N C"],
    eps: float,
    *,
    implementation: str = "auto",
    axis_name: tuple[str, ...] = (),
) -> Result:
    """Returns sum_n BN_n(depthwise(x, kernel_n, dilation_n)) under the moments of the batch.

    Args:
      x: maps.
      kernels: one per branch, odd sizes; the first is the largest and holds all others when dilated.
      dilations: one per branch.
      scales: batch-norm factors, one row per branch.
      biases: batch-norm offsets, one row per branch.
      eps: added to the variances.
      implementation: "auto" (by platform and shape), "cpu" (by shape), "moments", or an implementation of
        `depthwise_conv2d` for explicit branches; or a list for several ops, as `dispatch.resolve` takes it.
      axis_name: mesh axes over which devices hold other rows, under `jax.shard_map`: the moments are those of all.

    Returns:
      (sum, mean of each branch, biased variance of each branch); no gradient flows through the moments.
    """
    own = dispatch.resolve(implementation, OP, IMPLEMENTATIONS)
    inner = own if own in depthwise.IMPLEMENTATIONS else "auto" if implementation == "moments" else implementation
    options = dict(dilations=dilations, eps=eps, implementation=inner, axis_name=axis_name)
    explicit, by_moments = functools.partial(_explicit, **options), functools.partial(_by_moments, **options)
    args = (x, tuple(kernels), scales, biases)
    if own in ("auto", "cpu") and x.shape[1] * x.shape[2] <= MOMENTS_PIXELS:
        out = dispatch.per_platform(own, by_moments, explicit, *args)
    else:
        out = (by_moments if own == "moments" else explicit)(*args)
    return out[0], lax.stop_gradient(out[1]), lax.stop_gradient(out[2])


def merged_kernel(
    kernels: Sequence[Array], dilations: Sequence[int], factors: Float[Array, "N C"]
) -> Float[Array, "K K C"]:
    """Returns sum_n factor_n * kernel_n, dilated and centred in the window of the first kernel."""
    size = kernels[0].shape[-3]
    windows = [
        depthwise.centre_pad_kernel(depthwise.dilate_kernel(k, d), size)
        for k, d in zip(kernels, dilations, strict=True)
    ]
    return jnp.einsum(
        "nhwc,nc->hwc", jnp.stack(windows), factors.astype(windows[0].dtype), precision=lax.Precision.HIGHEST
    )


def _explicit(x, kernels, scales, biases, *, dilations, eps, implementation, axis_name) -> Result:
    outs = depthwise.depthwise_conv2d_multi(x, kernels, dilations, implementation=implementation)
    normed = [batch_norm.batch_norm(y, s, b, eps, axis_name) for y, s, b in zip(outs, scales, biases, strict=True)]
    total = sum((y for y, _, _ in normed[1:]), normed[0][0])
    return total, jnp.stack([m for _, m, _ in normed]), jnp.stack([v for _, _, v in normed])


def _by_moments(x, kernels, scales, biases, *, dilations, eps, implementation, axis_name) -> Result:
    mean, var = branch_moments(x, kernels, dilations, axis_name)
    factors = scales * lax.rsqrt(var + eps)
    y = depthwise.depthwise_conv2d(
        x, merged_kernel(kernels, dilations, factors).astype(x.dtype), implementation=implementation
    )
    offset = (biases - mean * factors).sum(0)
    return (y + offset).astype(x.dtype), mean, var


def branch_moments(
    x: Float[Array, "B H W C"], kernels: Sequence[Array], dilations: Sequence[int], axis_name: tuple[str, ...] = ()
) -> tuple[Array, Array]:
    """Returns (mean [N, C], biased variance [N, C]) of each branch's output, from the moments of the input."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    batch, height, width, channels = x.shape
    x_cm, extent = depthwise_toeplitz.channel_major(x.astype(wide)), (height, width)
    branches = [
        depthwise_geometry.same(depthwise_geometry.pair(k.shape[:2]), d, extent)
        for k, d in zip(kernels, dilations, strict=True)
    ]
    window = depthwise_toeplitz.matrix_window(branches, extent, extent)
    windows = depthwise_geometry.windows([k.astype(wide) for k in kernels], branches, window)
    pixels, count = height * width, len(kernels)
    matrices = depthwise_toeplitz.matrices(windows, window, extent, extent).reshape(channels, count * pixels, pixels)
    # Moments about the input's mean at each pixel, so that the variance is no difference of large numbers.
    centre = batch_norm.over_devices(x_cm.mean(1), axis_name)
    x_cm = x_cm - centre[:, None, :]
    gram = jnp.einsum("cbi,cbj->cij", x_cm, x_cm, precision=lax.Precision.HIGHEST) / batch
    gram = batch_norm.over_devices(gram, axis_name)
    at_pixel = jnp.einsum("cpi,ci->cp", matrices, centre, precision=lax.Precision.HIGHEST).reshape(
        channels, count, pixels
    )
    mean = at_pixel.mean(-1)
    half = jnp.einsum("cpi,cij->cpj", matrices, gram, precision=lax.Precision.HIGHEST)
    spread = (half * matrices).reshape(channels, count, pixels * pixels).sum(-1) / pixels
    var = spread + jnp.square(at_pixel - mean[..., None]).mean(-1)
    return mean.T, var.T
