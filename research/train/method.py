"""What a training method is: a small object whose hooks change parts of supervised training; each changes nothing by
default.

A method is a frozen dataclass of its options, derived from `Method` and decorated by `register`, in a file of
`research/methods/` or in one of your own (`--plugin=FILE`). A config names methods in order, `config.methods`, with
options under `config.method.NAME`. Random numbers of a method come from keys that its name is folded into.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import optax
from jaxtyping import Array

from research.modules.axes import Axes
from research.modules.state import Abstract, Arrays
from research.nested.draws import Draw
from research.nested.space import Space
from research.report.columns import Column
from research.tasks.base import Task
from research.train.hooks import About, Brought, Clock, Extra, Gradient, Made, Objective, Phase, Reshape, Stream

if TYPE_CHECKING:
    from research.train.evaluation import Evaluator, Weights


@dataclass(frozen=True)
class Method:
    """Base of the methods; every hook changes nothing.

    Attributes:
      name: of the registry.
      paper: where it comes from.
      chooses: whether it decides which sub-networks an update trains; two that do are refused together.
      replaces: whether its objective never calls the one inside; two that do so are refused together.
      teaches: whether its objective has outputs that other networks can learn from.
      reports: whether it changes the report alone, so that a run may continue with other options of it.
      headings: what its objective measures -> what the line of progress calls it.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    chooses: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    teaches: ClassVar[bool] = True
    reports: ClassVar[bool] = False
    headings: ClassVar[Mapping[str, str]] = {}

    def check(self, about: About) -> None:
        """Judges whether the method fits the run.

        Raises:
          UserError: it does not; with the reason.
        """

    def wrapped(self, task: Task, model: Any) -> Task:
        """Returns the task as it is evaluated under the method."""
        del model
        return task

    def draws(self, space: Space, seed: int, step: int) -> tuple[Draw, ...]:
        """Returns which sub-networks round `step` trains, and who learns from the full one; of methods that `choose`.

        Their number may differ from round to round, that of microbatches may not.

        Args:
          space: of the run: names, the largest first (`order`), and the config of each.
        """
        raise NotImplementedError

    def phases(self, model: Any) -> tuple[Phase, ...]:
        """Returns the phases of a round, () where all updates are alike."""
        del model
        return ()

    def streams(self) -> tuple[Stream, ...]:
        """Returns the parts of the training examples that phases take batches of, () where there is one."""
        return ()

    def arrays(self, model: Abstract) -> Mapping[str, Extra]:
        """Returns the arrays that the method adds, by name."""
        del model
        return {}

    def brings(self, about: About) -> Brought | None:
        """Returns the network that the method brings, loaded once at the start; `forward(x, params=NAME)` runs it. It
        is sharded by its own axis names.

        Raises:
          UserError: it cannot be loaded, or does not fit the run.
        """
        del about
        return None

    def start(self, model: Any, key: Array, say: Callable[[str], None]) -> tuple[Arrays, Arrays] | None:
        """Returns the (params, stats), all or some of the model's, that a run starts from in place of random ones; None
        for none. On the host, once before the first update, never when a run continues.

        Args:
          model: config of the full network.
          key: of the run, the same for all methods.
          say: called with a line for humans.

        Raises:
          UserError: what it starts from does not fit the model.
        """
        del model, key, say
        return None

    def weights(self, params: Arrays, arrays: Arrays, clock: Clock | None) -> Arrays:
        """Returns the effective weights of a sub-network, in float32; what this does is baked into exports.

        Args:
          params: the sub-network's parameters, and what methods train.
          arrays: the method's own, cut to the sub-network.
          clock: None outside of training.
        """
        del arrays, clock
        return params

    def objective(self, inner: Objective, task: Task) -> Objective:
        """Returns the objective that takes the place of the one of the methods before it."""
        del task
        return inner

    def gradients(self, inner: Gradient, phase: Phase) -> Gradient:
        """Returns how gradients are made, from how they are made inside."""
        del phase
        return inner

    def transform(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation | None:
        """Returns what gradients go through before the optimizer, None for nothing."""
        del axes
        return None

    def after_update(self, params: Arrays, arrays: Arrays, made: Made, clock: Clock) -> tuple[Arrays, Arrays]:
        """Returns (parameters, the method's own arrays) after the optimizer has moved the parameters. Traced.

        Args:
          params: of the full network, moved.
          arrays: the method's own.
          made: what the update was made of: gradients, and what stood before.
          clock: of the update; it has no microbatch.
        """
        del made, clock
        return params, arrays

    def evaluated(self, params: Arrays, arrays: Arrays) -> Arrays:
        """Returns the full network's parameters that are evaluated, extracted and exported."""
        del arrays
        return params

    def reshape_due(self, step: int) -> bool:
        """Whether `reshape` is to be asked before update `step`."""
        del step
        return False

    def reshape(
        self, step: int, config: Any, params: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]
    ) -> Reshape | None:
        """Returns a plan for another shape of the full network, None for none; on the host, equal in all processes.

        Args:
          config: of the full network.
          params, arrays: the parameters and the method's own arrays, on the host.
        """
        del step, config, params, arrays
        return None

    def work(self) -> float:
        """Returns what an update costs, in those of plain training, the mean over the phases of a round."""
        return 1.0

    def evaluations(self) -> tuple["Evaluation", ...]:
        """Returns further columns of the final report."""
        return ()


class Evaluation:
    """Columns of the final report."""

    def check(self, about: About) -> None:
        """Judges at the start what the end would fail at.

        Raises:
          UserError: it cannot be carried out.
        """

    def declared(self) -> Mapping[str, Column]:
        """Returns how the columns are read; one that is not named has no better direction and is no percentage."""
        return {}

    def columns(
        self, evaluator: "Evaluator", weights: "Weights", statistics: Mapping[str, Arrays], split: str
    ) -> dict[str, dict[str, float]]:
        """Returns network -> {column: value} of a split.

        Args:
          evaluator: the run's.
          weights: of the full network.
          statistics: of each network.
        """
        raise NotImplementedError
