"""What must hold of the examples themselves: classes, tokens and domains that the model has, numbers that are finite,
labels at all.

Each batch is looked at on the host as it is made, where a minimum and a maximum cost next to nothing beside making it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from research.data.pipeline import Batch, Transform
from research.errors import UserError

LOOKED_AT = 64
"""Examples of each split whose labels are looked for before training."""


@dataclass(frozen=True)
class Limits:
    """Entry of a batch -> (least, most) whole number that the model has a place for, and entries that hold numbers.

    Attributes:
      whole: of integer entries.
      finite: entries without NaN and infinities.
      counts: entries that are not negative either.
    """

    name: str
    whole: Mapping[str, tuple[int, int]]
    finite: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()

    def check(self, batch: Batch) -> None:
        """Raises UserError for a batch that does not keep them."""
        for entry, (least, most) in self.whole.items():
            values = batch[entry]
            if values.dtype.kind not in "iu":
                raise UserError(f"{self.name}: {entry} is of type {values.dtype}; valid: whole numbers")
            if values.size and not least <= int(values.min()) <= int(values.max()) <= most:
                wrong = int(values.min()) if int(values.min()) < least else int(values.max())
                raise UserError(f"{self.name}: {entry} {wrong} is none that the model has; valid: {least}..{most}")
        for entry in self.finite:
            if batch[entry].dtype.kind == "f" and not np.isfinite(batch[entry]).all():
                raise UserError(f"{self.name}: {entry} holds a number that is not finite; clean the data")
        for entry in self.counts:
            if batch[entry].size and batch[entry].min() < 0:
                raise UserError(f"{self.name}: {entry} holds {batch[entry].min():g}; valid: numbers from 0")


def limits_of(name: str, model: Any, sample: Mapping[str, Any]) -> Limits:
    """Returns the limits of the batches of a data set for a model, from the entries that a batch has."""
    whole: dict[str, tuple[int, int]] = {}
    if "label" in sample:
        whole["label"] = (0, (model.num_classes if "image" in sample else model.output_dim) - 1)
    if "tokens" in sample:
        whole |= {"tokens": (0, model.vocab_size - 1), "labels": (-1, (model.output_dim or model.vocab_size) - 1)}
    if "pairs" in sample:
        whole |= {
            "pairs": (0, model.vocab_size - 1),
            "lengths": (0, sample["pairs"].shape[2]),
            "domain": (0, model.num_domains - 1),
        }
    finite = tuple(entry for entry in ("image", "vectors", "density") if entry in sample)
    return Limits(name, whole, finite, tuple(entry for entry in ("density",) if entry in sample))


@dataclass(frozen=True)
class Checked:
    """A transform whose batches keep the limits."""

    transform: Transform
    limits: Limits

    def train(self, block: Batch, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"], seed: int) -> Batch:
        batch = self.transform.train(block, indices, epochs, seed)
        self.limits.check(batch)
        return batch

    def evaluate(self, block: Batch) -> Batch:
        batch = self.transform.evaluate(block)
        self.limits.check(batch)
        return batch


def check_labelled(splits: Mapping[str, Any]) -> None:
    """Looks for labels in the first examples of every split of labelled tokens.

    Raises:
      UserError: there are none, so that every loss would be 0.
    """
    for split, source in splits.items():
        labels = source.gather(np.arange(min(len(source), LOOKED_AT))).get("labels") if len(source) else None
        if labels is not None and not (labels >= 0).any():
            raise UserError(
                f"{source.name}: none of the first {len(labels)} {split} examples has a label (all are -1); there is "
                "nothing to learn"
            )
