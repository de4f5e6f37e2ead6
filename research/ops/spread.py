"""Broadcasting whose gradient is a product with ones.

The gradient of a broadcast is a sum. XLA:CPU computes a reduction together with everything that feeds it in one slow
kernel; as a product of matrices the same sum is a kernel of its own (`launch.bench --op=ssd` times what rests on it).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def spread(x: Float[Array, "..."], axis: int, size: int) -> Float[Array, "..."]:
    """Broadcasts an axis of size 1 to `size`; `axis` counts from the end (negative)."""
    return jnp.broadcast_to(x, (*x.shape[:axis], size, *x.shape[x.ndim + axis + 1 :]))


def _forward(x, axis, size):
    return spread(x, axis, size), None


def _backward(axis, size, _, cotangent):
    shape = cotangent.shape
    after = shape[cotangent.ndim + axis + 1 :]
    ones = jnp.ones((1, size) if after else (size, 1), cotangent.dtype)
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    if not after:
        return (product(cotangent, ones),)
    total = product(ones, cotangent.reshape(*shape[:axis], size, -1))
    return (total.reshape(*shape[:axis], 1, *after),)


spread.defvjp(_forward, _backward)
