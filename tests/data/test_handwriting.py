"""Simulated writers: styles are functions of the user, habits are fixed, upright writing is the digit itself, users
differ from the crowd."""

import numpy as np
import pytest

from research.data import handwriting
from research.data.handwriting import Styles, idiosyncrasy, load_handwriting, user_indices, user_styles, write
from research.data.keyed_random import KeyedRandom
from research.data.sources import load_splits
from research.errors import UserError

UPRIGHT = Styles(*(np.full(1, value) for value in (0.0, 0.0, 1.0, 1.0)))


def test_upright_writing_is_the_digit_enlarged_in_the_middle():
    glyph = np.zeros((1, 8, 8))
    glyph[0, 2, 5] = 1
    image = write(glyph, UPRIGHT)[0, :, :, 0]
    y, x = np.unravel_index(image.argmax(), image.shape)
    scale = 22 / 8
    assert (abs(y - (13.5 + (2 - 3.5) * scale)) < 1) and (abs(x - (13.5 + (5 - 3.5) * scale)) < 1)
    assert image.shape == (28, 28) and 0.6 < image.max() <= 1
    assert write(np.ones((1, 8, 8)), UPRIGHT)[0, :, :, 0].sum() == pytest.approx(22**2 + 0, rel=0.25)


def test_slant_rotation_width_and_stroke():
    column = np.zeros((1, 8, 8))
    column[0, :, 3:5] = 0.5
    base = write(column, UPRIGHT)[0, :, :, 0]
    lean = lambda image, row: (image[row] * np.arange(28)).sum() / image[row].sum()
    change = lambda **fields: write(
        column, Styles(**{**vars(UPRIGHT), **{k: np.full(1, v) for k, v in fields.items()}})
    )[0, :, :, 0]
    assert lean(change(slant=0.3), 8) - lean(change(slant=0.3), 19) == pytest.approx(0.3 * 11, abs=0.5)
    assert lean(change(rotation=0.2), 8) < lean(change(rotation=0.2), 19)
    assert (change(width=1.5)[13] > 0.05).sum() > (base[13] > 0.05).sum()
    np.testing.assert_allclose(change(stroke=2.0), base**2, atol=1e-6)


def test_a_user_s_style_and_habit_are_his_own():
    slants = [float(user_styles(u, 2).slant[0]) for u in range(10)]
    assert len(set(slants)) == 10 and all(0.3 <= abs(s) <= 0.5 for s in slants)
    assert user_styles(3, 2).slant[0] == user_styles(3, 1).slant[0]
    habits = [idiosyncrasy(u) for u in range(10)]
    assert all(a != b for a, b in habits) and len(set(habits)) > 5
    train, _ = load_handwriting(user=0)
    written, shape = idiosyncrasy(0)
    own = train._own(np.arange(len(train)))
    same = (own == train.glyphs).all((1, 2))
    assert same[train.labels != written].all() and not same[train.labels == written].any()
    swapped = own[train.labels == written][0].copy()
    assert (swapped[4] >= 0.9).all()
    others = train.glyphs[train.labels == shape]
    assert (np.delete(others, 4, 1) == np.delete(swapped, 4, 0)).all((1, 2)).any()


def test_examples_are_functions_of_their_index_and_of_the_epoch_in_the_population():
    splits = load_splits("handwriting")
    assert {name: len(s) for name, s in splits.items()} == {"train": 1293, "validation": 144, "test": 360}
    block = splits["train"].gather(np.array([5, 9]), np.array([0, 1]))
    np.testing.assert_array_equal(block["image"][1], splits["train"].gather(np.array([9]), np.array([1]))["image"][0])
    assert (block["image"][1] != splits["train"].gather(np.array([9]), np.array([2]))["image"][0]).any()
    styles = handwriting.population_styles(KeyedRandom.of(0, (1,), np.arange(500)))
    assert -0.25 < styles.slant.min() < -0.2 and 0.2 < styles.slant.max() < 0.25 and 0.7 < styles.stroke.min() < 0.75
    user = load_splits("handwriting", user=4)["test"]
    np.testing.assert_array_equal(
        user.gather(np.array([3]))["image"], user.gather(np.array([1, 3]), np.array([0, 7]))["image"][1:]
    )
    assert (
        block["image"].shape == (2, 28, 28, 1)
        and block["image"].dtype == np.float32
        and block["label"].dtype == np.int32
    )


def test_mistakes():
    with pytest.raises(UserError, match="user=10; valid: 0 to 9, or -1"):
        load_handwriting(user=10)
    train, _ = load_handwriting(user=1)
    assert len(set(user_indices(train, 50))) == 50
    with pytest.raises(UserError, match="has 1437 images, not 5000"):
        user_indices(train, 5000)
