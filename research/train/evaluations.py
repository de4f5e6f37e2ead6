"""Which evaluations of a run are done, and whether they end it."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from research.train import processes, records
from research.train.learner import Goal


@dataclass
class Evaluations:
    """What is known of a run's evaluations on validation.

    Attributes:
      goal: what they rank states by.
      stop_at: value at which training ends, None for no such.
      values: step -> the goal's value.
      last: the last step whose evaluation is done, -1 without one.
      reached: whether the value that training ends at is reached.
      ended: whether the evaluation at the end of training is done.
    """

    goal: Goal
    stop_at: float | None
    values: dict[int, float] = field(default_factory=dict)
    last: int = -1
    reached: bool = False
    ended: bool = False

    def recall(self, folder: Path, step: int, total: int, *, reads: bool) -> None:
        """Learns from metrics.jsonl which evaluations are done: they come after the save of their step, which does not
        know of them.

        The first process, which `reads`, tells the others, which could read an older file or none.
        """
        own = records.evaluations(folder, self.goal.name) if reads else {}
        done = {int(at): values for at, values in json.loads(processes.texts(json.dumps(own))[0]).items()}
        self.values.update({at: values[-1] for at, values in done.items()})
        here = done.get(step, [])
        self.last = step if here else -1
        self.reached = step < total and bool(here) and self.goal.reached(here[0], self.stop_at)
        self.ended = len(here) > int(self.reached)  # the evaluation that reached the goal is not the last one
        self.ended = self.ended and (self.reached or step == total)

    def told(self, step: int, total: int) -> str:
        """Returns a line on the value that ended training."""
        return f"eval.stop_at={self.stop_at} is reached at step {step} of {total}"

    def note(self, step: int, value: float, *, final: bool) -> None:
        """Takes down an evaluation; `final`: that at the end of training."""
        self.last, self.values[step] = step, value
        self.reached = self.reached or (not final and self.goal.reached(value, self.stop_at))
        self.ended = final
