"""The inverse of unit lower-triangular matrices, by products of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


def _product(x, y):
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


@jax.custom_vjp
def unit_lower_inverse(strict: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
    """Returns (I + strict)^-1 for strictly lower-triangular matrices whose size is a power of two.

    Blocks are inverted from the diagonal outwards: with inverses P and Q of two neighbours on the diagonal and M below
    them, the lower-left block of the pair's inverse is -Q M P. No powers of `strict` are formed (they grow and cancel),
    and the depth is log2(C) products. Source: block forward substitution, Golub and Van Loan, Matrix Computations,
    section 3.1.4.

    Args:
      strict: entries on and above the diagonal are taken as zero.
    """
    size = strict.shape[-1]
    if size & (size - 1):
        raise ValueError(f"unit_lower_inverse: strict has shape {strict.shape}; expected a size that is a power of two")
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=strict.dtype), strict.shape)
    half = 1
    while half < size:
        # The mask keeps the lower-left block of each pair; block-diagonal inverses on both sides touch no other pair.
        below = jnp.where(lower_left_of_pairs(size, half), strict, 0)
        inverse = inverse - _product(inverse, _product(below, inverse))
        half *= 2
    return inverse


def lower_left_of_pairs(size: int, half: int) -> np.ndarray:
    """Where, in a matrix of `size`, the second of two neighbouring blocks of `half` rows meets the first one's
    columns."""
    pair, upper = np.arange(size) // (2 * half), np.arange(size) // half % 2 == 0
    return (pair[:, None] == pair[None, :]) & ~upper[:, None] & upper[None, :]


def _forward(strict):
    inverse = unit_lower_inverse(strict)
    return inverse, inverse


def _backward(inverse, cotangent):
    transposed = jnp.swapaxes(inverse, -1, -2)
    strictly_lower = np.tril(np.ones(inverse.shape[-2:], bool), -1)
    return (jnp.where(strictly_lower, -_product(transposed, _product(cotangent, transposed)), 0),)


unit_lower_inverse.defvjp(_forward, _backward)
