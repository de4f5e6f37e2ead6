"""Seeds: which ones there are, and the random key of each."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from research.errors import UserError

MOST = 2**64 - 1


def check(seed: Any, field: str = "seed") -> int:
    """Returns a seed that is valid.

    Raises:
      UserError: it is not a whole number of 64 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed <= MOST:
        raise UserError(f"{field}={seed!r}; valid: whole numbers from 0 to 2^64 - 1 = {MOST}")
    return int(seed)


def key(seed: int) -> Array:
    """Returns the random key of a seed: `jax.random.key` of it, which without 64-bit numbers reads the low 32 bits
    alone.

    Raises:
      UserError: a seed out of range.
    """
    high, low = divmod(check(seed), 2**32)
    if not high:
        return jax.random.key(low)
    return jax.random.wrap_key_data(jnp.asarray(np.array([high, low], np.uint32)), impl="threefry2x32")
