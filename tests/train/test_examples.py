"""Examples that a model has no place for, splits without labels and weights that are not finite are refused, not
trained on."""

import jax.numpy as jnp
import numpy as np
import pytest

from launch import config as recipe
from research.data.kinds import Plain
from research.data.source import ArraySource, Source
from research.errors import UserError
from research.modules.state import require_finite
from research.tasks.base import summary
from research.tasks.classification import Classification
from research.tasks.limits import Limits
from research.train.examples import Checked, check_labelled
from research.train.setup import make_setup


def test_fewer_classes_than_the_data_are_refused_and_more_are_fine():
    with pytest.raises(UserError, match=r"model.num_classes=5 is less than the 10 classes of digits/train"):
        make_setup(recipe.load("tests/tiny.py", {"model.num_classes": "5"}))
    setup = make_setup(recipe.load("tests/tiny.py", {"model.num_classes": "12"}))
    assert setup.task.num_classes == 12
    with pytest.raises(UserError, match=r"model.output_dim=5 is less than the 10 classes"):
        make_setup(recipe.load("configs/pixel_sequences.py", {"model.output_dim": "5"}))


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
    class Unlabelled(Source):
        name = "u/validation"

        def __len__(self):
            return 3

        def gather(self, indices, epochs=None):
            return {"tokens": np.zeros((len(indices), 4), np.int32), "labels": np.full((len(indices), 4), -1, np.int32)}

    with pytest.raises(UserError, match=r"u/validation: none of the first 3 validation examples has a label"):
        check_labelled({"validation": Unlabelled()}, Plain(), Limits(labels=("labels",)))
    check_labelled({"validation": Unlabelled()}, Plain(), Limits())
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
