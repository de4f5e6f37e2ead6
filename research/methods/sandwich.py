"""The sandwich rule with in-place distillation (universally slimmable networks, arXiv 1903.05134): an update trains the
largest sub-network, the smallest and some random ones between, which learn from the largest one's outputs."""

from dataclasses import dataclass
from typing import Annotated

from research.errors import UserError
from research.nested.draws import Draw, generator
from research.nested.space import Space
from research.tasks.base import Example, Forward, Outcome, Task
from research.train.hooks import About, Objective
from research.train.method import Method
from research.train.method_registry import register
from research.values import SHARE, SIZE


@register("sandwich")
@dataclass(frozen=True)
class Sandwich(Method):
    """The method.

    Attributes:
      count: sub-networks of an update (n).
      distill: share of the teacher's term in the loss of those that learn from it.
    """

    paper = "arXiv 1903.05134"
    chooses = True

    count: Annotated[int, SIZE] = 4
    distill: Annotated[float, SHARE] = 1.0

    def check(self, about: About) -> None:
        if len(about.space.names()) < 2:
            raise UserError("method sandwich needs at least two sub-networks: give nested.points")
        for method in about.methods:
            if not method.teaches:
                raise UserError(
                    f"method sandwich teaches by outputs, of which the objective of {method.name} has none to learn "
                    "from"
                )

    def draws(self, space: Space, seed: int, step: int) -> tuple[Draw, ...]:
        largest, *middle, smallest = space.order
        take = min(max(self.count - 2, 0), len(middle))
        chosen = sorted(generator(seed, step).choice(len(middle), size=take, replace=False)) if take else []
        learners = (*(middle[int(i)] for i in chosen), smallest)
        return (Draw(largest), *(Draw(name, distill=True) for name in learners))

    def objective(self, inner: Objective, task: Task) -> Objective:
        share = self.distill

        def objective(forward: Forward, example: Example) -> Outcome:
            outcome = inner(forward, example)
            if example.teacher is None:
                return outcome
            taught = task.distill(outcome.outputs, example.teacher, example.target)
            return outcome._replace(loss=(1 - share) * outcome.loss + share * taught)

        return objective
