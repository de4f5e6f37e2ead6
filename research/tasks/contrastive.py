"""Contrastive learning of sentence vectors: each text is to find the one that belongs to it among the batch's others.

A batch is {"pairs": [B, 2, T] int32, "lengths": [B, 2] int32, "domain": [B] int32}; the model gives one vector a text,
two a pair. Losses and the swap of the two texts follow arXiv 2401.15713; `mnr` is the multiple-negatives ranking loss
of Henderson et al. 2017 (arXiv 1705.00652, section 4.4). Accuracy is that of retrieval among the B texts of a batch: it
depends on B and, in evaluation, on which pairs share a batch, which is fixed. What needs all pairs at once is in
`research.search.embedding`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.errors import UserError
from research.ops.precision import matmul, wide
from research.tasks.base import Batch, Task, real_examples
from research.tasks.language import check_vocabulary
from research.tasks.limits import Limits
from research.tasks.registry import register
from research.tasks.section import TaskSection

LOSSES = ("mnr", "symmetric", "mnr_plus")


@register("contrastive")
@dataclass(frozen=True)
class Contrastive(Task):
    """The task.

    Attributes:
      loss_name: mnr, the cross entropy of the rows of A B^T alone; symmetric, the mean of that of the rows and that of
        the columns (as CLIP, arXiv 2103.00020); or `mnr_plus`, whose targets come from the vectors' lengths and so need
        raw products.
      temperature: what the products are divided by.
      normalize: vectors are scaled to length 1 before their products; without, products are raw as in the paper.
    """

    loss_name: str = "mnr_plus"
    temperature: float = 1.0
    normalize: bool = False

    name: ClassVar[str] = "contrastive learning"
    reads: ClassVar[tuple[str, ...]] = ("contrastive.loss", "contrastive.temperature", "contrastive.normalize")
    takes: ClassVar[tuple[str, ...]] = ("pairs",)
    metric = "accuracy"
    higher_is_better = True
    unit = "pairs"
    work = 2  # texts of an example
    indivisible = "the wrong answers of a pair are the other texts of its batch, and a microbatch has fewer of them"

    def __post_init__(self) -> None:
        if self.loss_name not in LOSSES:
            raise UserError(f"task.contrastive.loss={self.loss_name!r}; valid: {', '.join(LOSSES)}")
        if not self.temperature > 0:
            raise UserError(f"task.contrastive.temperature={self.temperature}; valid: numbers above 0")

    @classmethod
    def entry(cls, shapes: Mapping[str, Any]) -> str:
        return "pairs"

    @classmethod
    def example_shape(cls, shapes: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(shapes["pairs"].shape[2:])

    @classmethod
    def sizes(cls, source: Any, shapes: Mapping[str, Any]) -> dict[str, Any]:
        length = shapes["pairs"].shape[2]
        return {"vocab_size": int(source.vocab_size), "length": length, "num_domains": len(source.domains)}

    @classmethod
    def make(cls, section: TaskSection, model: Any, source: Any, shapes: Mapping[str, Any]) -> "Contrastive":
        check_vocabulary(model, source)
        if model.num_domains < len(source.domains):
            raise UserError(
                f"{source.name} has texts of domain {model.num_domains} ({source.domains[model.num_domains]}) that no "
                f"expert has; valid with model.num_domains={model.num_domains}: 0..{model.num_domains - 1}"
            )
        options = section.contrastive
        return cls(options.loss, options.temperature, options.normalize)

    @classmethod
    def check_new(cls, section: TaskSection) -> None:
        if section.contrastive.loss == "mnr_plus" and section.contrastive.normalize:
            raise UserError(
                "task.contrastive.loss='mnr_plus' takes its targets from the lengths of the vectors, which "
                "task.contrastive.normalize=True "
                "makes equal: every row's target is then its own pair; valid with vectors of length 1: symmetric, mnr"
            )

    def limits(self, model: Any, shapes: Mapping[str, Any]) -> Limits:
        return Limits(
            {
                "pairs": (0, model.vocab_size - 1),
                "lengths": (0, shapes["pairs"].shape[2]),
                "domain": (0, model.num_domains - 1),
            }
        )

    def prepare(self, batch: Batch, key: Array) -> tuple[tuple[Array, ...], None]:
        """The two texts of a pair change places with probability 1/2."""
        swap = jax.random.bernoulli(key, 0.5, (len(batch["domain"]),))
        turned = {
            name: jnp.where(swap.reshape(-1, *(1,) * (batch[name].ndim - 1)), batch[name][:, ::-1], batch[name])
            for name in ("pairs", "lengths")
        }
        return self.inputs({**batch, **turned}), None

    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        """Returns tokens [2 B, T], domains [2 B] and the mask of real tokens [2 B, T], the texts of a pair next to each
        other."""
        tokens = batch["pairs"].reshape(-1, batch["pairs"].shape[-1])
        mask = jnp.arange(tokens.shape[1]) < batch["lengths"].reshape(-1, 1)
        return tokens, jnp.repeat(batch["domain"], 2), mask

    def real(self, batch: Batch) -> Bool[Array, " rows"] | None:
        pairs = real_examples(batch)
        return None if pairs is None else jnp.repeat(pairs, 2)

    def sides(self, outputs: Float[Array, "rows D"]) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
        """Returns the vectors of first and of second texts, ready for products."""
        pairs = wide(outputs).reshape(-1, 2, outputs.shape[-1])
        pairs = unit(pairs) if self.normalize else pairs
        return pairs[:, 0], pairs[:, 1]

    def loss(self, outputs: Float[Array, "rows D"], target: None = None) -> Float[Array, ""]:
        """Mean cross entropy in nats."""
        a, b = self.sides(outputs)
        return {"mnr": mnr, "symmetric": symmetric, "mnr_plus": mnr_plus}[self.loss_name](a, b, self.temperature)

    def distill(
        self, outputs: Float[Array, "rows D"], teacher: Float[Array, "rows N"], target: Any = None
    ) -> Float[Array, ""]:
        """Mean cross entropy of the rows of A B^T to the teacher's distribution; no gradient reaches the teacher."""
        (a, b), (c, d) = self.sides(outputs), self.sides(jax.lax.stop_gradient(teacher))
        return (
            -(jax.nn.softmax(matmul(c, d.T) / self.temperature) * jax.nn.log_softmax(matmul(a, b.T) / self.temperature))
            .sum(-1)
            .mean()
        )

    def measure(self, outputs: Float[Array, "rows D"], batch: Batch) -> dict[str, Float[Array, ""]]:
        a, b = self.sides(outputs)
        return {"accuracy": ((matmul(a, b.T)).argmax(-1) == jnp.arange(len(a))).mean()}

    def zero_sums(self) -> dict[str, float]:
        return dict.fromkeys(("correct", "nll", "count", "positive", "negative", "negatives"), 0.0)

    def sums(self, outputs: Float[Array, "rows D"], batch: Batch) -> dict[str, Array]:
        a, b = self.sides(outputs)
        real = batch.get("mask", jnp.ones(len(a), a.dtype)).astype(a.dtype)
        logits = jnp.where(
            real > 0, matmul(a, b.T) / self.temperature, jnp.finfo(a.dtype).min
        )  # filler is no candidate
        right = jnp.eye(len(a), dtype=a.dtype)
        nll = -(jax.nn.log_softmax(logits) * right).sum(-1)
        cosine, both = matmul(unit(a), unit(b).T), real[:, None] * real
        return {
            "correct": ((logits.argmax(-1) == jnp.arange(len(a))) * real).sum(),
            "nll": (nll * real).sum(),
            "count": real.sum(),
            "positive": (cosine * right * both).sum(),
            "negative": (cosine * (1 - right) * both).sum(),
            "negatives": ((1 - right) * both).sum(),
        }

    def summarize(self, sums: dict[str, Any]) -> dict[str, float]:
        """Returns accuracy@1 and mnr loss among the texts of a batch, mean cosine of pairs that belong together and of
        others."""
        count, others = max(float(sums["count"]), 1.0), max(float(sums["negatives"]), 1.0)
        out = {"accuracy": float(sums["correct"]) / count, "loss": float(sums["nll"]) / count}
        return out | {"positive": float(sums["positive"]) / count, "negative": float(sums["negative"]) / others}


def unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns vectors of length 1; zeros stay zeros."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


def cross_entropy(logits: Float[Array, "B N"], target: Int[Array, " B"]) -> Float[Array, ""]:
    """Mean cross entropy of rows, in nats."""
    return -(jax.nn.log_softmax(logits) * jax.nn.one_hot(target, logits.shape[-1], dtype=logits.dtype)).sum(-1).mean()


def mnr(a: Float[Array, "B D"], b: Float[Array, "B D"], temperature: float = 1.0) -> Float[Array, ""]:
    """Multiple negatives ranking: each first text's cross entropy over all second texts, its own being the right
    one."""
    return cross_entropy(matmul(a, b.T) / temperature, jnp.arange(len(a)))


def symmetric(a: Float[Array, "B D"], b: Float[Array, "B D"], temperature: float = 1.0) -> Float[Array, ""]:
    """Half the `mnr` of the first texts and half that of the second ones."""
    return (mnr(a, b, temperature) + mnr(b, a, temperature)) / 2


def mnr_plus(a: Float[Array, "B D"], b: Float[Array, "B D"], temperature: float = 1.0) -> Float[Array, ""]:
    """Half the cross entropy of the rows and half that of the columns of A B^T, with targets that the batch itself
    gives.

    The target of a row is the largest entry of that row of P = softmax((A A^T + B B^T) / 2), the target of a column
    that of the column of P (arXiv 2401.15713, released code). Of vectors of one length a row's target is always its own
    pair, and a column's is too unless a near copy with fewer neighbours takes its place: `symmetric` is what remains.
    """
    alike = jax.lax.stop_gradient(jax.nn.softmax((matmul(a, a.T) + matmul(b, b.T)) / 2))
    products = matmul(a, b.T) / temperature
    return (cross_entropy(products, alike.argmax(1)) + cross_entropy(products.T, alike.argmax(0))) / 2
