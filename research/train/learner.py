"""What the harness drives: a learner makes states, updates and evaluates them, and tells what it found.

`Supervised` (research/train/supervised.py) is the learner of every task; reinforcement learning is another one. The
harness (loop.py) gives it checkpoints, exact resume, preemption, progress, metrics and reports.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from research.train.restore import Wanted
from research.train.sections import RunConfig
from research.train.sharding import device_bytes

Say = Callable[[str], None]


@dataclass(frozen=True)
class Goal:
    """The number that ranks states.

    Attributes:
      name: of the number.
      higher_is_better: whether a larger one is better.
      percent: whether people are shown it in percent.
    """

    name: str
    higher_is_better: bool
    percent: bool = False

    def shown(self, value: float) -> str:
        """Returns a value for people."""
        return f"{100 * value:.2f} %" if self.percent else f"{value:.4f}"

    def reached(self, value: float, wanted: float | None) -> bool:
        """Whether a value is as good as is wanted; never where nothing is."""
        return wanted is not None and (value >= wanted if self.higher_is_better else value <= wanted)


@dataclass(frozen=True)
class Reading:
    """The numbers of an update, on the host.

    Attributes:
      losses: (what it is of, loss) of every part of the update; one that is not finite ends a run.
      finite: whether the update could be made.
      flops: of the update.
      record: makes the line of metrics.jsonl, with "loss" and "lr" among its numbers.
    """

    losses: tuple[tuple[str, float], ...]
    finite: bool
    flops: float
    record: Callable[[], dict[str, Any]]


USUAL_MFU = 0.25
"""Share of the rate of matrix products that training reaches, as the estimate of the time takes it."""


@dataclass(frozen=True)
class Foreseen:
    """What a run would be, without training; bytes are of one device.

    Attributes:
      updates: of the run.
      bytes: what -> how many.
      inputs: entry of a batch -> its shape and type.
      networks: name, parameters and FLOPs of one example's forward pass.
      programs: titles of the programs that are compiled; () where they are not known.
      flops: of training, all devices together; 0 where they are not known.
      floor_s: seconds at the rate of matrix products.
    """

    updates: int
    bytes: Mapping[str, int]
    inputs: Mapping[str, str] = field(default_factory=dict)
    networks: Sequence[Mapping[str, Any]] = ()
    programs: Sequence[str] = ()
    flops: float = 0.0
    floor_s: float = 0.0

    @property
    def estimate_s(self) -> float:
        """Seconds of training at `USUAL_MFU`, without compiling, evaluating and saving."""
        return self.floor_s / USUAL_MFU


class Reporter(Protocol):
    """Where a run tells a human what it does."""

    def say(self, line: str) -> None: ...

    def progress(self, done: int, total: int, text: str) -> None: ...


class Learner(ABC):
    """One learner of one run.

    Attributes:
      goal: what evaluations rank states by.
      total: updates of the whole run.
      round: updates that share a batch; a line of the log tells of as many.
      examples: of an update, in units of `unit`.
      validates: whether there is something to evaluate during training.
      title: what reports call the run.
      headings: numbers of an update that the line of progress shows beside the loss -> what it calls them.
    """

    goal: Goal
    total: int
    round: int = 1
    examples: int
    unit: str
    validates: bool = True
    title: str
    headings: Mapping[str, str] = {}

    # -- before the first update -------------------------------------------------------------------------------

    @abstractmethod
    def steps(self, duration: str | int, field: str) -> int:
        """Returns a duration in updates.

        Args:
          duration: as recipes write it.
          field: of the config, dotted, for messages.

        Raises:
          UserError: a duration that the run does not know.
        """

    @abstractmethod
    def adopt(self, run: Mapping[str, Any]) -> None:
        """Takes the shape that a checkpoint has, before it is restored.

        Args:
          run: what `describe` gave when it was saved, and what the harness keeps beside.
        """

    @abstractmethod
    def initial(self, say: Say) -> Any:
        """Returns the state that training starts from."""

    @abstractmethod
    def wanted(self) -> Wanted:
        """Returns what a checkpoint is asked for."""

    @abstractmethod
    def whole(self, found: Mapping[str, Any]) -> Any:
        """Returns the state that a checkpoint holds."""

    @abstractmethod
    def kept(self, state: Any) -> Any:
        """Returns what of a state a checkpoint holds."""

    def describe(self) -> dict[str, Any]:
        """Returns what a checkpoint holds beside the state, as JSON: what it takes to open it without data."""
        return {}

    def keep(self, folder: Path, resumed: bool) -> None:
        """Writes into the run's folder what it knows of its data, or compares it.

        Raises:
          UserError: they are others than those that the run began with.
        """
        del folder, resumed

    def foresee(self) -> Foreseen:
        """Returns what a run would be, without compiling or running anything: by default its updates and the arrays
        that a checkpoint holds."""
        wanted = self.wanted()
        sizes = device_bytes(wanted.shapes, wanted.shardings)
        return Foreseen(self.total, {"state": sizes})

    @abstractmethod
    def announce(self) -> list[str]:
        """Returns lines for people on what is about to be trained."""

    def layout(self) -> dict[str, str]:
        """Returns array -> where it lies, for layout.json."""
        return {}

    def prefetch(self, step: int) -> None:
        """Starts compiling what is surely needed from an update on."""
        del step

    @abstractmethod
    def batches(self, step: int) -> Iterator[Any]:
        """Returns the iterator of what updates take, from an update on."""

    # -- training ----------------------------------------------------------------------------------------------

    def reshape_due(self, step: int) -> bool:
        """Whether the state may change its shape before an update."""
        del step
        return False

    def reshape(self, step: int, state: Any, say: Say) -> Any | None:
        """Returns the state in another shape; None where it keeps its own."""
        del step, state, say
        return None

    @abstractmethod
    def update(self, step: int, state: Any, batch: Any) -> tuple[Any, Any]:
        """Returns (state, numbers on the device) after update `step`; does not wait for the device."""

    @abstractmethod
    def read(self, step: int, numbers: Any) -> Reading:
        """Returns the numbers of update `step`, which are on the host."""

    @abstractmethod
    def evaluate(self, state: Any, final: bool) -> tuple[float, dict[str, float]]:
        """Returns (the goal's value, the line of metrics.jsonl) on validation."""

    # -- the end -----------------------------------------------------------------------------------------------

    @abstractmethod
    def report(self, state: Any, folder: Path) -> dict[str, Any]:
        """Returns the report: "metric", "split", "subnets" and more, see `research.report.run_card`."""

    # -- compiling ---------------------------------------------------------------------------------------------

    def busy(self) -> bool:
        """Whether something is being compiled."""
        return False

    def compiling(self) -> str:
        """Returns a line on what is being compiled."""
        return ""

    def memory(self) -> str:
        """Returns a line on the memory that training takes, "" where nothing is known."""
        return ""

    @abstractmethod
    def close(self) -> None:
        """Ends threads."""


Make = Callable[[RunConfig, Callable[[], None], Callable[[str, float], None]], Learner]
"""make(config, waiting, waited) -> the learner of a run, see `research.train.supervised.Supervised`."""
