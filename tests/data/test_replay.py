"""A user's examples and a replay of everybody's: which is which, in every order and epoch."""

import numpy as np
import pytest

from research.data.sources import load_splits
from research.errors import UserError


def write(path, first, side=4):
    """Ten training and three test images whose pixels are `first`, `first` + 1 and so on."""
    arrays = {}
    for split, count in (("train", 10), ("test", 3)):
        values = first + np.arange(count, dtype=np.uint8)
        arrays |= {f"{split}_image": np.tile(values[:, None, None], (1, side, side)), f"{split}_label": values % 3}
    np.savez(path, **arrays)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "me.npz", 0)
    write(tmp_path / "all.npz", 100)
    return str(tmp_path)


def load(folder, **options):
    return load_splits("replay:arrays", data_dir=folder, own={"file": "me.npz"}, replay={"file": "all.npz"}, **options)


def test_the_user_s_come_first_and_each_example_says_whose_it_is(folder):
    splits = load(folder)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [20, 0, 3]
    block = splits["train"].gather(np.array([12, 3, 19, 0]), np.array([0, 0, 1, 1]))
    assert block["image"][:, 0, 0, 0].tolist() == [102, 3, 109, 0]
    assert block["replay"].tolist() == [1, 0, 1, 0] and block["replay"].dtype == np.float32
    assert block["label"].tolist() == [0, 0, 1, 0] and splits["train"].num_classes == 3
    test = splits["test"].gather(np.arange(3))
    assert test["image"][:, 0, 0, 0].tolist() == [0, 1, 2] and test["replay"].tolist() == [0, 0, 0]


def test_some_of_each_are_drawn_from_the_seed(folder):
    few = [load(folder, count=4, replay_count=2, seed=seed)["train"] for seed in (0, 0, 1)]
    values = [source.gather(np.arange(6))["image"][:, 0, 0, 0].tolist() for source in few]
    assert values[0] == values[1] != values[2] and [value < 100 for value in values[0]] == [True] * 4 + [False] * 2
    assert few[0].digest == few[1].digest != few[2].digest


def test_a_replay_is_the_same_in_every_epoch():
    train = load_splits("replay:handwriting", own={"user": 3}, count=2, replay_count=2)["train"]
    first, second = (train.gather(np.arange(4), np.full(4, epoch))["image"] for epoch in (0, 7))
    np.testing.assert_array_equal(first, second)


def test_mistakes(folder, tmp_path):
    with pytest.raises(UserError, match="data.options.count=11: arrays/train has 10 training examples"):
        load(folder, count=11)
    write(tmp_path / "all.npz", 100, side=5)
    with pytest.raises(UserError, match=r"the user's images are \(4, 4, 1\), those of everybody \(5, 5, 1\)"):
        load(folder)
