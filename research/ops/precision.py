"""The precision that sums are taken in."""

import jax.numpy as jnp
from jaxtyping import Array


def wide(x: Array) -> Array:
    """Returns x in float32, or in float64 when it is that already: what moments and norms are summed in."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
