"""What the loop asks of a task: model inputs and targets of a batch, a loss, and sums that become metrics."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from research.errors import UserError

Batch = dict[str, Array]


class Means:
    """The defaults of a task whose loss is a mean over examples that all count alike.

    Attributes:
      indivisible: why parts of a batch do not add up to the batch; "" where they do.
    """

    indivisible: str = ""

    @classmethod
    def check_new(cls, section: Mapping[str, Any]) -> None:
        """Judges a config's section `task` in a run that begins; older runs keep what they were trained with.

        Raises:
          UserError: choices that mean nothing together.
        """

    def weight(self, batch: Batch) -> Float[Array, ""] | None:
        """Returns what the means over a training batch divide by, e.g. its labelled tokens; None where all batches of a
        size have the same."""
        del batch
        return None


class Task(Protocol):
    """One task. Everything is a pure function, traced into the run's programs.

    A task whose loss is more than one of a single pass has `objective`, `examine`, `phases` and `trains` as well, see
    `research.tasks.robust`; `work` says how many passes through the model an example is, where that is not one.

    Attributes:
      name: what messages call the task.
      reads: fields of the config's section `task` that it goes by.
      metric: name of the number that ranks networks, a key of what `summarize` returns.
      higher_is_better: whether a larger one is better.
      unit: what one example holds and speed is counted in, "images", "pairs" or "tokens".
      indivisible: see `Means`.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    metric: str
    higher_is_better: bool
    unit: str
    indivisible: str

    def weight(self, batch: Batch) -> Float[Array, ""] | None:
        """See `Means`."""
        ...

    def prepare(self, batch: Batch, key: Array) -> tuple[tuple[Array, ...], Any]:
        """Returns (the model's inputs, targets) of a training batch, after mixing and the like."""
        ...

    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        """Returns the model's inputs of an evaluation batch."""
        ...

    def real(self, batch: Batch) -> Bool[Array, "B *T"] | None:
        """Returns which rows of the model's inputs, or which of their tokens, are neither filler nor padding; None:
        all."""
        ...

    def loss(self, outputs: Array, target: Any) -> Float[Array, ""]:
        """Mean loss of a batch, over what `weight` counts."""
        ...

    def distill(self, outputs: Array, teacher: Array, target: Any) -> Float[Array, ""]:
        """Mean loss towards the outputs of another network, over the same."""
        ...

    def measure(self, outputs: Array, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns what is logged beside the loss of a training batch, means over the same."""
        ...

    def zero_sums(self) -> dict[str, Any]:
        """Returns the start of a sum of `sums`."""
        ...

    def sums(self, outputs: Array, batch: Batch) -> dict[str, Array]:
        """Returns sums over a batch of what `summarize` divides; examples whose `mask` is 0 do not count."""
        ...

    def summarize(self, sums: dict[str, Any]) -> dict[str, float]:
        """Returns metric -> value from summed `sums`."""
        ...


def real_examples(batch: Batch) -> Bool[Array, " B"] | None:
    """Returns which examples of an evaluation batch are real; what fills up the last one is not. None, as in training:
    all are."""
    return jnp.asarray(batch["mask"]) > 0 if "mask" in batch else None


def real_tokens(batch: Batch, tokens: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Returns `tokens`, which tokens of each example are no padding, without those of filler."""
    examples = real_examples(batch)
    return tokens if examples is None else tokens & examples[:, None]


def summary(task: Any, sums: dict[str, Any], where: str) -> dict[str, float]:
    """Returns `task.summarize(sums)`.

    Args:
      where: what the message calls the examples that were summed over.

    Raises:
      UserError: none of them had a label, so that there are no numbers.
    """
    if not float(sums["count"]) > 0:
        raise UserError(f"{where} has no label to evaluate against (all of them ask for nothing)")
    return task.summarize(sums)


def phases(task: Any) -> tuple[str, ...]:
    """Returns the phases of a round of updates; tasks without `phases` have one."""
    return getattr(task, "phases", ("all",))


def shown(task: Any, value: float) -> str:
    """Returns the task's metric for people: fractions in percent, the rest as it is."""
    return f"{100 * value:.2f} %" if task.metric.endswith("accuracy") else f"{value:.4f}"
