"""Losses of robust training and of attacks, one number per example, in float32 at least."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.ops.precision import wide


def cross_entropy(logits: Float[Array, "B N"], target: Int[Array, " B"] | Float[Array, "B N"]) -> Float[Array, " B"]:
    """Returns -sum_i p_i log softmax(z)_i in nats, for labels or for distributions p."""
    target = jax.nn.one_hot(target, logits.shape[-1]) if target.ndim == 1 else target
    return -(target * jax.nn.log_softmax(wide(logits))).sum(-1)


def dlr(logits: Float[Array, "B N"], label: Int[Array, " B"]) -> Float[Array, " B"]:
    """Returns the difference of logits ratio, -(z_y - max_{i != y} z_i) / (z_1st - z_3rd): above 0 where the label is
    not the largest.

    Shifts and scales of the logits do not change it; three classes at least.

    Source: Croce and Hein 2020, arXiv 2003.01690, equation 6.
    """
    own, other, ordered = _parts(logits, label)
    return -(own - other) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def targeted_dlr(logits: Float[Array, "B N"], label: Int[Array, " B"], goal: Int[Array, " B"]) -> Float[Array, " B"]:
    """Returns -(z_y - z_t) / (z_1st - (z_3rd + z_4th) / 2) for the goal t; four classes at least.

    Source: Croce and Hein 2020, arXiv 2003.01690, equation 7.
    """
    own, _, ordered = _parts(logits, label)
    wanted = (wide(logits) * jax.nn.one_hot(goal, logits.shape[-1])).sum(-1)
    return -(own - wanted) / (ordered[:, -1] - (ordered[:, -3] + ordered[:, -4]) / 2 + 1e-12)


def _parts(logits: Array, label: Array) -> tuple[Array, Array, Array]:
    """The label's logit, the largest other one, and all in ascending order."""
    logits = wide(logits)
    mine = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
    own, other = jnp.where(mine, logits, 0).sum(-1), jnp.where(mine, -jnp.inf, logits).max(-1)
    return own, other, jnp.sort(logits, axis=-1)


def kl_logits(first: Float[Array, "B N"], second: Float[Array, "B N"]) -> Float[Array, " B"]:
    """Returns KL(softmax(first) || softmax(second)) in nats, from two log-softmaxes.

    Value and gradients are finite at any gap between logits: written with probabilities, the derivative of t log t is
    NaN where t underflows to 0.
    """
    first, second = jax.nn.log_softmax(wide(first)), jax.nn.log_softmax(wide(second))
    return (jnp.exp(first) * (first - second)).sum(-1)


def trades(
    clean: Float[Array, "B N"],
    attacked: Float[Array, "B N"],
    target: Int[Array, " B"] | Float[Array, "B N"],
    beta: float,
) -> Float[Array, ""]:
    """Returns the mean of CE(f(x), y) + beta KL(f(x) || f(x')); both terms have gradients through f(x).

    Source: TRADES (Zhang et al. 2019, arXiv 1901.08573), equation 5, with the KL divergence as its loss, as released.
    """
    return cross_entropy(clean, target).mean() + beta * kl_logits(clean, attacked).mean()
