"""Crowds of digits: a function of the index, densities that sum to the count, splits apart, mistakes."""

import numpy as np
import pytest

from research.data import counting
from research.data.sources import load_splits
from research.errors import UserError


def test_examples_are_functions_of_seed_index_and_epoch():
    splits = load_splits("counting", fresh=True)
    train = splits["train"]
    block = train.gather(np.array([3, 7]), np.array([0, 2]))
    again = train.gather(np.array([7]), np.array([2]))
    np.testing.assert_array_equal(block["image"][1], again["image"][0])
    assert (train.gather(np.array([7]), np.array([3]))["image"] != again["image"]).any()
    assert (
        load_splits("counting", fresh=True, seed=1)["train"].gather(np.array([7]), np.array([2]))["image"]
        != again["image"]
    ).any()
    test = splits["test"]
    np.testing.assert_array_equal(
        test.gather(np.array([1]), np.array([5]))["image"], test.gather(np.array([1]))["image"]
    )
    assert (test.gather(np.array([1]))["image"] != splits["validation"].gather(np.array([1]))["image"]).any()


def test_density_sums_to_the_number_of_digits_and_peaks_where_one_stands():
    train = load_splits("counting", least=1, most=40)["train"]
    block = train.gather(np.arange(200))
    counts = block["density"].sum((1, 2))
    np.testing.assert_allclose(counts, counts.round(), atol=1e-3)
    assert counts.min() >= 1 and counts.max() <= 40 and abs(counts.mean() - train.mean_count) < 2.5
    assert block["image"].shape == (200, 64, 64, 1) and block["image"].min() == 0 and 0.9 < block["image"].max() <= 1
    single = load_splits("counting", least=1, most=1)["train"].gather(np.arange(50))
    for image, density in zip(single["image"][..., 0], single["density"], strict=True):
        y, x = np.unravel_index(density.argmax(), density.shape)
        rows, columns = np.nonzero(image)
        assert max(abs(rows - y).max(), abs(columns - x).max()) <= 7
        sizes = {
            counting.SIZES[min(int(near / 64 * 3), 2)] for near in (y - 0.5, y + 0.5)
        }  # the centre is known to half a pixel
        assert np.ptp(rows) <= max(sizes)
    middle = [d for d in single["density"] if 10 < d.argmax() // 64 < 54 and 10 < d.argmax() % 64 < 54]
    np.testing.assert_allclose(np.max(middle), 1 / (2 * np.pi * 4), rtol=0.02)


def test_test_digits_are_not_trained_on():
    stamps = {split: {s.tobytes() for s in counting._stamps(split)[:, 1]} for split in ("train", "validation", "test")}
    assert not stamps["train"] & stamps["test"] and not stamps["validation"] & stamps["test"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 8}, "image_size=8 is less than the largest digit's 12 pixels"),
        ({"least": 9, "most": 3}, "least=9 and most=3 must be 1 <= least <= most"),
        ({"test_examples": 0}, "test_examples=0 must be a number of at least 1"),
        ({"sigma": 0.0}, "sigma=0.0 must be above 0"),
        ({"size": 3}, "Data set 'counting' has no option 'size'"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        load_splits("counting", **options)
