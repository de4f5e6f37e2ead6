"""Data set `arrays`: a .npz file from the command line, what it must hold, and what is said of others."""

import numpy as np
import pytest

from launch import config as recipe
from research.data.sources import load_splits
from research.errors import UserError
from research.train.setup import make_setup

IMAGES, LABELS = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4), np.array([0, 1, 2, 0, 1, 2])
GOOD = {"train_image": IMAGES, "train_label": LABELS, "test_image": IMAGES[:2], "test_label": LABELS[:2]}
HELD = {"validation_image": IMAGES[3:], "validation_label": LABELS[3:]}


def save(folder, **arrays):
    np.savez(folder / "own.npz", **arrays)
    return {"data_dir": str(folder), "file": "own.npz"}


def test_a_file_gives_its_splits(tmp_path):
    splits = load_splits("arrays", validation_fraction=0.5, **save(tmp_path, **GOOD))
    assert {name: len(source) for name, source in splits.items()} == {"train": 3, "validation": 3, "test": 2}
    own = load_splits("arrays", validation_fraction=0.5, **save(tmp_path, **GOOD, **HELD))
    assert {name: len(source) for name, source in own.items()} == {"train": 6, "validation": 3, "test": 2}
    assert {source.num_classes for source in own.values()} == {3} and own["validation"].name == "arrays/validation"
    block = own["validation"].gather(np.array([1]))
    np.testing.assert_array_equal(block["image"], IMAGES[4:5, ..., None])
    np.testing.assert_array_equal(block["label"], [1])
    whole = load_splits("arrays", file=str(tmp_path / "own.npz"))
    assert len(whole["train"]) == 6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"test_label": None}, "lacks test_label; it holds train_image, train_label, test_image"),
        ({"validation_image": IMAGES}, "lacks validation_label"),
        ({"train_label": np.array([0, 1, object()], object)}, "train_label holds Python objects, which are not loaded"),
        ({"train_image": IMAGES.astype(np.int64)}, "arrays/train: images are int64"),
        ({"train_image": IMAGES[:, 0]}, "arrays/train: images are uint8.6, 4."),
        ({"test_image": IMAGES[:2, :3]}, "train images are .4, 4, 1. but test images are .3, 4, 1."),
        ({"train_label": LABELS[:3]}, "one for each of 6 images"),
        ({"train_label": LABELS / 2}, "labels are float64"),
        ({"test_label": -LABELS[:2] - 1}, "arrays/test: a label is -2"),
        (
            {"train_image": np.where(np.arange(6)[:, None, None] == 4, np.nan, IMAGES / 255)},
            "arrays/train: image 4 holds a number that is not finite",
        ),
        ({**HELD, "validation_image": np.full((3, 4, 4), np.inf)}, "arrays/validation: image 0 holds"),
    ],
)
def test_what_a_file_must_hold(tmp_path, changes, message):
    arrays = {name: array for name, array in {**GOOD, **changes}.items() if array is not None}
    with pytest.raises(UserError, match=message):
        load_splits("arrays", **save(tmp_path, **arrays))


def test_labels_beyond_the_classes_and_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="a label is 2, but num_classes=2"):
        load_splits("arrays", num_classes=2, **save(tmp_path, **GOOD))
    with pytest.raises(UserError, match="needs data.options.file=FILE.npz"):
        load_splits("arrays")
    with pytest.raises(UserError, match="is missing; make it by numpy.savez"):
        load_splits("arrays", file=str(tmp_path / "none.npz"))
    np.save(tmp_path / "one.npy", IMAGES)
    whole = (tmp_path / "own.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no arrays")
    for name, message in {
        "one.npy": "one array without a name",
        "cut.npz": "cannot be read as .npz",
        "text.npz": "cannot be read as .npz",
    }.items():
        with pytest.raises(UserError, match=message):
            load_splits("arrays", file=str(tmp_path / name))


def test_a_recipe_trains_on_a_file(tmp_path):
    given = save(tmp_path, **GOOD)
    config = recipe.load(
        "tests/tiny.py", {"data.name": "arrays", "data.dir": given["data_dir"], "data.options.file": given["file"]}
    )
    config["data"]["batch_size"], config["data"]["validation_fraction"] = 2, 0.5
    setup = make_setup(config)
    assert setup.task.num_classes == 3 and {name: len(source) for name, source in setup.splits.items()} == {
        "train": 3,
        "validation": 3,
        "test": 2,
    }
