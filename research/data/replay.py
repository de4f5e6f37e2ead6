"""A user's few examples beside those of everybody, a replay: for training that must tell them apart.

`replay:NAME` is data set NAME twice, with options of its own each time: of the user (`own`), and of everybody
(`replay`). Training examples are the user's and then the replay; each holds `replay`, 1 where it is of the replay. The
validation and test examples are the user's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from jaxtyping import Int

from research.data import digests
from research.data.kinds import IMAGE
from research.data.registry import register
from research.data.source import Source, keyed_permutation
from research.data.sources import load_splits
from research.errors import UserError
from research.values import COUNT

_CHOSEN = 0x72
"""Word that keeps the choice of the user's examples apart from other draws."""


@dataclasses.dataclass(frozen=True)
class Replayed(Source):
    """Examples of two sources as one, the user's first.

    Attributes:
      name: of the source.
      own, replay: the sources.
    """

    name: str
    own: Any
    replay: Any

    @property
    def num_classes(self) -> int:
        """Of both: the larger number."""
        return max(int(self.own.num_classes), int(self.replay.num_classes))

    def facts(self) -> Mapping[str, Any]:
        return {"num_classes": self.num_classes}

    @property
    def digest(self) -> str:
        return digests.of_arrays(*(np.frombuffer(part.digest.encode(), np.uint8) for part in (self.own, self.replay)))

    def __len__(self) -> int:
        return len(self.own) + len(self.replay)

    def gather(
        self, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"] | None = None
    ) -> dict[str, np.ndarray]:
        """The block of the examples, with "replay": float32 [B]; those of the replay are the same in every epoch."""
        indices, first = np.asarray(indices), len(self.own)
        order = np.argsort(indices >= first, kind="stable")
        ours = int((indices < first).sum())
        blocks = []
        if ours:
            blocks.append(self.own.gather(indices[order[:ours]], None if epochs is None else epochs[order[:ours]]))
        if ours < len(indices):
            blocks.append(self.replay.gather(indices[order[ours:]] - first))
        back = np.argsort(order, kind="stable")
        joined = {name: np.concatenate([block[name] for block in blocks])[back] for name in blocks[0]}
        return {**joined, "replay": (indices >= first).astype(np.float32)}


@register("replay:", IMAGE)
def load_replay(
    name: str,
    *,
    data_dir: str | None = None,
    seed: int = 0,
    own: dict[str, Any] | None = None,
    replay: dict[str, Any] | None = None,
    count: Annotated[int, COUNT] = 0,
    replay_count: Annotated[int, COUNT] = 0,
) -> dict[str, Source]:
    """Splits of a data set of labelled images, the user's version with a replay of everybody's.

    Args:
      name: of the data set, which is loaded twice.
      data_dir: where its files lie, unless `own` or `replay` says otherwise by `data_dir`.
      seed: keys which examples are taken.
      own, replay: options of the user's version and of everybody's.
      count: the user's training examples; 0: all.
      replay_count: training examples of everybody; 0: all.

    Raises:
      UserError: data that cannot be loaded, of different shapes, or fewer examples than are asked for.
    """
    both = []
    for options in (own or {}, replay or {}):
        given = {"data_dir": data_dir, "validation_fraction": 0.0, "seed": seed, **options}
        both.append(load_splits(name, **given))
    mine, everybody = both
    train = Replayed(
        f"replay:{name}/train",
        _taken(mine["train"], count, seed, "count"),
        _taken(everybody["train"], replay_count, seed, "replay_count"),
    )
    shapes = [source.gather(np.zeros(1, np.int64))["image"].shape[1:] for source in (train.own, train.replay)]
    if shapes[0] != shapes[1]:
        raise UserError(f"replay:{name}: the user's images are {shapes[0]}, those of everybody {shapes[1]}")
    none = _subset(everybody["train"], np.zeros(0, np.int64))
    rest = {split: Replayed(f"replay:{name}/{split}", mine[split], none) for split in ("validation", "test")}
    return {"train": train, **rest}


def _taken(source: Any, count: int, seed: int, option: str) -> Any:
    """`count` examples of a source, drawn from the seed; 0: all."""
    if count > len(source):
        raise UserError(f"data.options.{option}={count}: {source.name} has {len(source)} training examples")
    return _subset(source, np.sort(keyed_permutation(len(source), seed, _CHOSEN)[:count])) if count else source


def _subset(source: Any, indices: Int[np.ndarray, " M"]) -> Any:
    return source.subset(indices, source.name)
