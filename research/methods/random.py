"""One sub-network an update, drawn uniformly from the named ones (AutoFormer, arXiv 2107.00651; MatFormer, arXiv
2310.07707)."""

from dataclasses import dataclass

from research.nested.draws import Draw, generator
from research.nested.space import Space
from research.train.method import Method
from research.train.method_registry import register


@register("random")
@dataclass(frozen=True)
class Random(Method):
    """The method."""

    paper = "arXiv 2107.00651, 2310.07707"
    chooses = True

    def draws(self, space: Space, seed: int, step: int) -> tuple[Draw, ...]:
        return (Draw(space.order[int(generator(seed, step).integers(len(space.order)))]),)
