"""What tasks ask of examples: numbers that the model has a place for, numbers that are finite."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from research.data.source import Told
from research.errors import UserError
from research.tasks import registry
from research.tasks.limits import Limits
from research.tasks.section import TaskSection


def limits(entry, least=0, most=9):
    return Limits({entry: (least, most)})


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
        limits(entry).check({entry: values}, "set")
    limits(entry).check({entry: np.array([0, 9])}, "set")


def test_images_and_maps_must_be_finite_and_maps_not_negative():
    rule = Limits({}, ("image", "density"), ("density",))
    good = {"image": np.zeros((2, 2), np.float32), "density": np.ones((2, 2), np.float32)}
    rule.check(good, "set")
    for entry, value, words in (
        ("image", np.nan, "image holds a number that is not finite"),
        ("density", np.inf, "density"),
        ("density", -0.5, "-0.5"),
    ):
        bad = {k: v.copy() for k, v in good.items()}
        bad[entry][1, 1] = value
        with pytest.raises(UserError, match=words):
            rule.check(bad, "set")


SIZED = SimpleNamespace(num_classes=7, vocab_size=9, output_dim=0, num_domains=3)
TOLD = Told({"name": "set", "num_classes": 5, "vocab_size": 9, "token_bytes": None, "domains": ("a", "b")})
TOLD_OF_PROMPTS = Told({"name": "p", "points": 4, "binary": True, "variance": 1.0, "scored_from": 0, "mean_count": 2.0})
SHAPES = {
    name: jax.ShapeDtypeStruct((1, *shape), np.float32)
    for name, shape in {"image": (8, 8, 1), "tokens": (6,), "pairs": (2, 5), "vectors": (8, 3)}.items()
}


@pytest.mark.parametrize(
    ("name", "told", "wanted", "units"),
    [
        ("classification", TOLD, Limits({"label": (0, 6)}, ("image",)), 1),
        ("language_modelling", TOLD, Limits({"tokens": (0, 8), "labels": (-1, 8)}, labels=("labels",)), 6),
        ("contrastive", TOLD, Limits({"pairs": (0, 8), "lengths": (0, 5), "domain": (0, 2)}), 1),
        ("in_context_learning", TOLD_OF_PROMPTS, Limits(finite=("vectors",)), 8),
        ("density_counting", TOLD_OF_PROMPTS, Limits(finite=("image", "density"), counts=("density",)), 1),
    ],
)
def test_what_each_task_asks_of_examples_and_counts_in_them(name, told, wanted, units):
    task = registry.known()[name].make(TaskSection(), SIZED, told, SHAPES)
    assert task.limits(SIZED, SHAPES) == wanted and task.units(SHAPES) == units


def test_tokens_may_have_answers_of_their_own_number():
    task = registry.known()["language_modelling"].make(TaskSection(), SIZED, TOLD, SHAPES)
    answers = SimpleNamespace(vocab_size=9, output_dim=4)
    assert task.limits(answers, SHAPES).whole == {"tokens": (0, 8), "labels": (-1, 3)}


@pytest.mark.parametrize(
    ("name", "options", "told", "percent", "beside"),
    [
        ("classification", {}, TOLD, True, {}),
        ("language_modelling", {}, TOLD, False, {"accuracy": 0.5}),
        ("language_modelling", {"metric": "accuracy"}, TOLD, True, {}),
        ("in_context_learning", {}, TOLD_OF_PROMPTS, True, {}),
        ("density_counting", {}, TOLD_OF_PROMPTS, False, {"mae_of_mean": 3.0}),
    ],
)
def test_what_is_shown_in_percent_and_what_stands_beside_the_metric(name, options, told, percent, beside):
    task = registry.known()[name].make(TaskSection(**options), SIZED, told, SHAPES)
    found = {"loss": 1.0, "accuracy": 0.5} if name != "density_counting" else {"mae": 2.0, "mae_of_mean": 3.0}
    assert task.percent is percent and task.columns(found) == beside
