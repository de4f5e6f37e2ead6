"""Dropout (Srivastava et al. 2014) as a pure function of its key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dropout(x: Float[Array, "..."], rate: float, key: Array) -> Float[Array, "..."]:
    """Zeroes entries with probability `rate` and divides the others by 1 - rate."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
