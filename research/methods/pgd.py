"""Adversarial training by PGD (Madry et al. 2018, arXiv 1706.06083): cross entropy of attacked images."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array

from research.methods.bases.adversarial import Adversarial, is_routed, shares
from research.robust.attacks import pgd
from research.robust.losses import cross_entropy
from research.tasks.base import Example, Forward, Outcome, Task
from research.tasks.robust import accuracy, outputs
from research.train.hooks import Objective
from research.train.method_registry import register


@register("pgd")
@dataclass(frozen=True)
class Pgd(Adversarial):
    """Cross entropy of images attacked by PGD."""

    paper = "arXiv 1706.06083"
    teaches = False  # networks see images of their own

    def objective(self, inner: Objective, task: Task) -> Objective:
        del inner
        routed = is_routed(task)

        def objective(forward: Forward, example: Example) -> Outcome:
            (image,), target = example.inputs, example.target
            seen: Callable[[Array], Array] = lambda x: forward(x, mode=self.mode, params="frozen")
            attacked = pgd(lambda x: cross_entropy(seen(x), target), image, example.key, **self.how)
            logits, scores = outputs(forward, attacked, routed)
            loss = cross_entropy(logits, target).mean()
            return Outcome(loss, {"robust_accuracy": accuracy(logits, target), **shares(scores)})

        return objective

    def work(self) -> float:
        return (2 * self.steps + 3) / 3
