"""Which sub-networks an update trains: what a method that chooses them returns, as a pure function of (seed, round)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from research.errors import UserError


@dataclass(frozen=True)
class Draw:
    """One sub-network of an update: its name, whether it learns from the full network's outputs on the same part, its
    part of the batch."""

    name: str
    distill: bool = False
    part: int = 0
    parts: int = 1


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
        if one.distill and not any((d.name, d.part, d.parts) == (names[0], one.part, one.parts) for d in draws[:place]):
            raise UserError(
                f"method {method!r} distils {one.name} in part {one.part} of {one.parts} at update {step}, where the "
                f"network that it learns from, {names[0]}, is not drawn before it"
            )
    return draws


def teaches(draw: Draw, draws: Sequence[Draw]) -> bool:
    """Whether others of an update learn from a draw's outputs: only then are they kept."""
    return draw.name == "full" and any(d.distill and (d.part, d.parts) == (draw.part, draw.parts) for d in draws)
