"""Normalisation layers with named axes: BatchNorm, LayerNorm, RMSNorm, GELU with global response normalisation.

Moments are computed in float32 (or float64) whatever the input's dtype. `mode` says what batch norm does:
"train" uses batch moments and updates the running ones, "eval" uses the running ones, "calibrate" uses
batch moments and stores exactly those, for recalibration after many-in-one training.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.modules.axes import Init, Kind, StatKind
from research.modules.layers import ones, zeros
from research.ops import batch_norm, gelu_grn, precision

MODES = ("train", "eval", "calibrate")


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last (Ioffe and Szegedy 2015), eps 1e-5, running moments kept by 0.9.

    The stored variance is the biased one.
    """

    def __init__(
        self, channels: int, axis: str, init: Init, *, eps: float = 1e-5, momentum: float = 0.9, scale_init=ones
    ):
        self.eps, self.momentum = eps, momentum
        self.scale = init.param("scale", (channels,), (axis,), scale_init, Kind.GAIN)
        self.bias = init.param("bias", (channels,), (axis,), zeros, Kind.BIAS)
        self.mean = init.stat("mean", (channels,), (axis,), zeros, StatKind.MOMENT)
        self.var = init.stat("var", (channels,), (axis,), ones, StatKind.MOMENT)

    def __call__(self, x: Float[Array, "B *S C"], *, mode: str) -> Float[Array, "B *S C"]:
        if mode not in ("train", "calibrate"):
            factor, offset = self.affine()
            return (x * factor + offset).astype(x.dtype)
        y, mean, var = batch_norm.batch_norm(x, self.scale[...], self.bias[...], self.eps)
        self.observe(mean, var, mode)
        return y

    def affine(self) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        """Returns (factor, offset) with BN(x) = factor * x + offset under the running moments."""
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.eps)
        return factor, self.bias[...] - self.mean[...] * factor

    def observe(self, mean: Float[Array, " C"], var: Float[Array, " C"], mode: str) -> None:
        """Takes the moments of a batch into the running ones."""
        keep = self.momentum if mode == "train" else 0.0
        self.mean[...] = keep * self.mean[...] + (1 - keep) * mean
        self.var[...] = keep * self.var[...] + (1 - keep) * var


class LayerNorm(nnx.Module):
    """Normalisation over the last axis (Ba et al. 2016), eps 1e-6 inside the square root."""

    def __init__(self, channels: int, axis: str, init: Init, *, eps: float = 1e-6):
        self.eps = eps
        self.scale = init.param("scale", (channels,), (axis,), ones, Kind.GAIN)
        self.bias = init.param("bias", (channels,), (axis,), zeros, Kind.BIAS)

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        wide = precision.wide(x)
        mean = wide.mean(-1, keepdims=True)
        var = jnp.square(wide - mean).mean(-1, keepdims=True)
        y = (wide - mean) * jax.lax.rsqrt(var + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Division by the root mean square over the last axis (Zhang and Sennrich 2019), eps inside the square root, times
    a scale.

    `axes` names the trailing axes that the scale has; the mean runs over the last `over` of them (all by default).
    """

    def __init__(
        self, shape: int | tuple[int, ...], axes: str | tuple[str, ...], init: Init, *, eps: float = 1e-5, over: int = 0
    ):
        shape = (shape,) if isinstance(shape, int) else shape
        axes = (axes,) if isinstance(axes, str) else axes
        self.eps, self.over = eps, over or len(shape)
        self.scale = init.param("scale", shape, axes, ones, Kind.GAIN)

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        wide = precision.wide(x)
        mean = jnp.square(wide).mean(tuple(range(-self.over, 0)), keepdims=True)
        return (wide * jax.lax.rsqrt(mean + self.eps) * self.scale[...]).astype(x.dtype)


class GeluGRN(nnx.Module):
    """Exact GELU, then global response normalisation (ConvNeXt V2, Woo et al. 2023, eq. 1-3), eps 1e-6 added to the
    mean.

    The square root is guarded: a channel that is zero everywhere gets the gradient zero, not NaN.
    """

    def __init__(self, channels: int, axis: str, init: Init, *, eps: float = 1e-6, bias: bool = True):
        self.eps = eps
        self.scale = init.param("scale", (channels,), (axis,), zeros, Kind.GAIN)
        self.bias = init.param("bias", (channels,), (axis,), zeros, Kind.BIAS) if bias else None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return gelu_grn.gelu_grn(x, self.scale[...], None if self.bias is None else self.bias[...], self.eps)
