"""The batch at step s is a pure function of (seed, s)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data.augment import make_augment
from research.data.pipeline import batch_at, batch_indices, eval_batches, train_batches
from research.data.sources import load_splits
from research.errors import UserError

AUGMENT = make_augment({"crop_padding": 2, "flip": True, "randaugment": (2, 9), "random_erasing": 0.5})


@pytest.fixture(scope="module")
def source():
    return load_splits("synthetic", image_size=8, examples=50, validation_fraction=0)["train"]


def same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def take(source, **options):
    return list(train_batches(source, **(dict(batch_size=12, seed=3, augment=AUGMENT, num_steps=9) | options)))


def test_shapes_and_types(source):
    (batch, *rest) = take(source)
    assert len(rest) == 8
    assert (batch["image"].shape, batch["image"].dtype) == ((12, 8, 8, 3), np.float32)
    assert batch["label"].dtype == np.int32 and batch["index"].dtype == np.int64
    np.testing.assert_array_equal(batch["label"], source.labels[batch["index"]])


def test_deterministic_whatever_the_prefetch(source):
    first = take(source)
    for prefetch in (0, 1, 4):
        for a, b in zip(first, take(source, prefetch=prefetch), strict=True):
            same(a, b)


def test_resume_is_starting_there(source):
    full = take(source)
    for start in (1, 4, 8):
        resumed = take(source, start_step=start)
        assert len(resumed) == 9 - start
        for a, b in zip(full[start:], resumed, strict=True):
            same(a, b)
    assert take(source, start_step=9) == []


def test_replay_of_one_batch(source):
    for step, batch in enumerate(take(source)):
        same(batch, batch_at(source, step, batch_size=12, seed=3, augment=AUGMENT))


@pytest.mark.parametrize("shard_count", [2, 3, 4])
def test_shards_concatenate_to_the_global_batch(source, shard_count):
    shards = [take(source, shard_index=k, shard_count=shard_count) for k in range(shard_count)]
    for step, batch in enumerate(take(source)):
        same(batch, {key: np.concatenate([s[step][key] for s in shards]) for key in batch})


def test_seed_and_epoch_change_order_and_augmentation(source):
    first, other = take(source), take(source, seed=4)
    assert not np.array_equal(first[0]["index"], other[0]["index"])
    indices = np.concatenate([b["index"] for b in first])
    images = np.concatenate([b["image"] for b in first])
    assert not np.array_equal(indices[:50], indices[50:100])
    # The same example is augmented anew in the next epoch.
    again = [
        np.array_equal(images[t], images[50 + np.flatnonzero(indices[50:100] == indices[t])[0]]) for t in range(50)
    ]
    assert sum(again) < 10


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 2**40), steps=st.integers(1, 12))
def test_every_epoch_holds_every_example_once(size, batch, seed, steps):
    blocks = [batch_indices(size, step, batch_size=batch, seed=seed) for step in range(steps)]
    indices, epochs = (np.concatenate(part) for part in zip(*blocks, strict=True))
    assert np.array_equal(epochs, np.arange(steps * batch) // size)
    for epoch in range(steps * batch // size):
        assert np.array_equal(np.sort(indices[epochs == epoch]), np.arange(size))


def test_no_augmentation_scales_to_one(source):
    batch = batch_at(source, 0, batch_size=5, seed=0)
    np.testing.assert_allclose(batch["image"], source.images[batch["index"]] / 255, rtol=1e-6)


@pytest.mark.parametrize("shard_count", [1, 2])
def test_eval_reads_everything_once_and_pads(source, shard_count):
    options = dict(batch_size=16, prepare=AUGMENT.evaluate, shard_count=shard_count)
    shards = [list(eval_batches(source, shard_index=k, **options)) for k in range(shard_count)]
    batches = [{key: np.concatenate([s[i][key] for s in shards]) for key in shards[0][i]} for i in range(4)]
    assert [b["mask"].sum() for b in batches] == [16, 16, 16, 2]
    last = batches[-1]
    assert last["image"].shape == (16, 8, 8, 3) and last["mask"].dtype == np.float32
    assert last["mask"].tolist() == [1.0] * 2 + [0.0] * 14
    assert last["index"].tolist() == [48, 49] + [-1] * 14
    assert not last["image"][2:].any() and not last["label"][2:].any()
    kept = np.concatenate([b["label"][b["mask"] > 0] for b in batches])
    np.testing.assert_array_equal(kept, source.labels)


def test_bad_sizes(source):
    with pytest.raises(UserError, match="batch_size=10 .* 3 data shards"):
        take(source, batch_size=10, shard_count=3)
    with pytest.raises(UserError, match="shard_index=2"):
        take(source, shard_index=2, shard_count=2)
    empty = load_splits("digits", validation_fraction=0)["validation"]
    with pytest.raises(UserError, match="no examples"):
        take(empty)
    assert list(eval_batches(empty, batch_size=4, prepare=AUGMENT.evaluate)) == []
