"""What a task asks of the examples themselves: classes, tokens and domains that the model has, numbers that are finite,
labels at all.

Batches are looked at on the host as they are made, where a minimum and a maximum cost next to nothing beside making
them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from research.errors import UserError


@dataclass(frozen=True)
class Limits:
    """What must hold of the entries of each batch.

    Attributes:
      whole: entry of whole numbers -> (least, most) that the model has a place for.
      finite: entries without NaN and infinities; whole numbers have none.
      counts: entries that are not negative either.
      labels: entries of labels, of which -1 asks for nothing; some of each split must ask for something.
    """

    whole: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    finite: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def check(self, batch: Mapping[str, np.ndarray], name: str) -> None:
        """Judges a batch.

        Args:
          name: of the data set, for messages.

        Raises:
          UserError: it does not keep the limits.
        """
        for entry, (least, most) in self.whole.items():
            values = batch[entry]
            if values.dtype.kind not in "iu":
                raise UserError(f"{name}: {entry} is of type {values.dtype}; valid: whole numbers")
            if values.size and not least <= int(values.min()) <= int(values.max()) <= most:
                wrong = int(values.min()) if int(values.min()) < least else int(values.max())
                raise UserError(f"{name}: {entry} {wrong} is none that the model has; valid: {least}..{most}")
        for entry in self.finite:
            if batch[entry].dtype.kind == "f" and not np.isfinite(batch[entry]).all():
                raise UserError(f"{name}: {entry} holds a number that is not finite; clean the data")
        for entry in self.counts:
            if batch[entry].size and batch[entry].min() < 0:
                raise UserError(f"{name}: {entry} holds {batch[entry].min():g}; valid: numbers from 0")
