"""TRADES (Zhang et al. 2019, arXiv 1901.08573): cross entropy of clean images and the divergence of attacked ones."""

from dataclasses import dataclass
from typing import Annotated

from research.methods.bases.adversarial import NOISE, Adversarial, is_routed, trades_outcome
from research.robust.attacks import pgd
from research.robust.losses import kl_logits
from research.tasks.base import Example, Forward, Outcome, Task
from research.tasks.robust import outputs
from research.train.hooks import Objective
from research.train.method_registry import register
from research.values import WEIGHT


@register("trades")
@dataclass(frozen=True)
class Trades(Adversarial):
    """TRADES; of a mixture all parameters at once.

    Attributes:
      beta: weight of the KL divergence.
    """

    paper = "arXiv 1901.08573"

    beta: Annotated[float, WEIGHT] = 6.0

    def objective(self, inner: Objective, task: Task) -> Objective:
        del inner
        routed = is_routed(task)

        def objective(forward: Forward, example: Example) -> Outcome:
            (image,), frozen = example.inputs, "frozen"
            clean, _ = outputs(forward, image, routed, params=frozen)
            divergence = lambda x: kl_logits(clean, forward(x, mode=self.mode, params=frozen))
            attacked = pgd(divergence, image, example.key, noise=NOISE, **self.how)
            return trades_outcome(forward, example, attacked, routed, self.beta)

        return objective

    def work(self) -> float:
        return (2 * self.steps + 1 + 6) / 3
