"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, section 3.4.2).

Feature i of the first half turns with feature i of the second half, as in GPT-NeoX and Llama, not with its neighbour.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.ops.precision import wide

THETA = 10000.0


def rotary(
    x: Float[Array, "*B H K"], positions: Int[Array, "..."] | int, theta: float = THETA
) -> Float[Array, "*B H K"]:
    """Turns the features of every head by angles position * theta^(-2 i / K), so that products of rows know only
    distances.

    Args:
      x: queries or keys; K even.
      positions: of the tokens, from anywhere on; broadcasts to the axes *B, so [T] or [B, T] for x [B, T, H, K].
      theta: base of the wavelengths.

    Returns:
      The turned features in the dtype of x; angles and products are float32 at least.
    """
    half = x.shape[-1] // 2
    rates = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = (jnp.asarray(positions, jnp.float32)[..., None] * rates)[..., None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(wide(x), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
