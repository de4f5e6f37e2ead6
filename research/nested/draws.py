"""Which sub-networks an update trains: what a method that chooses them returns, as a pure function of (seed, round)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from research.errors import UserError
from research.nested.space import Space


@dataclass(frozen=True)
class Draw:
    """One sub-network of an update: its name, whether it learns from the full network's outputs on the same
    microbatch, and which of how many microbatches it is trained on."""

    name: str
    distill: bool = False
    microbatch: int = 0
    microbatches: int = 1


def generator(seed: int, step: int) -> np.random.Generator:
    """Returns the random numbers of one round of updates, equal on all hosts."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))


def checked(draws: tuple[Draw, ...], space: Space, method: str, step: int) -> tuple[Draw, ...]:
    """Returns the draws of an update.

    Args:
      space: of the run.
      method: that has chosen.

    Raises:
      UserError: none at all, one that is not in the space, or one that distils without a teacher.
    """
    if not draws:
        raise UserError(f"method {method!r} draws no network at update {step}")
    for place, one in enumerate(draws):
        if one.name not in space.configs:
            raise UserError(f"method {method!r} draws {one.name!r} at update {step}; valid: {', '.join(space.configs)}")
        if one.distill and not any(d.name == "full" and same_rows(d, one) for d in draws[:place]):
            raise UserError(
                f"method {method!r} distils {one.name} on microbatch {one.microbatch} of {one.microbatches} at update "
                f"{step}, where the network that it learns from, full, is not drawn before it"
            )
    return draws


def same_rows(one: Draw, other: Draw) -> bool:
    """Whether two draws are trained on the same microbatch."""
    return (one.microbatch, one.microbatches) == (other.microbatch, other.microbatches)


def teaches(draw: Draw, draws: Sequence[Draw]) -> bool:
    """Whether others of an update learn from a draw's outputs: only then are they kept."""
    return draw.name == "full" and any(d.distill and same_rows(d, draw) for d in draws)
