"""Every named sub-network in every update, on the same batch (slimmable networks, arXiv 1812.08928; Matryoshka
representations, arXiv 2205.13147)."""

from dataclasses import dataclass

from research.nested.draws import Draw
from research.nested.space import Space
from research.train.method import Method
from research.train.method_registry import register


@register("all")
@dataclass(frozen=True)
class All(Method):
    """The method."""

    paper = "arXiv 1812.08928, 2205.13147"
    chooses = True

    def draws(self, space: Space, seed: int, step: int) -> tuple[Draw, ...]:
        del seed, step
        return tuple(Draw(name) for name in space.order)
