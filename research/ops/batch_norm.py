"""Batch normalisation by batch moments, with the gradient written out: two reductions and one pass over the data.

Where devices hold rows each of their own (`jax.shard_map`), `axis_name` names the mesh axes over which the moments are
those of all rows.

Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), section 3; the reference implementation leaves the gradient to
autodiff.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from research.ops import precision

Axes = tuple[str, ...]


def moments(x: Float[Array, "*B C"], axis_name: Axes = ()) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """Returns (mean, biased variance) over all axes but the last, at least in float32."""
    wide = precision.wide(x)
    axes = tuple(range(x.ndim - 1))
    mean = over_devices(wide.mean(axes), axis_name)
    return mean, over_devices(jnp.square(wide - mean).mean(axes), axis_name)


def over_devices(mean: Array, axis_name: Axes) -> Array:
    """Returns the mean over devices of what each has of its own."""
    return lax.pmean(mean, axis_name) if axis_name else mean


def batch_norm_naive(
    x: Float[Array, "*B C"], scale: Float[Array, " C"], bias: Float[Array, " C"], eps: float, axis_name: Axes = ()
):
    """The reference implementation of `batch_norm`: same result, gradient by autodiff."""
    mean, var = moments(x, axis_name)
    factor = scale * lax.rsqrt(var + eps)
    return (
        (precision.wide(x) * factor + (bias - mean * factor)).astype(x.dtype),
        lax.stop_gradient(mean),
        lax.stop_gradient(var),
    )


def batch_norm(
    x: Float[Array, "*B C"], scale: Float[Array, " C"], bias: Float[Array, " C"], eps: float, axis_name: Axes = ()
):
    """Normalises by the moments of the batch.

    Args:
      x: data; all axes but the last are averaged over.
      scale: factor per channel.
      bias: offset per channel.
      eps: added to the variance.
      axis_name: mesh axes over which devices hold other rows.

    Returns:
      (y like x, mean [C], biased variance [C]); no gradient flows through the returned moments.
    """
    y, mean, var = _batch_norm(x, scale, bias, eps, axis_name)
    return y, lax.stop_gradient(mean), lax.stop_gradient(var)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_norm(x, scale, bias, eps, axis_name):
    return batch_norm_naive(x, scale, bias, eps, axis_name)


def _forward(x, scale, bias, eps, axis_name):
    y, mean, var = batch_norm_naive(x, scale, bias, eps, axis_name)
    return (y, mean, var), (x, scale, mean, lax.rsqrt(var + eps))


def _backward(eps, axis_name, residuals, cotangents):
    del eps
    x, scale, mean, inverse = residuals
    dy = precision.wide(cotangents[0])
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    normal = (precision.wide(x) - mean) * inverse
    d_bias = dy.sum(axes)
    d_scale = (dy * normal).sum(axes)
    all_bias, all_scale = (over_devices(d, axis_name) for d in (d_bias, d_scale))
    dx = scale * inverse * (dy - (all_bias + normal * all_scale) / count)
    return dx.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(scale.dtype)


_batch_norm.defvjp(_forward, _backward)
