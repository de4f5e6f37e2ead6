"""Sums of log decays over segments of time, without cancellation.

The log decay from step j to step i is the sum of log_decay over j < s <= i. As the difference of two running sums it
loses eps * |running sum|: with a total of -1000 the decays of late neighbours are wrong in the fourth digit. Here each
log decay is split into a multiple of 2^-6, whose running sums are exact in float32, and a remainder below 2^-7, whose
running sums are small; both differences are then as good as their terms. Source of the matrix: Dao and Gu 2024 (arXiv
2405.21060), section 6 ("segsum").
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from research.ops import precision

_GRID = 2.0**-6
_LONGEST_PRODUCT = 256
LOWEST = -1000.0
"""Log decays below this count as this: its exponential is zero in every floating-point type."""


def running_sums(log_decay: Float[Array, "*S"], axis: int = -1) -> tuple[Float[Array, "*S"], Float[Array, "*S"]]:
    """Inclusive running sums over an axis in two parts, an exact one and a small one.

    Args:
      log_decay: logarithms of decays, at most 0; those below `LOWEST` count as `LOWEST`.
      axis: -1 or -2.

    Returns:
      (exact part, for totals down to -2^18; small part). The differences of two entries, added up over both parts, are
      the segment sum between them.
    """
    log_decay = jnp.maximum(precision.wide(log_decay), LOWEST)
    coarse = lax.stop_gradient(jnp.round(log_decay / _GRID) * _GRID)
    return tuple(_sum_up_to(x, axis) for x in (coarse, log_decay - coarse))


def _sum_up_to(x, axis):
    """Sums over s <= i. Multiples of the grid stay exact in a product with ones as they do one by one."""
    length = x.shape[axis]
    if length > _LONGEST_PRODUCT:
        return lax.associative_scan(jnp.add, x, axis=axis)
    ones = jnp.asarray(np.tril(np.ones((length, length))), x.dtype)
    operands = (x, ones.T) if axis == -1 else (ones, x)
    return jnp.matmul(*operands, precision=lax.Precision.HIGHEST)


def segment_sum(log_decay: Float[Array, "*B T"]) -> Float[Array, "*B T T"]:
    """Returns M[..., i, j] = sum of log_decay over j < s <= i, and -inf above the diagonal.

    Args:
      log_decay: logarithms of decays, at most 0; those below `LOWEST` count as `LOWEST`.

    Returns:
      The matrices in float32 at least; exp of them has ones on the diagonal and is free of NaN, as is its gradient.
    """
    coarse, fine = running_sums(log_decay)
    between = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    length = log_decay.shape[-1]
    return jnp.where(np.tril(np.ones((length, length), bool)), between, -jnp.inf)
