"""Examples that a model has no place for, splits without labels and weights that are not finite are refused, not
trained on."""

import jax.numpy as jnp
import numpy as np
import pytest

from launch import config as recipe
from research.data.source import ArraySource
from research.errors import UserError
from research.modules.state import require_finite
from research.tasks.base import summary
from research.tasks.classification import Classification
from research.train.examples import Checked, Limits, check_labelled
from research.train.setup import make_setup


def limits(entry, least=0, most=9):
    return Limits("set", {entry: (least, most)})


def test_fewer_classes_than_the_data_are_refused_and_more_are_fine():
    with pytest.raises(UserError, match=r"model.num_classes=5 is less than the 10 classes of digits/train"):
        make_setup(recipe.load("tests/tiny.py", {"model.num_classes": "5"}))
    setup = make_setup(recipe.load("tests/tiny.py", {"model.num_classes": "12"}))
    assert setup.task.num_classes == 12
    with pytest.raises(UserError, match=r"model.output_dim=5 is less than the 10 classes"):
        make_setup(recipe.load("configs/pixel_sequences.py", {"model.output_dim": "5"}))


@pytest.mark.parametrize(
    ("entry", "values", "words"),
    [
        ("label", np.array([0, 9, 12]), r"set: label 12 is none that the model has; valid: 0..9"),
        ("label", np.array([0, -1]), r"label -1"),
        ("label", np.array([0.0, 1.0]), r"label is of type float64; valid: whole numbers"),
        ("tokens", np.array([[3, 10]], np.uint16), r"tokens 10"),
    ],
)
def test_numbers_that_the_model_has_no_place_for(entry, values, words):
    with pytest.raises(UserError, match=words):
        limits(entry).check({entry: values})
    limits(entry).check({entry: np.array([0, 9])})


def test_images_and_maps_must_be_finite_and_maps_not_negative():
    rule = Limits("set", {}, ("image", "density"), ("density",))
    good = {"image": np.zeros((2, 2), np.float32), "density": np.ones((2, 2), np.float32)}
    rule.check(good)
    for entry, value, words in (
        ("image", np.nan, "image holds a number that is not finite"),
        ("density", np.inf, "density"),
        ("density", -0.5, "-0.5"),
    ):
        bad = {k: v.copy() for k, v in good.items()}
        bad[entry][1, 1] = value
        with pytest.raises(UserError, match=words):
            rule.check(bad)


def test_every_batch_of_a_run_is_looked_at():
    setup = make_setup(recipe.load("tests/tiny.py", {"data.augment.crop_padding": "0"}))
    assert isinstance(setup.transform, Checked)
    images = np.zeros((4, 8, 8, 1), np.float32)
    images[3, 2, 2] = np.nan
    bad = ArraySource("bad", images, np.array([0, 1, 2, 3], np.int32), 10)
    with pytest.raises(UserError, match="digits: image holds a number that is not finite"):
        setup.transform.evaluate(bad.gather(np.arange(4)))
    with pytest.raises(UserError, match="digits: label 11"):
        setup.transform.evaluate({"image": images[:1], "label": np.array([11])})


def test_splits_without_labels_are_refused():
    class Unlabelled:
        name = "u/validation"

        def __len__(self):
            return 3

        def gather(self, indices, epochs=None):
            return {"tokens": np.zeros((len(indices), 4), np.int32), "labels": np.full((len(indices), 4), -1, np.int32)}

    with pytest.raises(UserError, match=r"u/validation: none of the first 3 validation examples has a label"):
        check_labelled({"validation": Unlabelled()})
    with pytest.raises(UserError, match=r"the test split of x has no label"):
        summary(Classification(3), {"correct": 0.0, "nll": 0.0, "count": np.float32(0)}, "the test split of x")


def test_weights_must_be_finite():
    good = {"a": np.ones(2, np.float32), "n": np.array([1, 2]), "h": jnp.ones(2, jnp.bfloat16)}
    require_finite(good, "runs/x")
    with pytest.raises(UserError, match=r"runs/x: b holds numbers that are not finite"):
        require_finite({**good, "c": np.array([np.inf]), "b": jnp.array([0, np.nan], jnp.bfloat16)}, "runs/x")


def test_metrics_are_known_before_training():
    with pytest.raises(UserError, match=r"task.metric='speed'; valid with .*: loss, perplexity, accuracy$"):
        make_setup(recipe.load("tests/tiny_lm.py:probe", {"task.metric": "speed"}))
    with pytest.raises(UserError, match=r"task.metric='bits_per_byte'"):
        make_setup(recipe.load("tests/tiny_lm.py:probe", {"task.metric": "bits_per_byte"}))
