"""Linear, convolution and depthwise convolution layers, and stochastic depth.

Kernels are stored (in, out), (H, W, in, out) and (H, W, C); images are NHWC. Weights start as
normal(0, 0.02) unless said otherwise, biases as zeros.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.modules import mesh
from research.modules.axes import Init, Initializer, Kind
from research.ops import depthwise
from research.ops.precision import matmul

normal_02 = jax.nn.initializers.normal(0.02)
kaiming = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


class Linear(nnx.Module):
    """y = x W + b over the last axis; `axes` names (in, out). `exact`: no accelerator rounds what it multiplies, as
    routers need it."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        axes: tuple[str, str],
        init: Init,
        *,
        bias: bool = True,
        kernel_init: Initializer = normal_02,
        exact: bool = False,
    ):
        self.exact = exact
        self.kernel = init.param("kernel", (n_in, n_out), axes, kernel_init, Kind.MATRIX)
        self.bias = init.param("bias", (n_out,), axes[1:], zeros, Kind.BIAS) if bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        product = matmul if self.exact else jnp.matmul
        y = mesh.on_local_shard(
            lambda x, kernel, _: product(x, kernel), mesh.input_of(self.kernel, x), self.kernel[...]
        )
        return y if self.bias is None else y + self.bias[...]


class Conv(nnx.Module):
    """Dense square convolution with symmetric explicit padding `size // 2`; `axes` names (in, out), `exact` as in
    `Linear`."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        size: int,
        axes: tuple[str, str],
        init: Init,
        *,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
        kernel_init: Initializer = normal_02,
        exact: bool = False,
    ):
        self.precision = jax.lax.Precision.HIGHEST if exact else None
        self.stride = stride
        self.padding = size // 2 if padding is None else padding
        self.kernel = init.param(
            "kernel", (size, size, n_in, n_out), ("window_h", "window_w", *axes), kernel_init, Kind.MATRIX
        )
        self.bias = init.param("bias", (n_out,), axes[1:], zeros, Kind.BIAS) if bias else None

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        y = mesh.on_local_shard(
            lambda x, kernel, _: self._convolved(x, kernel), mesh.input_of(self.kernel, x), self.kernel[...]
        )
        return y if self.bias is None else y + self.bias[...]

    def _convolved(self, x: Float[Array, "B H W I"], kernel: Float[Array, "K K I O"]) -> Float[Array, "B h w O"]:
        strides, padding = (self.stride, self.stride), ((self.padding, self.padding),) * 2
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=self.precision
        )


class DepthwiseConv(nnx.Module):
    """Depthwise KxK convolution, stride 1, zero padding; the implementation is chosen in `research.ops.depthwise`."""

    def __init__(
        self,
        channels: int,
        size: int,
        axis: str,
        init: Init,
        *,
        bias: bool = False,
        dilation: int = 1,
        implementation: str = "auto",
    ):
        self.dilation, self.implementation = dilation, implementation
        self.kernel = init.param(
            "kernel", (size, size, channels), ("kernel_h", "kernel_w", axis), normal_02, Kind.DEPTHWISE
        )
        self.bias = init.param("bias", (channels,), (axis,), zeros, Kind.BIAS) if bias else None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        convolve = lambda x, kernel, _: depthwise.depthwise_conv2d(
            x, kernel, dilation=self.dilation, implementation=self.implementation
        )
        y = mesh.on_local_shard(convolve, x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...]


def drop_path(x: Float[Array, " B *S"], rate: Float[Array, ""] | float, key: Array) -> Float[Array, " B *S"]:
    """Stochastic depth (Huang et al. 2016): zeroes whole examples with probability `rate`, scales the rest by
    1/(1-rate)."""
    keep = 1.0 - rate
    mask = jax.random.bernoulli(key, keep, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(mask, x / jnp.asarray(keep, x.dtype), jnp.zeros((), x.dtype))


def drop_path_rates(maximum: float, depth: int) -> Sequence[float]:
    """Rates of `depth` blocks, linear from 0 to `maximum`, both ends included."""
    return [maximum * i / max(depth - 1, 1) for i in range(depth)]
