"""The deterministic order of the data: the batch at step s is a pure function of (seed, s).

Examples are counted from the start of the run: example t is at place t mod N of epoch t // N, whose order is a
permutation keyed by (seed, epoch). Nothing is dropped, so a batch may straddle two epochs. Resuming at a step is
starting there; a shard takes its contiguous slice of the global batch, which is the same for every number of shards.
"""

import functools
from collections.abc import Callable, Iterator

import grain
import numpy as np
from jaxtyping import Int

from research.data.augment import Augment
from research.data.kinds import Batch, Transform
from research.data.source import Source, keyed_permutation
from research.errors import UserError

# A batch touches few epochs; two loader threads and a replay can be in different ones.
_epoch_order = functools.lru_cache(maxsize=4)(keyed_permutation)


def epoch_permutation(num_examples: int, seed: int, epoch: int) -> Int[np.ndarray, " N"]:
    """The order of the training examples in an epoch."""
    return _epoch_order(num_examples, seed, epoch)


def batch_indices(
    num_examples: int,
    step: int,
    *,
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
    microbatches: int = 1,
) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"]]:
    """Which examples (index, epoch) one shard of the batch at `step` holds; b = batch_size / shard_count.

    With `microbatches` > 1 the shard has its slice of each of the equal microbatches of the batch, one after the other.
    """
    share = batch_size // microbatches // shard_count
    within = (
        batch_size // microbatches * np.arange(microbatches)[:, None] + shard_index * share + np.arange(share)
    ).reshape(-1)
    counters = step * batch_size + within.astype(np.int64)
    epochs, places = np.divmod(counters, num_examples)
    indices = np.empty_like(places)
    for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
        here = epochs == epoch
        indices[here] = epoch_permutation(num_examples, seed, epoch)[places[here]]
    return indices, epochs


def batch_at(
    source: Source,
    step: int,
    *,
    batch_size: int,
    seed: int,
    augment: Transform | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    microbatches: int = 1,
) -> Batch:
    """The training batch at a step, as `train_batches` gives it: for replay of a single one."""
    _check_sizes(source, batch_size, shard_index, shard_count, microbatches)
    return _load(source, batch_size, seed, augment or Augment(), (shard_index, shard_count, microbatches), step)


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    augment: Transform | None,
    num_steps: int,
    start_step: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    microbatches: int = 1,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """The batches of steps `start_step` to `num_steps` - 1, read ahead by a background thread.

    Args:
      source: the training data.
      batch_size: size of the global batch, divisible by `shard_count * microbatches`.
      seed: keys the order and the augmentation.
      augment: what happens to the blocks; None scales images to 0..1.
      num_steps: the step at which the run ends, whatever `start_step` is.
      start_step: the first step to give.
      shard_index: which contiguous slice of the global batch to give.
      shard_count: into how many slices the global batch is cut.
      microbatches: that the batch is trained on in: the slice is one of each, so that slices of a microbatch
        make it up.
      prefetch: how many batches to hold ready; 0 loads each when it is asked for, in the caller's thread.

    Yields:
      What `augment` makes of the blocks, for images `{"image": float32 [b, H, W, C], "label": int32 [b]}`, and "index":
      int64 [b], the examples' places in `source`; b = batch_size / shard_count.
    """
    _check_sizes(source, batch_size, shard_index, shard_count, microbatches)
    load = functools.partial(
        _load, source, batch_size, seed, augment or Augment(), (shard_index, shard_count, microbatches)
    )
    return _iterate(load, start_step, num_steps, prefetch)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    prepare: Callable[[Batch], Batch],
    shard_index: int = 0,
    shard_count: int = 1,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Every example of a source once, in order, in batches of equal size.

    `prepare` makes a batch of a block (`Augment.evaluate`). The last batch is filled with zeros of index -1, whose
    `mask` (float32 [b]) is 0; real examples have mask 1.
    """
    if len(source) == 0:
        return iter(())
    _check_sizes(source, batch_size, shard_index, shard_count)
    shard_size = batch_size // shard_count

    def load(step: int) -> Batch:
        start = int(step) * batch_size + shard_index * shard_size
        indices = np.arange(start, start + shard_size, dtype=np.int64)
        real = indices < len(source)
        # Filler reads example 0, so that a shard of nothing but filler has the right shape too.
        batch = prepare(source.gather(np.where(real, indices, 0)))
        if not real.all():
            batch = {
                k: np.where(real.reshape(-1, *(1,) * (v.ndim - 1)), v, 0).astype(v.dtype) for k, v in batch.items()
            }
        return {**batch, "index": np.where(real, indices, -1), "mask": real.astype(np.float32)}

    return _iterate(load, 0, -(-len(source) // batch_size), prefetch)


def _check_sizes(source: Source, batch_size: int, shard_index: int, shard_count: int, microbatches: int = 1) -> None:
    if len(source) == 0:
        raise UserError(f"{source.name} has no examples.")
    if batch_size < 1 or batch_size % (shard_count * microbatches):
        of = f" of {microbatches} microbatches each" if microbatches > 1 else ""
        raise UserError(f"batch_size={batch_size} must be a positive multiple of the {shard_count} data shards{of}.")
    if not 0 <= shard_index < shard_count:
        raise UserError(f"shard_index={shard_index} is not in 0..{shard_count - 1}.")


def _load(
    source: Source, batch_size: int, seed: int, augment: Transform, shard: tuple[int, int, int], step: int
) -> Batch:
    index, count, microbatches = shard
    indices, epochs = batch_indices(
        len(source),
        int(step),
        batch_size=batch_size,
        seed=seed,
        shard_index=index,
        shard_count=count,
        microbatches=microbatches,
    )
    return {**augment.train(source.gather(indices, epochs), indices, epochs, seed), "index": indices}


def _iterate(load: Callable[[int], Batch], start: int, stop: int, prefetch: int) -> Iterator[Batch]:
    if start >= stop:
        return iter(())
    # One thread keeps up with training on a core beside it; a block is loaded as a whole.
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=max(prefetch, 1))
    return iter(grain.MapDataset.range(start, stop).map(load).to_iter_dataset(options))
