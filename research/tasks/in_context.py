"""In-context learning of functions (Garg et al. 2022, arXiv 2208.01066): predict each y from the pairs before it.

A batch is {"vectors": [B, 2 K, D] float, the sequence x_1, y_1, x_2, y_2, ... with y in coordinate 0, "targets": [B,
K]}. A target of NaN is not scored (a curriculum that begins with short prompts). The model's single output is read at
the places of the x. Regression takes the squared error, Boolean functions (labels of -1 and 1, arXiv 2310.03016) the
logistic loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from research.ops.precision import wide
from research.tasks.base import Batch, Task, real_tokens
from research.tasks.registry import register
from research.tasks.section import TaskSection


@register("in_context_learning")
@dataclass(frozen=True)
class InContextLearning(Task):
    """The task.

    Attributes:
      points: K.
      boolean: labels are -1 and 1, the metric is accuracy; else real numbers, the metric is the error.
      scale: what errors are divided by, the variance of a target: 1 for predicting zero.
      scored_from: examples before this one are not scored.
    """

    points: int
    boolean: bool = False
    scale: float = 1.0
    scored_from: int = 0

    name: ClassVar[str] = "in-context learning"
    reads: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ("vectors",)
    unit = "tokens"

    @property
    def metric(self) -> str:
        return "accuracy" if self.boolean else "error"

    @property
    def higher_is_better(self) -> bool:
        return self.boolean

    @classmethod
    def entry(cls, shapes: Mapping[str, Any]) -> str:
        return "vectors"

    @classmethod
    def units(cls, shapes: Mapping[str, Any]) -> int:
        return int(shapes["vectors"].shape[1])

    @classmethod
    def sizes(cls, source: Any, shapes: Mapping[str, Any]) -> dict[str, Any]:
        _, length, dim = shapes["vectors"].shape
        return {"vocab_size": 0, "input_dim": dim, "length": length, "output_dim": 1}

    @classmethod
    def make(cls, section: TaskSection, model: Any, source: Any, shapes: Mapping[str, Any]) -> "InContextLearning":
        return cls(source.points, source.binary, source.variance, source.scored_from)

    def prepare(self, batch: Batch, key: Array) -> tuple[tuple[Array, ...], Float[Array, "B K"]]:
        del key
        return self.inputs(batch), batch["targets"]

    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        return (batch["vectors"],)

    def real(self, batch: Batch) -> Bool[Array, "B T"]:
        """What a curriculum does not score yet is beyond the prompt."""
        return real_tokens(batch, jnp.repeat(~jnp.isnan(batch["targets"]), 2, 1))

    def predictions(self, outputs: Float[Array, "B T 1"]) -> Float[Array, "B K"]:
        """Returns what the model says of each y when it has read its x."""
        return wide(outputs[:, ::2, 0])

    def _scored(self, target: Float[Array, "B K"]) -> Bool[Array, "B K"]:
        return ~jnp.isnan(target) & (jnp.arange(self.points) >= self.scored_from)

    def weight(self, batch: Batch) -> Int[Array, ""]:
        """Returns the number of scored prefixes."""
        return self._scored(batch["targets"]).sum()

    def _mean(self, values: Float[Array, "B K"], target: Float[Array, "B K"]) -> Float[Array, ""]:
        scored = self._scored(target)
        return jnp.where(scored, values, 0.0).sum() / jnp.maximum(scored.sum(), 1)

    def _losses(self, predicted: Float[Array, "B K"], target: Float[Array, "B K"]) -> Float[Array, "B K"]:
        target = jnp.nan_to_num(target)  # so that no gradient of what is not scored is NaN
        return jax.nn.softplus(-predicted * target) if self.boolean else jnp.square(predicted - target)

    def loss(self, outputs: Float[Array, "B T 1"], target: Float[Array, "B K"]) -> Float[Array, ""]:
        """Mean loss over all scored prefixes."""
        return self._mean(self._losses(self.predictions(outputs), target), target)

    def distill(self, outputs: Float[Array, "B T 1"], teacher: Float[Array, "B T 1"], target: Any) -> Float[Array, ""]:
        """Mean squared distance to the teacher's outputs, or logistic loss against its probabilities, over all scored
        prefixes."""
        mine, other = self.predictions(outputs), jax.lax.stop_gradient(self.predictions(teacher))
        if self.boolean:
            return self._mean(jax.nn.softplus(mine) - jax.nn.sigmoid(other) * mine, target)
        return self._mean(jnp.square(mine - other), target)

    def _scores(self, predicted: Float[Array, "B K"], target: Float[Array, "B K"]) -> Float[Array, "B K"]:
        return (
            (predicted * target > 0).astype(jnp.float32)
            if self.boolean
            else jnp.square(predicted - target) / self.scale
        )

    def measure(self, outputs: Float[Array, "B T 1"], batch: Batch) -> dict[str, Float[Array, ""]]:
        scores = self._scores(self.predictions(outputs), batch["targets"])
        return {self.metric: self._mean(scores, batch["targets"])}

    def zero_sums(self) -> dict[str, Any]:
        return {"scores": np.zeros(self.points, np.float32), "losses": 0.0, "count": 0.0}

    def sums(self, outputs: Float[Array, "B T 1"], batch: Batch) -> dict[str, Array]:
        predicted = self.predictions(outputs)
        mask = batch.get("mask", jnp.ones(len(predicted), jnp.float32))
        losses = self._losses(predicted, batch["targets"])[:, self.scored_from :].mean(1)
        scores = self._scores(predicted, batch["targets"])
        return {"scores": (scores * mask[:, None]).sum(0), "losses": (losses * mask).sum(), "count": mask.sum()}

    def summarize(self, sums: dict[str, Any]) -> dict[str, float]:
        """Returns the metric, the loss, and the metric after 0, 1, 2, ... examples as `METRIC/after_N`."""
        count = max(float(sums["count"]), 1.0)
        by_examples = np.asarray(sums["scores"], np.float64) / count
        out = {self.metric: float(by_examples[self.scored_from :].mean()), "loss": float(sums["losses"]) / count}
        return out | {f"{self.metric}/after_{n}": float(value) for n, value in enumerate(by_examples)}
