"""Which sub-networks an update trains: what a method that chooses them returns, as a pure function of (seed, round)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from research.errors import UserError


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


def checked(draws: tuple[Draw, ...], names: Sequence[str], method: str, step: int) -> tuple[Draw, ...]:
    """Returns the draws of an update.

    Args:
      names: of the space, the largest first.
      method: that has chosen.

    Raises:
      UserError: a network that distils without a teacher.
    """
    for place, one in enumerate(draws):
        if one.distill and not any(d.name == names[0] and same_rows(d, one) for d in draws[:place]):
            raise UserError(
                f"method {method!r} distils {one.name} on microbatch {one.microbatch} of {one.microbatches} at update "
                f"{step}, where the network that it learns from, {names[0]}, is not drawn before it"
            )
    return draws


def same_rows(one: Draw, other: Draw) -> bool:
    """Whether two draws are trained on the same microbatch."""
    return (one.microbatch, one.microbatches) == (other.microbatch, other.microbatches)


def teaches(draw: Draw, draws: Sequence[Draw]) -> bool:
    """Whether others of an update learn from a draw's outputs: only then are they kept."""
    return draw.name == "full" and any(d.distill and same_rows(d, draw) for d in draws)
