"""Classification under attack: adversarial training, TRADES, and the alternation of experts and router (AdvMoE).

Images are in [0, 1], without normalisation. The loop gives the model as two functions of (x, method): `train` has
gradients of the parameters and moves the running statistics; `frozen`, which attacks see, has and does neither and is
in eval mode unless asked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from research.errors import UserError
from research.robust.attacks import pgd
from research.robust.losses import cross_entropy, kl_logits, trades
from research.tasks.base import Batch
from research.tasks.classification import Classification

ATTACK = ("epsilon", "steps", "step_size", "through_gate", "eval_steps")
METHODS = {
    "pgd": ATTACK,  # cross entropy of images attacked by PGD (Madry et al. 2018, arXiv 1706.06083)
    "trades": (*ATTACK, "beta"),  # TRADES (Zhang et al. 2019, arXiv 1901.08573), of a mixture all parameters at once
    "alternate": (
        *ATTACK,
        "beta",
        "alpha",
        "shared_attack",
    ),  # AdvMoE (arXiv 2308.10110): an update of the experts, one of the router
}
"""Method -> the options of task.robust that it reads."""
NOISE = 1e-3  # standard deviation of the start of TRADES' attack

Run = Callable[..., Any]


@dataclass(frozen=True)
class RobustClassification(Classification):
    """The task.

    Attributes:
      method: one of `METHODS`.
      epsilon, steps, step_size: of the attack in training, in units of the range of a pixel.
      beta: weight of the KL divergence.
      alpha: of alternate, weight of the router's cross entropy towards y mod n, which balances the load without a loss
        of its own.
      shared_attack: of alternate, both phases attack the sum of the two divergences (the released code); else each
        attacks the one that its own loss holds, the experts' outputs or the router's scores (the paper's two levels).
      through_gate: in training, attacks on a mixture follow its router's straight-through gate too (the released code),
        instead of the gradient of the function; evaluations never do.
      eval_steps: PGD steps of an evaluation, of size epsilon / 4; 0: there the images are not attacked.
      experts: pathways of the model, 0 or 1 where nothing routes.
      router: what the names of the router's parameters start with.
    """

    name: ClassVar[str] = "robust classification"

    method: str = "pgd"
    epsilon: float = 8 / 255
    steps: int = 2
    step_size: float = 5 / 255
    beta: float = 6.0
    alpha: float = 6.0
    shared_attack: bool = False
    through_gate: bool = False
    eval_steps: int = 0
    experts: int = 0
    router: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.method not in METHODS:
            raise UserError(f"task.robust.method={self.method!r}; valid: none, {', '.join(METHODS)}")
        if not 0 < self.epsilon <= 1 or self.step_size <= 0:
            raise UserError(
                f"task.robust: epsilon={self.epsilon:g}, step_size={self.step_size:g}; valid: above 0, epsilon up to 1, the range of a pixel"
            )
        if self.steps < 1 or self.eval_steps < 0:
            raise UserError(
                f"task.robust: steps={self.steps}, eval_steps={self.eval_steps}; valid: steps from 1, eval_steps from 0"
            )
        if self.beta < 0 or self.alpha < 0:
            raise UserError(f"task.robust: beta={self.beta:g}, alpha={self.alpha:g}; valid: weights from 0")
        if self.method == "alternate" and not self.routed:
            raise UserError(
                "task.robust.method='alternate' needs a model with a router, e.g. advmoe_resnet18; valid otherwise: pgd, trades"
            )

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "robust_accuracy" if self.eval_steps else "accuracy"

    @property
    def routed(self) -> bool:
        return self.experts > 1

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of a round of updates, which share a batch."""
        return ("experts", "router") if self.method == "alternate" else ("all",)

    @property
    def work(self) -> float:
        """What an update costs, in those of plain training (three forward passes), the mean over the phases."""
        attack = 2 * self.steps
        if self.method == "pgd":
            return (attack + 3) / 3
        attack += 1  # the clean pass
        if self.method == "alternate" and not self.shared_attack:
            attack /= 2  # the router's part, its own attack included, costs next to nothing
        return (attack + 6 / len(self.phases)) / 3

    def trains(self, phase: str, name: str) -> bool:
        """Whether a phase moves the parameter of this name."""
        return phase == "all" or name.startswith(self.router) == (phase == "router")

    # --- training -----------------------------------------------------------------------------------------------------

    def objective(
        self,
        train: Run,
        frozen: Run,
        image: Float[Array, "B H W C"],
        target: Float[Array, "B N"],
        key: Array,
        phase: str,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns (loss, what is logged beside it) of a batch.

        Args:
          train, frozen: the model, see above; `method` is that of the module, `__call__` by default.
          image: in [0, 1].
          target: distributions over the classes.
          key: of the attack.
          phase: one of `phases`.
        """
        attacked = self._attack(frozen, image, target, key, phase)
        if phase == "router":
            return self._router_objective(train, image, attacked, target)
        if self.method == "pgd":
            logits, scores = self._outputs(train, attacked)
            loss = cross_entropy(logits, target).mean()
            return loss, {"robust_accuracy": _accuracy(logits, target), **self._shares(scores)}
        clean, scores = self._outputs(train, image)
        logits, _ = self._outputs(train, attacked)
        loss = trades(clean, logits, target, self.beta)
        measured = {
            "accuracy": _accuracy(clean, target),
            "robust_accuracy": _accuracy(logits, target),
            **self._shares(scores),
        }
        return loss, measured | ({"loss_experts": loss} if self.method == "alternate" else {})

    def _router_objective(
        self, train: Run, image: Array, attacked: Array, target: Array
    ) -> tuple[Array, dict[str, Array]]:
        clean, scores = train(image, "scores"), train(attacked, "scores")
        labels = target.argmax(-1) % clean.shape[-1]
        loss = self.alpha * cross_entropy(clean, labels).mean() + self.beta * kl_logits(clean, scores).mean()
        return loss, {
            "loss_router": loss,
            "router_accuracy": (clean.argmax(-1) == labels).mean(),
            **self._shares(clean),
        }

    def _attack(self, frozen: Run, image: Array, target: Array, key: Array, phase: str) -> Array:
        """The attack of the method; the router's clean scores are those of training mode."""
        how = {"epsilon": self.epsilon, "steps": self.steps, "step_size": self.step_size}
        mode = "through_gate" if self.through_gate else "eval"
        if self.method == "pgd":
            return pgd(lambda attacked: cross_entropy(frozen(attacked, mode=mode), target), image, key, **how)
        clean, _ = self._outputs(frozen, image)
        if self.method == "trades":
            return pgd(lambda attacked: kl_logits(clean, frozen(attacked, mode=mode)), image, key, noise=NOISE, **how)
        clean_scores = frozen(image, "scores", mode="train")

        def divergence(attacked):
            logits, scores = frozen(attacked, "with_scores", mode=mode)
            of_outputs, of_scores = kl_logits(clean, logits), kl_logits(clean_scores, scores)
            return of_outputs + of_scores if self.shared_attack else {"experts": of_outputs, "router": of_scores}[phase]

        return pgd(divergence, image, key, noise=NOISE, **how)

    def _outputs(self, run: Run, x: Array) -> tuple[Array, Array | None]:
        """Logits, and the router's scores where there is one."""
        return run(x, "with_scores") if self.routed else (run(x), None)

    def _shares(self, scores: Array | None) -> dict[str, Array]:
        """Share of the images that goes to each expert."""
        return {} if scores is None else {f"expert_{i}": (scores.argmax(-1) == i).mean() for i in range(self.experts)}

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def zero_sums(self) -> dict[str, Any]:
        attacked = {"robust": 0.0} if self.eval_steps else {}
        return {
            **super().zero_sums(),
            **attacked,
            **({"load": np.zeros(self.experts, np.float32)} if self.routed else {}),
        }

    def examine(self, frozen: Run, batch: Batch) -> dict[str, Array]:
        """Returns the sums of a batch: of clean images, of attacked ones where `eval_steps` asks for it, and images per
        expert."""
        image, label = batch["image"], batch["label"]
        mask = batch.get("mask", jnp.ones(len(image), jnp.float32))
        logits, scores = self._outputs(frozen, image)
        sums = self.sums(logits, batch)
        if self.eval_steps:
            how = {"epsilon": self.epsilon, "steps": self.eval_steps, "step_size": self.epsilon / 4}
            attacked = pgd(lambda x: cross_entropy(frozen(x), label), image, jax.random.key(0), **how)
            right = (frozen(attacked).argmax(-1) == label) & (logits.argmax(-1) == label)
            sums["robust"] = (right * mask).sum()
        if scores is not None:
            sums["load"] = (jax.nn.one_hot(scores.argmax(-1), self.experts) * mask[:, None]).sum(0)
        return sums

    def summarize(self, sums: dict[str, Any]) -> dict[str, float]:
        """Returns accuracy, loss, robust_accuracy (under PGD of `eval_steps`) and expert_I, the share of the images of
        each."""
        count = max(float(sums["count"]), 1.0)
        out = super().summarize(sums)
        if "robust" in sums:
            out["robust_accuracy"] = float(sums["robust"]) / count
        return out | {f"expert_{i}": float(n) / count for i, n in enumerate(np.asarray(sums.get("load", ())))}


def _accuracy(logits: Array, target: Array) -> Array:
    return (logits.argmax(-1) == target.argmax(-1)).mean()
