"""Which sub-networks a step trains: small functions of (seed, step) over a list of names.

"full" trains the full network only; "random" one drawn uniformly (AutoFormer, MatFormer); "sorted" draws
`count` of them, each with its own part of the batch, and makes one update (SortedNet, arXiv 2309.00255);
"sandwich" takes the largest, the smallest and `count - 2` random ones, the others learning from the largest's
outputs (universally slimmable networks, arXiv 1903.05134); "all" trains every one (slimmable, Matryoshka).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from research.errors import UserError


@dataclass(frozen=True)
class Draw:
    """One sub-network of a step: its name, whether it learns from the full network's outputs on the same part, its part
    of the batch."""

    name: str
    distill: bool = False
    part: int = 0
    parts: int = 1


def _generator(seed: int, step: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))


def _full(names, count, seed, step):
    return (Draw(names[0]),)


def _random(names, count, seed, step):
    return (Draw(names[int(_generator(seed, step).integers(len(names)))]),)


def _sorted(names, count, seed, step):
    chosen = _generator(seed, step).integers(len(names), size=count)
    return tuple(Draw(names[int(i)], part=k, parts=count) for k, i in enumerate(chosen))


def _sandwich(names, count, seed, step):
    middle = names[1:-1]
    take = min(max(count - 2, 0), len(middle))
    chosen = sorted(_generator(seed, step).choice(len(middle), size=take, replace=False)) if take else []
    return (Draw(names[0]), *(Draw(middle[int(i)], distill=True) for i in chosen), Draw(names[-1], distill=True))


def _all(names, count, seed, step):
    return tuple(Draw(name) for name in names)


@dataclass(frozen=True)
class Scheme:
    """How the sub-networks of an update are chosen, and which fields of the config's section `nested` that depends
    on."""

    choose: Callable[[Sequence[str], int, int, int], tuple[Draw, ...]]
    reads: tuple[str, ...] = ()


SCHEMES = {
    "full": Scheme(_full),
    "random": Scheme(_random),
    "sorted": Scheme(_sorted, ("count", "reduce", "spread")),
    "sandwich": Scheme(_sandwich, ("count", "reduce", "distill")),
    "all": Scheme(_all, ("reduce",)),
}


def draw(scheme: str, names: Sequence[str], count: int, seed: int, step: int) -> tuple[Draw, ...]:
    """Returns the sub-networks that update `step` trains, in order; a pure function, equal on all hosts.

    Args:
      scheme: a key of SCHEMES.
      names: the space's names, the largest first, the smallest last.
      count: sub-networks per update for "sorted" (g_acc) and "sandwich" (n).
      seed: the run's seed.
      step: index of the update.

    Raises:
      UserError: unknown scheme, too few names for it, or a network that distils without a teacher.
    """
    if scheme not in SCHEMES:
        raise UserError(f"unknown nested.scheme {scheme!r}; valid: {', '.join(SCHEMES)}")
    if scheme == "sandwich" and len(names) < 2:
        raise UserError("nested.scheme sandwich needs at least two sub-networks in nested.points")
    draws = SCHEMES[scheme].choose(names, count, seed, step)
    for place, one in enumerate(draws):
        if one.distill and not any((d.name, d.part, d.parts) == (names[0], one.part, one.parts) for d in draws[:place]):
            raise UserError(
                f"nested.scheme {scheme!r} distils {one.name} in part {one.part} of {one.parts} at update {step}, where the network that it "
                f"learns from, {names[0]}, is not drawn before it"
            )
    return draws
