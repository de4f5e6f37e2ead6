"""The precision that sums are taken in, and products that no accelerator may round."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
"""Product in the precision of its operands: by default TPUs and GPUs round float32 to bfloat16 or TF32 before they
multiply."""
einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
"""As `matmul`."""


def wide(x: Array) -> Array:
    """Returns x in float32, or in float64 when it is that already: what moments and norms are summed in."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
