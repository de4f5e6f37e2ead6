"""The streams of batches of a run: disjoint parts of its training examples, each in an order of its own."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from research.data import pipeline
from research.data.source import Source, keyed_permutation
from research.train.hooks import Stream
from research.train.stages import Stages

Batches = dict[str, dict[str, np.ndarray]]


class Part(Source):
    """The examples of a source that belong to a stream."""

    def __init__(self, source: Source, stream: Stream, seed: int):
        count = len(source)
        order = keyed_permutation(count, seed, 2**32 - 1)  # no epoch has this number
        self._source, self.name = source, f"{source.name}/{stream.name}"
        self._own = np.sort(order[round(stream.start * count) : round(stream.stop * count)])

    @property
    def digest(self) -> str:
        return self._source.digest

    def __len__(self) -> int:
        return len(self._own)

    def gather(
        self, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"] | None = None
    ) -> dict[str, np.ndarray]:
        return self._source.gather(self._own[indices], epochs)


def rounds(
    source: Source, streams: Sequence[Stream], stages: Stages, start: int, *, seed: int, **how: Any
) -> Iterator[Batches]:
    """Returns the batches (stream -> batch) of every update from `start` on.

    Args:
      source: of the training examples.
      streams: of the run; one that has all examples takes them in the order of the source's own.
      stages: of the run; the updates of a round share a batch.
      start: the first update.
      seed: of the run.
      how: of `research.data.pipeline.train_batches`.
    """

    def batches(stream: Stream) -> Iterator[dict[str, np.ndarray]]:
        whole = (stream.start, stream.stop) == (0.0, 1.0)
        part = source if whole else Part(source, stream, seed)
        return pipeline.train_batches(part, seed=seed, start_step=stages.round(start), num_steps=stages.rounds, **how)

    several = [batches(stream) for stream in streams]
    together = (dict(zip((s.name for s in streams), row, strict=True)) for row in zip(*several, strict=True))
    if all(len(stage.phases) == 1 for stage in stages.items):
        return together
    return _repeated(together, stages, start)


def _repeated(batches: Iterator[Batches], stages: Stages, start: int) -> Iterator[Batches]:
    """Yields the batch of every update from `start` on."""
    last, batch = -1, {}
    for step in range(start, stages.updates):
        if (now := stages.round(step)) != last:
            last, batch = now, next(batches)
        yield batch
