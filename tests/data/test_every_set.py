"""What every registered data set must do, generated from the registry; those that read files are given small ones."""

import numpy as np
import pytest

from research.data import registry
from research.data.sources import kind_of_examples, load_splits
from research.errors import UserError
from tests import text_pairs

COUNTS = {"train_examples": 40, "test_examples": 9}
MADE = {
    "digits": ("digits", {}),
    "synthetic": ("synthetic", {"examples": 40, "test_examples": 9}),
    "handwriting": ("handwriting", {}),
    "counting": ("counting", COUNTS),
    "in_context:": ("in_context:linear", {"dims": 3, "points": 5, **COUNTS}),
    "probe:": ("probe:mqar", {"length": 16, "pairs": 2, "vocab_size": 32, **COUNTS}),
    "stdlib_text": ("stdlib_text", {"length": 32, "max_bytes": 30_000}),
    "text": ("text", {"length": 32}),
    "text_pairs": ("text_pairs", {"length": 6, "vocab_size": 40}),
    "arrays": ("arrays", {"file": "arrays.npz"}),
}
"""Registered name -> a data set of it, and options that make it small."""
ELSEWHERE = {
    "idx": "test_idx.py",
    "mnist": "test_idx.py",
    "fashion_mnist": "test_idx.py",
    "tfds:": "test_tfds.py",
    "tfds_text:": "test_text.py",
    "tiny_shakespeare": "test_text.py",
    "token_file": "test_tokens.py",
    "stdlib_pairs": "test_pairs.py",
    "replay:": "test_replay.py",
}
"""Registered name -> the tests beside this file that have the files, or the time, that it takes."""
BLOCKS = {
    "image": {"image", "label"},
    "density": {"image", "density"},
    "tokens": {"tokens", "labels"},
    "pairs": {"pairs", "lengths", "domain"},
    "vectors": {"vectors", "targets"},
}
"""Kind of examples -> what a block of them holds at least."""
FACTS = {
    "image": {"num_classes"},
    "density": {"mean_count"},
    "tokens": {"vocab_size", "token_bytes"},
    "pairs": {"vocab_size", "domains"},
    "vectors": {"points", "binary", "variance", "scored_from"},
}
"""Kind of examples -> what the tasks of it ask of a source."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files of `text`, `text_pairs` and `arrays`."""
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    text_pairs.write(folder, 40, 9, 8)
    (folder / "text.txt").write_text(" ".join(map(str, range(2000))))
    images = {
        f"{split}_image": rng.integers(0, 255, (n, 5, 5, 1), np.uint8) for split, n in (("train", 40), ("test", 9))
    }
    labels = {f"{split}_label": np.arange(n) % 3 for split, n in (("train", 40), ("test", 9))}
    np.savez(folder / "arrays.npz", **images, **labels)
    return folder


def load(name, folder, **options):
    text, own = MADE[name]
    place = folder / "text.txt" if name == "text" else folder if name in ("text_pairs", "arrays") else None
    return load_splits(text, data_dir=place and str(place), **own, **options)


def test_every_registered_set_has_tests():
    registry.find("digits")
    assert registry._SETS.keys() == MADE.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("name", MADE)
def test_blocks_are_of_their_kind_and_the_same_however_they_are_asked_for(name, folder):
    splits = load(name, folder)
    assert list(splits) == ["train", "validation", "test"]
    for split, source in splits.items():
        last = len(source) - 1
        indices = np.array([last, 0, last // 2])
        block = source.gather(indices)
        assert source.facts().keys() == FACTS[kind_of_examples(MADE[name][0]).name]
        assert BLOCKS[kind_of_examples(MADE[name][0]).name] <= block.keys()
        assert {len(array) for array in block.values()} == {3}
        for row, index in enumerate(indices):
            for key, array in source.gather(indices[row : row + 1]).items():
                np.testing.assert_array_equal(array[0], block[key][row], err_msg=f"{split} {index} {key}")
        if "label" in block:
            assert block["label"].max() < source.num_classes


@pytest.mark.parametrize("name", MADE)
def test_splits_differ_and_stay(name, folder):
    first, again = load(name, folder), load(name, folder)
    assert [source.digest for source in first.values()] == [source.digest for source in again.values()]
    blocks = [source.gather(np.arange(3)) for source in first.values()]
    entry = next(key for key in ("image", "tokens", "pairs", "vectors") if key in blocks[0])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not np.array_equal(blocks[one][entry], blocks[other][entry])


@pytest.mark.parametrize("name", MADE)
def test_an_unknown_option_is_told_in_a_line(name, folder):
    with pytest.raises(UserError, match="lenght") as caught:
        load(name, folder, lenght=3)
    assert "\n" not in str(caught.value)
