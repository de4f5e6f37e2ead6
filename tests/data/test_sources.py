"""Named data sets, the splits cut from them, and what bad input gets."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data import idx
from research.data.idx_sets import reduced
from research.data.source import ArraySource, keyed_permutation
from research.data.sources import load_splits
from research.data.splits import stratified_split
from research.errors import UserError


def test_digits_split_counts_and_classes():
    splits = load_splits("digits")
    assert {k: len(v) for k, v in splits.items()} == {"train": 1293, "validation": 144, "test": 360}
    assert splits["train"].image_shape == (8, 8, 1)
    everything = np.concatenate([s.images.reshape(len(s), -1) for s in splits.values()])
    labels = np.concatenate([s.labels for s in splits.values()])
    from sklearn.datasets import load_digits

    raw = load_digits()
    expected = np.round(raw.data * 255 / 16).astype(np.uint8)
    # The union of the splits is the data set: sorted rows agree, so nothing is lost or read twice.
    order = lambda rows: rows[np.lexsort(rows.T)]
    np.testing.assert_array_equal(
        order(np.column_stack([everything, labels])), order(np.column_stack([expected, raw.target]))
    )
    assert everything.max() == 255
    for split in splits.values():
        share = np.bincount(split.labels, minlength=10) / len(split)
        assert np.abs(share - np.bincount(raw.target) / 1797).max() < 1 / len(split) + 2 / 1293


def test_seed_moves_validation_but_never_test():
    first, second = load_splits("digits", seed=0), load_splits("digits", seed=1)
    np.testing.assert_array_equal(first["test"].images, second["test"].images)
    assert not np.array_equal(first["validation"].images, second["validation"].images)
    again = load_splits("digits", seed=0)
    np.testing.assert_array_equal(first["validation"].images, again["validation"].images)
    # Golden: these examples are what the word "digits" means in the results; they must never move.
    assert zlib.crc32(first["test"].images.tobytes()) == GOLDEN_TEST_CRC
    assert zlib.crc32(first["validation"].images.tobytes()) == GOLDEN_VALIDATION_CRC


GOLDEN_TEST_CRC, GOLDEN_VALIDATION_CRC = 3864908771, 2655354196


@settings(deadline=None, max_examples=50)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=60), part=st.floats(0, 0.99), seed=st.integers(-3, 2**64)
)
def test_stratified_split_partitions_in_proportion(labels, part, seed):
    labels = np.array(labels)
    count = int(part * len(labels))
    kept, held = stratified_split(labels, count, seed)
    assert len(held) == count
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(labels)))
    exact = np.bincount(labels) * count / len(labels)
    assert np.abs(np.bincount(labels[held], minlength=len(exact)) - exact).max(initial=0) < 1


def test_keyed_permutation_is_stable_over_versions():
    np.testing.assert_array_equal(keyed_permutation(8, 0, 0), GOLDEN_PERMUTATION)
    assert not np.array_equal(keyed_permutation(100, 0, 1), keyed_permutation(100, 1, 0))


GOLDEN_PERMUTATION = [0, 2, 1, 5, 4, 3, 6, 7]


def test_synthetic_is_deterministic_and_learnable():
    options = dict(image_size=6, channels=2, num_classes=3, examples=90, test_examples=30)
    first, second = (load_splits("synthetic", validation_fraction=0.2, **options) for _ in range(2))
    assert {k: len(v) for k, v in first.items()} == {"train": 72, "validation": 18, "test": 30}
    assert first["train"].image_shape == (6, 6, 2) and first["train"].num_classes == 3
    for split in first:
        np.testing.assert_array_equal(first[split].images, second[split].images)
    means = np.stack([first["train"].images[first["train"].labels == c].mean(0) for c in range(3)])
    distances = np.abs(first["test"].images[:, None] - means).sum((2, 3, 4))
    assert (distances.argmin(1) == first["test"].labels).all()


def test_arrays_and_gather():
    images, labels = np.arange(80, dtype=np.uint8).reshape(10, 2, 4), np.arange(10) % 2
    splits = load_splits("arrays", train=(images, labels), test=(images[:3], labels[:3]), validation_fraction=0)
    block = splits["train"].gather(np.array([7, 2]))
    np.testing.assert_array_equal(block["image"], images[[7, 2]][..., None])
    assert block["label"].tolist() == [1, 0] and block["label"].dtype == np.int32
    assert len(splits["validation"]) == 0 and splits["train"].num_classes == 2
    assert isinstance(splits["test"], ArraySource)


GOOD = (np.zeros((4, 2, 2), np.uint8), np.array([0, 1, 0, 1]))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fashon_mnist", {}, ["fashon_mnist", "Did you mean fashion_mnist", "digits"]),
        ("digits", {"image_size": 3}, ["no option 'image_size'", "none"]),
        ("synthetic", {"size": 3}, ["'size'", "image_size, channels"]),
        ("synthetic", {"examples": 0}, ["examples=0"]),
        ("digits", {"validation_fraction": 1.0}, ["1.0", "[0, 1)"]),
        ("digits", {"validation_fraction": -0.1}, ["-0.1"]),
        ("synthetic", {"examples": 1, "validation_fraction": 0.9}, ["no training example"]),
        ("idx", {}, ["data_dir"]),
        ("idx", {"data_dir": "/nope"}, ["/nope"]),
        ("fashion_mnist", {"data_dir": "/nope"}, ["/nope"]),
        ("tfds:nothing_here", {"data_dir": "/nope"}, ["nothing_here", "/nope", "launch.prepare"]),
        ("arrays", {"train": (GOOD[0].astype(np.int64), GOOD[1]), "test": GOOD}, ["arrays/train", "int64"]),
        ("arrays", {"train": (GOOD[0], GOOD[1][:3]), "test": GOOD}, ["one for each of 4"]),
        ("arrays", {"train": GOOD, "test": (GOOD[0], -GOOD[1])}, ["arrays/test", "-1"]),
        ("arrays", {"train": GOOD, "test": GOOD, "num_classes": 1}, ["num_classes=1"]),
        ("arrays", {"train": GOOD, "test": (GOOD[0][:, :1], GOOD[1])}, ["(2, 2, 1)", "(1, 2, 1)"]),
    ],
)
def test_bad_input_names_cause_and_remedy(name, options, words):
    with pytest.raises(UserError) as caught:
        load_splits(name, **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message) < 400 and "\n" not in message


def test_missing_fashion_mnist_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(idx, "usual_folders", lambda name: [tmp_path / "absent"])
    with pytest.raises(UserError, match="dataset-fashion-mnist.*data_dir"):
        load_splits("fashion_mnist")


def test_nestax_data_is_looked_at_first(monkeypatch, tmp_path):
    monkeypatch.setenv("NESTAX_DATA", str(tmp_path))
    assert idx.usual_folders("fashion_mnist")[0] == tmp_path / "fashion-mnist"


def test_real_fashion_mnist():
    if not any(place.is_dir() for place in idx.usual_folders("fashion_mnist")):
        pytest.skip("Fashion-MNIST is not installed (Debian package dataset-fashion-mnist)")
    splits = load_splits("fashion_mnist")
    assert {k: len(v) for k, v in splits.items()} == {"train": 54000, "validation": 6000, "test": 10000}
    assert np.bincount(splits["validation"].labels).tolist() == [600] * 10
    # The published mean of the training pixels is 0.2860.
    total = splits["train"].images.sum(dtype=np.int64) + splits["validation"].images.sum(dtype=np.int64)
    assert total / (60000 * 784 * 255) == pytest.approx(0.2860, abs=5e-5)


def test_images_can_be_averaged_and_training_examples_cut(tmp_path):
    rng = np.random.default_rng(0)
    train, test = (
        ArraySource(f"a/{n}", rng.integers(0, 256, (n, 6, 4, 1), dtype=np.uint8), np.arange(n) % 3, 3) for n in (20, 5)
    )
    small, held = reduced(train, test, 2, 8)
    assert small.image_shape == held.image_shape == (3, 2, 1) and len(small) == 8 and len(held) == 5
    expected = np.round(test.images.astype(np.float64).reshape(5, 3, 2, 2, 2).mean((2, 4)))
    np.testing.assert_array_equal(held.images[..., 0], expected)
    again, more = reduced(train, test, 2, 8)[0], reduced(train, test, 2, 12)[0]
    np.testing.assert_array_equal(again.images, small.images)
    rows = lambda s: {image.tobytes() for image in s.images}
    assert rows(small) < rows(more) < rows(reduced(train, test, 2, 0)[0])
    assert reduced(train, test, 1, 0) == (train, test)


@pytest.mark.parametrize(
    "average, examples, message",
    [(4, 0, "average=4 does not divide images of 6x4"), (0, 0, "average=0"), (1, 21, "there are 20")],
)
def test_reductions_that_do_not_fit(average, examples, message):
    source = ArraySource("a", np.zeros((20, 6, 4, 1), np.uint8), np.zeros(20, np.int32), 1)
    with pytest.raises(UserError, match=message):
        reduced(source, source, average, examples)
