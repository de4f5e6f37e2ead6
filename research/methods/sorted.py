"""SortedNet (arXiv 2309.00255), algorithm 1 with random accumulation: an update draws several sub-networks, each with
its own microbatch, and sums their gradients."""

from dataclasses import dataclass
from typing import Annotated

from research.nested.draws import Draw, generator
from research.nested.space import Space
from research.train.method import Method
from research.train.method_registry import register
from research.values import SIZE


@register("sorted")
@dataclass(frozen=True)
class Sorted(Method):
    """The method.

    Attributes:
      count: sub-networks of an update (g_acc).
    """

    paper = "arXiv 2309.00255"
    chooses = True

    count: Annotated[int, SIZE] = 4

    def draws(self, space: Space, seed: int, step: int) -> tuple[Draw, ...]:
        chosen = generator(seed, step).integers(len(space.order), size=self.count)
        return tuple(Draw(space.order[int(i)], microbatch=k, microbatches=self.count) for k, i in enumerate(chosen))
