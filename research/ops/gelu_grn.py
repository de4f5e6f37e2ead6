"""GELU followed by global response normalisation, with the gradient written out: two passes over the data each way.

Source: ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808), equations 1 to 3, in the order in which its block and
UniRepLKNet's apply them; GELU is the exact one (Hendrycks and Gimpel 2016, arXiv 1606.08415). Only the input is kept
for the gradient; autodiff of the reference implementation keeps the activations and the complementary error function
beside it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from research.ops import precision


def _guarded_sqrt(squares: Array) -> Array:
    """Square root whose gradient at zero is zero, not NaN: a channel may be zero everywhere."""
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def grn(
    x: Float[Array, "B *S C"], scale: Float[Array, " C"], bias: Float[Array, " C"] | None, eps: float
) -> Float[Array, "B *S C"]:
    """Global response normalisation alone, see `gelu_grn`; the gradient is autodiff's."""
    response = _guarded_sqrt(jnp.square(precision.wide(x)).sum(tuple(range(1, x.ndim - 1)), keepdims=True))
    y = x * (scale * response / (response.mean(-1, keepdims=True) + eps) + 1).astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)


def gelu_grn_naive(x: Float[Array, "B *S C"], scale: Float[Array, " C"], bias: Float[Array, " C"] | None, eps: float):
    """The reference implementation of `gelu_grn`: same result, gradient by autodiff."""
    return grn(jax.nn.gelu(precision.wide(x), approximate=False), scale, bias, eps).astype(x.dtype)


def gelu_grn(
    x: Float[Array, "B *S C"], scale: Float[Array, " C"], bias: Float[Array, " C"] | None, eps: float
) -> Float[Array, "B *S C"]:
    """Returns g * (scale * N + 1) + bias with g = GELU(x), N = G / (mean over C of G + eps), G = L2 norm of g over *S.

    Args:
      x: data; G is taken over all axes but the first and the last, for each example.
      scale: factor per channel.
      bias: offset per channel; None leaves it out.
      eps: added to the mean of G.

    Returns:
      An array like x; sums are taken in float32 at least. Differentiable once, in reverse.
    """
    return _gelu_grn(x, scale, bias, eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gelu_grn(x, scale, bias, eps):
    return _forward(x, scale, bias, eps)[0]


def _gelu(x):
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


def _gelu_slope(x):
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5))) + x * jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)


def _forward(x, scale, bias, eps):
    g = _gelu(precision.wide(x))
    response = _guarded_sqrt(jnp.square(g).sum(tuple(range(1, x.ndim - 1)), keepdims=True))
    level = response.mean(-1, keepdims=True) + eps
    y = g * (scale * (response / level) + 1)
    return (y if bias is None else y + bias).astype(x.dtype), (x, scale, bias, response, level)


def _backward(eps, residuals, dy):
    del eps
    x, scale, bias, response, level = residuals
    space, all_but_channels = tuple(range(1, x.ndim - 1)), tuple(range(x.ndim - 1))
    wide, dy = precision.wide(x), precision.wide(dy)
    along = (dy * _gelu(wide)).sum(space, keepdims=True)  # of dy and g, per example and channel
    normal = response / level
    d_normal = scale * along
    d_response = (d_normal - (d_normal * normal).mean(-1, keepdims=True)) / level
    pull = jnp.where(response > 0, d_response / jnp.where(response > 0, response, 1.0), 0.0)
    dg = dy * (scale * normal + 1) + _gelu(wide) * pull
    d_scale = (along * normal).sum(all_but_channels).astype(scale.dtype)
    d_bias = None if bias is None else dy.sum(all_but_channels).astype(bias.dtype)
    return (dg * _gelu_slope(wide)).astype(x.dtype), d_scale, d_bias


_gelu_grn.defvjp(_forward, _backward)
