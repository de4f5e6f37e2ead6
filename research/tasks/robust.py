"""Classification as it is evaluated under attack: accuracy of clean and of attacked images, and the images of each
pathway.

Of a model that routes images it knows what every model declares (`research.models.base.ModelConfig.pathways`): how many
pathways there are, and that the method `with_scores` returns (logits, scores of the pathways [B, E]).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from research.robust.attacks import pgd
from research.robust.losses import cross_entropy
from research.tasks.base import Batch
from research.tasks.classification import Classification

Run = Callable[..., Any]


@dataclass(frozen=True)
class AttackedClassification(Classification):
    """The task. Images are in [0, 1], without normalisation.

    Attributes:
      epsilon: radius of the attack, in units of the range of a pixel.
      eval_steps: PGD steps of an evaluation, of size epsilon / 4; 0: there the images are not attacked.
      pathways: of the model, 0 or 1 where nothing routes.
    """

    name: ClassVar[str] = "robust classification"
    beside: ClassVar[tuple[str, ...]] = ("accuracy",)
    in_percent: ClassVar[frozenset[str]] = Classification.in_percent | {"robust_accuracy"}

    epsilon: float = 8 / 255
    eval_steps: int = 0
    pathways: int = 0

    @property
    def metric(self) -> str:  # type: ignore[override]  # of the class elsewhere; here it follows from an option
        return "robust_accuracy" if self.eval_steps else "accuracy"

    @property
    def routed(self) -> bool:
        return self.pathways > 1

    def zero_sums(self) -> dict[str, Any]:
        attacked = {"robust": 0.0} if self.eval_steps else {}
        load = {"load": np.zeros(self.pathways, np.float32)} if self.routed else {}
        return {**super().zero_sums(), **attacked, **load}

    def examine(self, forward: Run, batch: Batch) -> dict[str, Array]:
        """Returns the sums of a batch: of clean images, of attacked ones where `eval_steps` asks for it, and images per
        expert."""
        image, label = batch["image"], batch["label"]
        mask = batch.get("mask", jnp.ones(len(image), jnp.float32))
        logits, scores = outputs(forward, image, self.routed)
        sums = self.sums(logits, batch)
        if self.eval_steps:
            how: dict[str, Any] = {"epsilon": self.epsilon, "steps": self.eval_steps, "step_size": self.epsilon / 4}
            attacked = pgd(lambda x: cross_entropy(forward(x), label), image, jax.random.key(0), **how)
            right = (forward(attacked).argmax(-1) == label) & (logits.argmax(-1) == label)
            sums["robust"] = (right * mask).sum()
        if scores is not None:
            sums["load"] = (jax.nn.one_hot(scores.argmax(-1), self.pathways) * mask[:, None]).sum(0)
        return sums

    def summarize(self, sums: dict[str, Any]) -> dict[str, float]:
        """Returns accuracy, loss, robust_accuracy (under PGD of `eval_steps`) and expert_I, the share of the images of
        each."""
        count = max(float(sums["count"]), 1.0)
        out = super().summarize(sums)
        if "robust" in sums:
            out["robust_accuracy"] = float(sums["robust"]) / count
        return out | {f"expert_{i}": float(n) / count for i, n in enumerate(np.asarray(sums.get("load", ())))}

    def columns(self, metrics: Mapping[str, float]) -> dict[str, float]:
        shares = {name: value for name, value in metrics.items() if name.startswith("expert_")}
        return shares | super().columns(metrics)


def outputs(run: Run, x: Array, routed: bool, **how: Any) -> tuple[Array, Array | None]:
    """Returns a model's logits, and the scores of its pathways where it has several.

    Args:
      how: of `research.tasks.base.Forward`.
    """
    return run(x, method="with_scores", **how) if routed else (run(x, **how), None)


def accuracy(logits: Array, target: Array) -> Array:
    """Returns the share of the examples whose largest logit is the target's."""
    return (logits.argmax(-1) == target.argmax(-1)).mean()
