"""Batch normalisation by batch moments, with the gradient written out: two reductions and one pass over the data.

Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), section 3; the naive twin leaves the gradient to autodiff.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from research.ops import precision


def moments(x: Float[Array, "*B C"]) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """Returns (mean, biased variance) over all axes but the last, at least in float32."""
    wide = precision.wide(x)
    axes = tuple(range(x.ndim - 1))
    mean = wide.mean(axes)
    return mean, jnp.square(wide - mean).mean(axes)


def batch_norm_naive(x: Float[Array, "*B C"], scale: Float[Array, " C"], bias: Float[Array, " C"], eps: float):
    """The twin of `batch_norm`: same result, gradient by autodiff."""
    mean, var = moments(x)
    factor = scale * lax.rsqrt(var + eps)
    return (precision.wide(x) * factor + (bias - mean * factor)).astype(x.dtype), lax.stop_gradient(mean), lax.stop_gradient(var)


def batch_norm(x: Float[Array, "*B C"], scale: Float[Array, " C"], bias: Float[Array, " C"], eps: float):
    """Normalises by the moments of the batch.

    Args:
      x: data; all axes but the last are averaged over.
      scale: factor per channel.
      bias: offset per channel.
      eps: added to the variance.

    Returns:
      (y like x, mean [C], biased variance [C]); no gradient flows through the returned moments.
    """
    y, mean, var = _batch_norm(x, scale, bias, eps)
    return y, lax.stop_gradient(mean), lax.stop_gradient(var)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _batch_norm(x, scale, bias, eps):
    return batch_norm_naive(x, scale, bias, eps)


def _forward(x, scale, bias, eps):
    y, mean, var = batch_norm_naive(x, scale, bias, eps)
    return (y, mean, var), (x, scale, mean, lax.rsqrt(var + eps))


def _backward(eps, residuals, cotangents):
    del eps
    x, scale, mean, inverse = residuals
    dy = precision.wide(cotangents[0])
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    normal = (precision.wide(x) - mean) * inverse
    d_bias = dy.sum(axes)
    d_scale = (dy * normal).sum(axes)
    dx = scale * inverse * (dy - (d_bias + normal * d_scale) / count)
    return dx.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(scale.dtype)


_batch_norm.defvjp(_forward, _backward)
