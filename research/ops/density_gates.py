"""How HMoDE mixes density maps (Du et al. 2023, arXiv 2208.02894), and the resizing that it needs. No parameters."""

import jax.numpy as jnp
from jaxtyping import Array, Float

PAIRS = ((0, 1), (0, 2), (1, 2))
"""The experts of each mixture of the first level."""


def mix_pairs(
    experts: Float[Array, "B H W 3"], pairs: Float[Array, "B H W 3 2"], mixtures: Float[Array, "B H W 3"]
) -> Float[Array, "B H W 7"]:
    """Returns D1, D2, D3, M1, M2, M3, D: experts, their mixtures in pairs, and the mixture of these.

    Args:
      experts: density maps.
      pairs: weights of the two experts of each of PAIRS; they sum to 1.
      mixtures: weights of the three mixtures; they sum to 1.
    """
    first = [
        (pairs[..., i, :] * jnp.stack([experts[..., a], experts[..., b]], -1)).sum(-1) for i, (a, b) in enumerate(PAIRS)
    ]
    mixed = jnp.stack(first, -1)
    return jnp.concatenate([experts, mixed, (mixtures * mixed).sum(-1, keepdims=True)], -1)


def importance_variation(weights: Float[Array, "*B G E"], eps: float = 1e-10) -> Float[Array, ""]:
    """Sum over G gates of var(I) / (mean(I)^2 + eps), I the E experts' summed weights, with the unbiased variance.

    Zero where the experts of each gate are equally important (Shazeer et al. 2017, arXiv 1701.06538, section 4, there
    with its root).
    """
    importance = weights.sum(tuple(range(weights.ndim - 2)))
    return (importance.var(-1, ddof=1) / (jnp.square(importance.mean(-1)) + eps)).sum()


def nearest(x: Float[Array, "B h w *C"], times: int) -> Float[Array, "B H W *C"]:
    """Repeats every pixel `times` by `times`."""
    return x if times == 1 else x.repeat(times, 1).repeat(times, 2)


def upsample(x: Float[Array, "B h w C"]) -> Float[Array, "B H W C"]:
    """Doubles height and width bilinearly with aligned corners: the first and the last pixels of an axis keep their
    places and values.

    New pixel i of 2 n lies at i (n - 1) / (2 n - 1) of the old ones: pixel 2 k lies k / (2 n - 1) before the old k,
    pixel 2 k + 1 lies (n - 1 - k) / (2 n - 1) after it.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        take = lambda a, b, axis=axis, x=x: jnp.take(x, jnp.arange(a, b).clip(0, x.shape[axis] - 1), axis=axis)
        weights = jnp.arange(size, dtype=x.dtype).reshape(-1, *(1,) * (3 - axis)) / (2 * size - 1)
        even = x + weights * (take(-1, size - 1) - x)
        odd = x + jnp.flip(weights, 0) * (take(1, size + 1) - x)
        x = jnp.stack([even, odd], axis + 1).reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
    return x
