"""Judges the examples of a run by what its task asks of them, see `research.tasks.limits`."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from research.data.kinds import Batch, Transform
from research.data.source import Source
from research.errors import UserError
from research.tasks.limits import Limits

LOOKED_AT = 64
"""Examples of each split whose labels are looked for before training."""


@dataclass(frozen=True)
class Checked:
    """A transform whose batches keep the limits; `name` is that of the data set, for messages."""

    transform: Transform
    limits: Limits
    name: str

    def train(self, block: Batch, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"], seed: int) -> Batch:
        batch = self.transform.train(block, indices, epochs, seed)
        self.limits.check(batch, self.name)
        return batch

    def evaluate(self, block: Batch) -> Batch:
        batch = self.transform.evaluate(block)
        self.limits.check(batch, self.name)
        return batch


def check_labelled(splits: Mapping[str, Source], transform: Transform, limits: Limits) -> None:
    """Looks for labels in the first examples of every split.

    Args:
      splits: of the data set.
      transform: what makes batches of their blocks.
      limits: which entries are labels; where there are none, nothing is read.

    Raises:
      UserError: there are none, so that every loss would be 0.
    """
    for split, source in splits.items() if limits.labels else ():
        count = min(len(source), LOOKED_AT)
        batch = transform.evaluate(source.gather(np.arange(count))) if count else {}
        if batch and not any((batch[entry] >= 0).any() for entry in limits.labels):
            raise UserError(
                f"{source.name}: none of the first {count} {split} examples has a label (all are -1); there is nothing "
                "to learn"
            )
