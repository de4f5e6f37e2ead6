"""AdvMoE (Zhang et al. 2023, arXiv 2308.10110): adversarial training of a mixture by alternation, an update of the
experts, one of the router."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from jaxtyping import Array

from research.errors import UserError
from research.methods.bases.adversarial import NOISE, Adversarial, shares, trades_outcome
from research.robust.attacks import pgd
from research.robust.losses import cross_entropy, kl_logits
from research.tasks.base import Example, Forward, Outcome, Task
from research.train.hooks import About, Objective, Phase
from research.train.method_registry import register
from research.values import WEIGHT


@register("advmoe")
@dataclass(frozen=True)
class AdvMoe(Adversarial):
    """The method.

    Attributes:
      beta: weight of the KL divergences.
      alpha: weight of the router's cross entropy towards y mod n, which balances the load without a loss of its own.
      shared_attack: both phases attack the sum of the two divergences (the released code); else each attacks the one
        that its own loss holds, the experts' outputs or the router's scores (the paper's two levels).
    """

    paper = "arXiv 2308.10110"

    beta: Annotated[float, WEIGHT] = 6.0
    alpha: Annotated[float, WEIGHT] = 6.0
    shared_attack: bool = False

    def check(self, about: About) -> None:
        super().check(about)
        if about.space.full.pathways < 2:
            raise UserError(
                "method advmoe needs a model with a router, e.g. advmoe_resnet18; valid otherwise: pgd, trades"
            )

    def phases(self, model: Any) -> tuple[Phase, ...]:
        is_router: Callable[[str], bool] = lambda name: name.startswith(model.router)
        experts = Phase("experts", trains=lambda name: not is_router(name))
        return (experts, Phase("router", trains=is_router, outputs=False))

    def objective(self, inner: Objective, task: Task) -> Objective:
        del inner, task

        def objective(forward: Forward, example: Example) -> Outcome:
            attacked = self.attacked(forward, example)
            if example.phase == "router":
                return self._router(forward, example, attacked)
            outcome = trades_outcome(forward, example, attacked, True, self.beta)
            return outcome._replace(measured=outcome.measured | {"loss_experts": outcome.loss})

        return objective

    def _router(self, forward: Forward, example: Example, attacked: Array) -> Outcome:
        (image,), target = example.inputs, example.target
        clean, scores = forward(image, method="scores"), forward(attacked, method="scores")
        labels = target.argmax(-1) % clean.shape[-1]
        loss = self.alpha * cross_entropy(clean, labels).mean() + self.beta * kl_logits(clean, scores).mean()
        measured = {"loss_router": loss, "router_accuracy": (clean.argmax(-1) == labels).mean(), **shares(clean)}
        return Outcome(loss, measured)

    def attacked(self, forward: Forward, example: Example) -> Array:
        """Returns the attacked images of a phase; the router's clean scores are those of training mode."""
        (image,), frozen = example.inputs, "frozen"
        clean, _ = forward(image, method="with_scores", params=frozen)
        clean_scores = forward(image, method="scores", mode="train", params=frozen)

        def divergence(x: Array) -> Array:
            logits, scores = forward(x, method="with_scores", mode=self.mode, params=frozen)
            of_outputs, of_scores = kl_logits(clean, logits), kl_logits(clean_scores, scores)
            own = {"experts": of_outputs, "router": of_scores}[example.phase]
            return of_outputs + of_scores if self.shared_attack else own

        return pgd(divergence, image, example.key, noise=NOISE, **self.how)

    def work(self) -> float:
        attack = 2 * self.steps + 1
        # Without a shared attack the router's part, its own attack included, costs next to nothing.
        return ((attack if self.shared_attack else attack / 2) + 6 / 2) / 3
