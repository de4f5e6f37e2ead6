"""How alike the experts of a mixture are."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

KERNELS = ("up", "gate", "down")
"""Of the experts, as `research.modules.moe.MoeFfn` calls them."""


def similarity(kernels: Mapping[str, Float[Array, "*L E A B"]]) -> Float[Array, " *L"]:
    """Returns the mean cosine of the angle between the kernels of two experts, over all pairs and kernels: 1 for
    copies, about 0 for strangers."""
    means = []
    for kernel in kernels.values():
        flat = kernel.reshape(*kernel.shape[:-2], -1).astype(jnp.float32)
        unit = flat / jnp.maximum(jnp.linalg.norm(flat, axis=-1, keepdims=True), 1e-20)
        count = flat.shape[-2]
        # The squared length of the sum of unit vectors is their number plus twice the sum over pairs.
        pairs = jnp.square(unit.sum(-2)).sum(-1) - count
        means.append(pairs / max(count * (count - 1), 1))
    return jnp.stack(means).mean(0)
