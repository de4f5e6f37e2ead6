"""What the loop asks of a task: model inputs and targets of a batch, a loss, and sums that become metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.errors import UserError
from research.tasks.limits import Limits
from research.tasks.section import TaskSection

Batch = dict[str, Array]


class Tokenizer(Protocol):
    """What tasks ask of the vocabulary of a text, see `research.data.tokenizers`."""

    def encode(self, text: str) -> Any:
        """Returns the tokens of a text.

        Raises:
          UserError: the vocabulary does not have a letter of it.
        """
        ...


class Forward(Protocol):
    """The model of an update or of an evaluation, as tasks and methods run it."""

    def __call__(
        self,
        *inputs: Array,
        mode: str = ...,
        method: str = "__call__",
        params: str = "live",
        subnet: str = "",
        features: Sequence[str] = (),
    ) -> Any:
        """Returns the model's outputs; with `features`, (outputs, {name: array}).

        Args:
          inputs: of the model.
          mode: "train" moves the running statistics, "eval" reads them, or another mode of the model's own; by default
            the one of the program that this is part of ("eval" with `params="frozen"`).
          method: of the module.
          params: "live" has gradients; "frozen" has none and moves no statistics, as attacks see the model; the name of
            a method runs the network that it brings (a teacher).
          subnet: name of another network of the space, in training; its statistics do not move, and what its layers
            add to a loss is left out. "" for the one of the program.
          features: names of values inside the model that are wanted too, see `research.modules.features`.

        Raises:
          UserError: a feature that the model does not have.
          ValueError: another network outside of training, where its statistics are not at hand.
        """
        ...


class Outcome(NamedTuple):
    """What an objective makes of a microbatch.

    Attributes:
      loss: mean over what `Task.weight` counts.
      measured: what is logged beside it, means over the same.
      outputs: those that other networks can learn from; None where there are none.
    """

    loss: Float[Array, ""]
    measured: dict[str, Float[Array, ""]]
    outputs: Any = None


@dataclass(frozen=True)
class Example:
    """One microbatch, as objectives see it.

    Attributes:
      batch: as the data give it.
      inputs, target: what the task prepares of it.
      teacher: outputs of the full network for it, None where this network learns from none.
      phase: of the update, see `research.train.method.Phase`.
      key: for random draws of its own; equal in no two microbatches.
    """

    batch: Batch
    inputs: tuple[Array, ...]
    target: Any
    teacher: Any
    phase: str
    key: Array


class Task:
    """One task; everything is a pure function, traced into the run's programs. What has no default raises here.

    Attributes:
      name: what messages call the task.
      reads: fields of the config's section `task` that it goes by.
      reads_elsewhere: other fields of the config, dotted, that only runs of the task go by.
      takes: kinds of examples that it is for, see `research.data.registry`; () for any.
      predicts: what the model must predict, see `research.models.base.ModelConfig`.
      wanted: what messages say of that.
      in_percent: metrics that people are shown in percent.
      percent: whether `metric` is one of them.
      directions: further metrics that reports show -> whether a larger value is better; of those that are not named
        neither is.
      headings: what `measure` gives -> what the line of progress calls it.
      metric: name of the number that ranks networks, a key of what `summarize` returns.
      higher_is_better: whether a larger one is better.
      beside: other metrics of a network that a report shows beside `metric`, where there are such.
      unit: what examples hold and speed is counted in, such as "images" or "tokens".
      work: passes through the model that an example is.
      indivisible: why microbatches do not add up to the batch; "" where they do.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    reads_elsewhere: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()
    predicts: ClassVar[str] = "labels"
    wanted: ClassVar[str] = "labels, tokens or vectors"
    beside: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "images"
    work: ClassVar[float] = 1
    indivisible: ClassVar[str] = ""
    in_percent: ClassVar[frozenset[str]] = frozenset({"accuracy"})
    directions: ClassVar[Mapping[str, bool]] = {"accuracy": True}
    headings: ClassVar[Mapping[str, str]] = {"accuracy": "acc"}

    @property
    def metric(self) -> str:
        raise NotImplementedError

    @property
    def higher_is_better(self) -> bool:
        return False

    @property
    def percent(self) -> bool:
        return self.metric in self.in_percent

    # -- from config and data ----------------------------------------------------------------------------------

    @classmethod
    def entry(cls, shapes: Mapping[str, Any]) -> str:
        """Returns the name of the entry of a batch that the model takes.

        Args:
          shapes: of a prepared batch of one example.
        """
        raise NotImplementedError

    @classmethod
    def example_shape(cls, shapes: Mapping[str, Any]) -> tuple[int, ...]:
        """Returns the shape of one input of the model."""
        return tuple(shapes[cls.entry(shapes)].shape[1:])

    @classmethod
    def units(cls, shapes: Mapping[str, Any]) -> int:
        """Returns how many of `unit` an example holds."""
        del shapes
        return 1

    @classmethod
    def sizes(cls, source: Any, shapes: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of a model that the data decide, where a config leaves them open.

        Args:
          source: what the source of the training examples tells, as attributes: its `name` and what its `facts` return.
          shapes: of a prepared batch of one example.

        Raises:
          UserError: data that no model can take.
        """
        raise NotImplementedError

    @classmethod
    def make(cls, section: TaskSection, model: Any, source: Any, shapes: Mapping[str, Any]) -> "Task":
        """Returns the task of a run.

        Args:
          section: the config's section `task`.
          model: config of the full network.
          source, shapes: as of `sizes`.

        Raises:
          UserError: options that do not fit, or a model that has no place for the data.
        """
        raise NotImplementedError

    @classmethod
    def check_new(cls, section: TaskSection) -> None:
        """Judges a config's section `task` in a run that begins; older runs keep what they were trained with.

        Raises:
          UserError: choices that mean nothing together.
        """

    def limits(self, model: Any, shapes: Mapping[str, Any]) -> Limits:
        """Returns what must hold of the examples of each batch: by default that what the model takes is finite.

        Args:
          model, shapes: as of `make`.
        """
        del model
        return Limits(finite=(self.entry(shapes),))

    def check_report(self, report: Any, data: str, tokenizer: Tokenizer | None) -> None:
        """Judges before the first update what only the end of the run would need of the task.

        Args:
          report: the config's section `report`.
          data: name of the data set, for messages.
          tokenizer: of the data; None where they are no text.

        Raises:
          UserError: the report asks for what these data do not have.
        """

    def weight(self, batch: Batch) -> Float[Array, ""] | Int[Array, ""] | None:
        """Returns what the means over a training batch divide by, e.g. its labelled tokens; None where all batches of a
        size have the same."""
        del batch
        return None

    def prepare(self, batch: Batch, key: Array) -> tuple[tuple[Array, ...], Any]:
        """Returns (the model's inputs, targets) of a training batch, after mixing and the like."""
        raise NotImplementedError

    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        """Returns the model's inputs of an evaluation batch."""
        raise NotImplementedError

    def real(self, batch: Batch) -> Bool[Array, " B *T"] | None:
        """Returns which rows of the model's inputs, or which of their tokens, are neither filler nor padding; None:
        all."""
        raise NotImplementedError

    def loss(self, outputs: Array, target: Any) -> Float[Array, ""]:
        """Mean loss of a batch, over what `weight` counts."""
        raise NotImplementedError

    def distill(self, outputs: Array, teacher: Array, target: Any) -> Float[Array, ""]:
        """Mean loss towards the outputs of another network, over the same."""
        raise NotImplementedError

    def measure(self, outputs: Array, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns what is logged beside the loss of a training batch, means over the same."""
        raise NotImplementedError

    def objective(self, forward: Forward, example: Example) -> Outcome:
        """Returns what training minimises: by default the loss of one forward pass."""
        outputs = forward(*example.inputs)
        return Outcome(self.loss(outputs, example.target), self.measure(outputs, example.batch), outputs)

    def zero_sums(self) -> dict[str, Any]:
        """Returns the start of a sum of `sums`."""
        raise NotImplementedError

    def sums(self, outputs: Array, batch: Batch) -> dict[str, Array]:
        """Returns sums over a batch of what `summarize` divides; examples whose `mask` is 0 do not count."""
        raise NotImplementedError

    def examine(self, forward: Forward, batch: Batch) -> dict[str, Array]:
        """Returns the sums of an evaluation batch: by default those of one forward pass."""
        return self.sums(forward(*self.inputs(batch)), batch)

    def summarize(self, sums: dict[str, Any]) -> dict[str, float]:
        """Returns metric -> value from summed `sums`."""
        raise NotImplementedError

    def columns(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns those of a network's metrics that a report shows beside `metric`: by default those of `beside`."""
        return {name: metrics[name] for name in self.beside if name in metrics and name != self.metric}


def real_examples(batch: Batch) -> Bool[Array, " B"] | None:
    """Returns which examples of an evaluation batch are real; what fills up the last one is not. None, as in training:
    all are."""
    return jnp.asarray(batch["mask"]) > 0 if "mask" in batch else None


def real_tokens(batch: Batch, tokens: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Returns `tokens`, which tokens of each example are no padding, without those of filler."""
    examples = real_examples(batch)
    return tokens if examples is None else tokens & examples[:, None]


def summary(task: Task, sums: dict[str, Any], where: str) -> dict[str, float]:
    """Returns `task.summarize(sums)`.

    Args:
      where: what the message calls the examples that were summed over.

    Raises:
      UserError: none of them had a label, so that there are no numbers.
    """
    if not float(sums["count"]) > 0:
        raise UserError(f"{where} has no label to evaluate against (all of them ask for nothing)")
    return task.summarize(sums)
