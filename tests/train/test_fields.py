"""The table of fields: it covers the config, and every field refuses what is out of its range, in recipes and on
command lines."""

import copy

import pytest

from launch import config as recipe
from research.errors import UserError
from research.train.config import base_config, check, value_of
from research.train.sections import FIELDS, FREE
from research.values import fit


def leaves(config, prefix=""):
    for key, value in config.items():
        name = prefix + key
        if name not in FREE:
            yield from leaves(value, f"{name}.") if isinstance(value, dict) else (name,)


def test_the_table_covers_every_field_and_no_other():
    config = base_config().to_dict()
    assert set(leaves(config)) == set(FIELDS)
    for name, field in FIELDS.items():
        fit(value_of(config, name), field.kind, name, field.rule)
        assert field.meaning and "\n" not in field.meaning


NEVER = ("nan", "inf", "x", "(1,)", "{}", "1e400", "\x00")


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.kind in (int, float, bool, float | None)])
def test_no_number_takes_what_is_none(name):
    for text in NEVER:
        with pytest.raises(UserError, match=f"config.{name}="):
            recipe.load("tests/tiny.py", {name: text})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task.label_smoothing", "2"),
        ("task.label_smoothing", "-0.1"),
        ("task.mixup", "-1"),
        ("task.switch", "1.5"),
        ("eval.calibrate_batches", "-3"),
        ("eval.batch_size", "0"),
        ("eval.subnets", "some"),
        ("seed", "-1"),
        ("optim.clip_norm", "-1"),
        ("optim.lr", "-1e-3"),
        ("optim.final_lr", "-1"),
        ("optim.weight_decay", "-0.1"),
        ("optim.b1", "1.5"),
        ("optim.b2", "1"),
        ("optim.eps", "0"),
        ("optim.momentum", "1"),
        ("optim.order", "0.5"),
        ("optim.schedule", "cos"),
        ("optim.warmup", "-1"),
        ("optim.lr_rules", "3"),
        ("data.batch_size", "2.5"),
        ("data.validation_fraction", "1"),
        ("data.stall_s", "-1"),
        ("data.augment", "3"),
        ("nested.execution", "masked"),
        ("nested.tensor_shards", "0"),
        ("train.accumulate", "-2"),
        ("train.duration", "-5%"),
        ("train.duration", "10.5"),
        ("train.duration", "9" * 400),
        ("train.log_every", "ten"),
        ("train.profile", "5:0"),
        ("train.remat", "all"),
        ("train.norms", "maybe"),
        ("eval.every", "200%"),
        ("checkpoint.every", "-1"),
        ("checkpoint.keep_last", "0"),
        ("mesh.data", "-2"),
        ("mesh.across", "rows"),
        ("report.latency_batches", "(1,0)"),
        ("report.latency_batches", "(1,'a')"),
        ("nested.points.a/../b", "width=0.5"),
        ("expect.full", "high"),
        ("expect.full", "(1,2,3)"),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(UserError) as caught:
        recipe.load("tests/tiny.py", {field: value})
    assert field.split(".")[-1].split("/")[0] in str(caught.value) and str(caught.value).count("\n") == 0


def test_words_are_booleans():
    load = lambda word: recipe.load("tests/tiny.py", {"report.test": word})["report"]["test"]
    assert [load(word) for word in ("no", "off", "False", "yes", "on", "true")] == [False] * 3 + [True] * 3


def test_recipes_are_judged_like_command_lines():
    config = base_config()
    config.optim.b1 = 2.0
    with pytest.raises(UserError, match=r"config.optim.b1=2.0; valid: "):
        check(config)
    config = copy.deepcopy(base_config())
    config.eval = {"every": "0"}
    with pytest.raises(UserError, match=r"config.eval.batch_size is missing; change a group by config.eval.update"):
        check(config)
    config = base_config()
    with config.unlocked(), config.ignore_type():
        config.train = 3
    with pytest.raises(UserError, match=r"config.train=3; valid: a group of fields"):
        check(config)


def test_a_command_line_that_changes_the_optimizer_drops_what_only_the_recipe_s_had():
    optim = recipe.load("tests/tiny_lm.py:probe", {"optim.name": "adamw"})["optim"]
    assert optim["momentum"] is None and optim["lr"] == 2e-2 and (optim["b1"], optim["b2"]) == (0.9, 0.999)
    with pytest.raises(
        UserError, match=r"optim.momentum=0.95: adamw has no such constant, only lr, weight_decay, b1, b2, eps"
    ):
        recipe.load("tests/tiny_lm.py:probe", {"optim.name": "adamw", "optim.momentum": "0.95"})
    for field, value in (("optim.order", "3"), ("optim.final_lr", "1e-5")):
        with pytest.raises(UserError, match=f"config.{field}=.* is not read in this run"):
            recipe.load("tests/tiny_lm.py:probe", {"optim.schedule": "constant", field: value})
