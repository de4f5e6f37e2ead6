"""Learning-rate schedules as functions of the update's index: warm-up, then cosine, linear, constant or cosine
power."""

import math

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

from research.errors import UserError
from research.optim.section import SCHEDULES


def cosine_power(peak: float, total: int, order: float, final: float = 0.0) -> optax.Schedule:
    """Cosine power annealing (sharpDARTS, arXiv 1903.09900, section 3.4): exactly `peak` at step 0, `final` at `total -
    1`.

    Args:
      peak: first learning rate.
      total: number of updates; one alone has `peak`.
      order: p >= 1; 1 is plain cosine, larger falls faster.
      final: last learning rate.
    """
    if total == 1:
        return optax.constant_schedule(peak)

    def curve(e: ArrayLike) -> Array:
        """p^c - 1 with c falling from 1 to 0, which differs from the paper's p^(c + 1) by factors that cancel."""
        c = (1 + jnp.cos(jnp.pi * e / total)) / 2
        return c if order == 1 else jnp.expm1(math.log(order) * c)

    def schedule(step: ArrayLike) -> Array:
        return final + (peak - final) * curve(jnp.minimum(step + 1, total)) / curve(1)

    return schedule


def make_schedule(
    kind: str, *, peak: float, total: int, warmup: int = 0, final: float = 0.0, order: float = 2.0
) -> optax.Schedule:
    """Returns learning rate as a function of the update's index.

    Args:
      kind: one of SCHEDULES.
      peak: largest learning rate.
      total: number of updates, warm-up included.
      warmup: updates of linear rise; update i < warmup has peak * (i + 1) / (warmup + 1).
      final: learning rate at the end.
      order: p of cosine power annealing.

    Raises:
      UserError: unknown kind, or a warm-up longer than the run.
    """
    if kind not in SCHEDULES:
        raise UserError(f"unknown optim.schedule {kind!r}; valid: {', '.join(SCHEDULES)}")
    if not 0 <= warmup <= total:
        raise UserError(f"optim.warmup of {warmup} updates does not fit in a run of {total}; valid: 0 to {total}")
    rest = max(total - warmup, 1)
    main = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=final / peak if peak else 0.0),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
        "constant": lambda: optax.constant_schedule(peak),
        "cosine_power": lambda: cosine_power(peak, rest, order, final),
    }[kind]()
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, main], [warmup]) if warmup else main
