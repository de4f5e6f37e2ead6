"""What examples can be, and how blocks of them become batches.

Each data set is registered with its kind; a kind of one's own is another `Kind`, in the file of the data set.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from research.data.augment import make_augment

Batch = dict[str, np.ndarray]


class Transform(Protocol):
    """What happens to a block of examples on its way into a batch."""

    def train(
        self, block: Batch, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"], seed: int
    ) -> Batch: ...

    def evaluate(self, block: Batch) -> Batch: ...


class Plain:
    """Nothing happens: a block is a batch."""

    def train(self, block: Batch, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"], seed: int) -> Batch:
        return block

    def evaluate(self, block: Batch) -> Batch:
        return block


@dataclass(frozen=True)
class Kind:
    """What the examples of a data set are.

    Attributes:
      name: by which tasks say that they take them.
      augmented: makes what happens to blocks of the fields of `data.augment`; None: nothing happens, and no field of
        `data.augment` is read.
    """

    name: str
    augmented: Callable[[Mapping[str, Any]], Transform] | None = None

    def transform(self, augment: Mapping[str, Any]) -> Transform:
        """Returns what happens to blocks.

        Args:
          augment: the config's `data.augment`.

        Raises:
          UserError: fields that are none, or have other values.
        """
        return self.augmented(augment) if self.augmented else Plain()


IMAGE = Kind("image", make_augment)
"""Blocks of "image" [B, H, W, C], uint8 in 0..255 or float32 in 0..1, and "label" [B]."""
DENSITY = Kind("density")
"""Blocks of "image" [B, H, W, C] float32 and "density" [B, H, W], which augmentation would move apart."""
TOKENS = Kind("tokens")
"""Blocks of "tokens" [B, T] and "labels" [B, T], perhaps with "segment_ids" [B, T] and "lengths" [B]."""
PAIRS = Kind("pairs")
"""Blocks of "pairs" [B, 2, T], "lengths" [B, 2] and "domain" [B]."""
VECTORS = Kind("vectors")
"""Blocks of "vectors" [B, T, D] and "targets" [B, K]."""
