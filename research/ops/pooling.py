"""Pooling over small windows without `reduce_window`, whose gradient is slow on a CPU, and over the real tokens of
sequences."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def max_pool_2x2(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Maximum over 2x2 windows of stride 2; of equal values each gets its share of the gradient. An odd last row or
    column is left out.

    Pairwise, not by a reduction: the gradient of `max` divides by the number of values that equal it, and XLA may
    compute a value again, with another rounding, so that none does.
    """
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    rows = jnp.maximum(x[:, 0:height:2], x[:, 1:height:2])
    return jnp.maximum(rows[:, :, 0:width:2], rows[:, :, 1:width:2])


def masked_mean(x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """Returns the mean over the tokens where `mask` is true; zeros where it nowhere is."""
    weights = mask.astype(x.dtype)[..., None]
    return (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1)


def masked_last(x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """Returns the last token where `mask` is true; the last of all where it nowhere is."""
    last = x.shape[1] - 1 - mask[:, ::-1].argmax(1)
    return jnp.take_along_axis(x, last[:, None, None], 1)[:, 0]
