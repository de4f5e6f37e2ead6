"""Next-token prediction and other labelled tokens: cross entropy in nats, bits per byte, perplexity, accuracy.

A batch is {"tokens": [B, T] int32, "labels": [B, T] int32}, -1 where nothing is asked for, and perhaps "segment_ids"
[B, T] int32: documents packed on one axis, and "lengths" [B] int32: how many tokens of each example are no padding.
Labels stand where their logits are read: for language, label t is token t + 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.errors import UserError
from research.ops.precision import wide
from research.tasks.base import Batch, Task, Tokenizer, real_examples, real_tokens
from research.tasks.limits import Limits
from research.tasks.registry import register
from research.tasks.section import TaskSection


@register("language_modelling")
@dataclass(frozen=True)
class LanguageModelling(Task):
    """The task.

    Attributes:
      token_bytes: bytes of text that each token stands for; () when unknown: then there are no bits per byte.
      metric: "loss" (nats per token), "bits_per_byte", "perplexity" or "accuracy".
    """

    token_bytes: tuple[int, ...] = ()
    metric: str = "loss"  # a field in place of the property of the base

    name: ClassVar[str] = "language modelling"
    reads: ClassVar[tuple[str, ...]] = ("metric",)
    reads_elsewhere: ClassVar[tuple[str, ...]] = ("report.sample",)
    takes: ClassVar[tuple[str, ...]] = ("tokens",)
    beside: ClassVar[tuple[str, ...]] = ("accuracy",)
    unit = "tokens"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The numbers that can rank networks."""
        return ("loss", "perplexity", "accuracy", *(("bits_per_byte",) if any(self.token_bytes) else ()))

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "accuracy"

    @classmethod
    def entry(cls, shapes: Mapping[str, Any]) -> str:
        return "tokens"

    @classmethod
    def units(cls, shapes: Mapping[str, Any]) -> int:
        return int(shapes["tokens"].shape[1])

    @classmethod
    def sizes(cls, source: Any, shapes: Mapping[str, Any]) -> dict[str, Any]:
        return {"vocab_size": int(source.vocab_size), "length": shapes["tokens"].shape[1]}

    @classmethod
    def make(cls, section: TaskSection, model: Any, source: Any, shapes: Mapping[str, Any]) -> "LanguageModelling":
        check_vocabulary(model, source)
        metric = section.metric
        task = cls(tuple(source.token_bytes or ()), metric or "loss")
        if task.metric not in task.metrics:
            raise UserError(f"task.metric={metric!r}; valid with {source.name}: {', '.join(task.metrics)}")
        return task

    def limits(self, model: Any, shapes: Mapping[str, Any]) -> Limits:
        answers = model.output_dim or model.vocab_size
        return Limits({"tokens": (0, model.vocab_size - 1), "labels": (-1, answers - 1)}, labels=("labels",))

    def check_report(self, report: Any, data: str, tokenizer: Tokenizer | None) -> None:
        if prompt := report.sample:
            if tokenizer is None:
                raise UserError(
                    f"report.sample={prompt!r} needs a language model over a text, which {data} is not; remove it"
                )
            tokenizer.encode(prompt)  # a letter that the vocabulary does not have is told by name

    def prepare(self, batch: Batch, key: Array) -> tuple[tuple[Array, ...], Int[Array, "B T"]]:
        del key
        return self.inputs(batch), batch["labels"]

    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        return (batch["tokens"], batch["segment_ids"]) if "segment_ids" in batch else (batch["tokens"],)

    def real(self, batch: Batch) -> Bool[Array, " B *T"] | None:
        if "lengths" not in batch:
            return real_examples(batch)
        return real_tokens(batch, jnp.arange(batch["tokens"].shape[1]) < batch["lengths"][:, None])

    def weight(self, batch: Batch) -> Int[Array, ""]:
        """Returns the number of labelled tokens."""
        return (batch["labels"] >= 0).sum()

    def loss(self, logits: Float[Array, "B T V"], target: Int[Array, "B T"]) -> Float[Array, ""]:
        """Mean cross entropy over the labelled tokens."""
        nll, asked = token_losses(logits, target)
        return nll.sum() / jnp.maximum(asked.sum(), 1)

    def distill(
        self, logits: Float[Array, "B T V"], teacher: Float[Array, "B T V"], target: Int[Array, "B T"]
    ) -> Float[Array, ""]:
        """Mean cross entropy to the teacher's distribution over the labelled tokens; no gradient reaches the
        teacher."""
        asked = (target >= 0).astype(jnp.float32)
        probabilities = jax.nn.softmax(wide(jax.lax.stop_gradient(teacher)))
        nll = -(probabilities * jax.nn.log_softmax(wide(logits))).sum(-1)
        return (nll * asked).sum() / jnp.maximum(asked.sum(), 1)

    def measure(self, logits: Float[Array, "B T V"], batch: Batch) -> dict[str, Float[Array, ""]]:
        labels = batch["labels"]
        return {"accuracy": (logits.argmax(-1) == labels).sum() / jnp.maximum((labels >= 0).sum(), 1)}

    def zero_sums(self) -> dict[str, float]:
        return {"nll": 0.0, "correct": 0.0, "count": 0.0, "bytes": 0.0}

    def sums(self, logits: Float[Array, "B T V"], batch: Batch) -> dict[str, Float[Array, ""]]:
        labels = batch["labels"]
        mask = batch["mask"][:, None] if "mask" in batch else 1.0
        nll, asked = token_losses(logits, labels)
        out = {"nll": (nll * mask).sum(), "count": (asked * mask).sum()}
        out["correct"] = ((logits.argmax(-1) == labels) * asked * mask).sum()
        size = (
            asked * jnp.asarray(self.token_bytes, jnp.float32)[jnp.maximum(labels, 0)]
            if self.token_bytes
            else asked * 0
        )
        return {**out, "bytes": (size * mask).sum()}

    def summarize(self, sums: dict[str, Any]) -> dict[str, float]:
        """Returns loss (nats per token), perplexity, accuracy and, with `token_bytes`, bits_per_byte."""
        count = max(float(sums["count"]), 1.0)
        loss = float(sums["nll"]) / count
        out = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": float(sums["correct"]) / count}
        if float(sums["bytes"]):
            out["bits_per_byte"] = float(sums["nll"]) / float(sums["bytes"]) / math.log(2)
        return out


def check_vocabulary(model: Any, source: Any) -> None:
    """Raises UserError where a model has fewer tokens than the data."""
    if model.vocab_size < source.vocab_size:
        raise UserError(f"model.vocab_size={model.vocab_size} is less than the {source.vocab_size} tokens of the data")


def token_losses(
    logits: Float[Array, "*B V"], labels: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Returns (cross entropy in nats, 0 where nothing is asked; 1 where something is)."""
    logits = wide(logits)
    asked = (labels >= 0).astype(logits.dtype)
    # A product with one-hot rows, whose gradient is elementwise; picking entries would have a scattered one.
    chosen = (logits * jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)).sum(-1)
    return (jax.nn.logsumexp(logits, -1) - chosen) * asked, asked
