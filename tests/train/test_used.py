"""A setting that nothing in a run goes by is refused, and says what would; older runs that hold one still open and go
on."""

import json

import pytest

from launch import config as recipe
from research.errors import UserError
from research.train.config import base_config, differences, resolved, value_of
from research.train.rundir import read_config
from research.train.sections import FIELDS
from research.train.used import check_used, ignored, readers

TEXT, IMAGES, PROBE = "tests/tiny_lm.py:full", "tests/tiny.py:full", "tests/tiny_lm.py:probe"


@pytest.mark.parametrize(
    ("text", "field", "value", "reader"),
    [
        (TEXT, "task.label_smoothing", "0.1", "classification"),
        (TEXT, "task.mixup", "0.2", "classification"),
        (TEXT, "task.contrastive.temperature", "0.5", "contrastive learning"),
        (TEXT, "data.augment.flip", "True", "data sets of labelled images"),
        (TEXT, "data.validation_fraction", "0.2", "data sets without a validation split"),
        (PROBE, "data.dir", "/tmp", "data sets that are read from files"),
        (IMAGES, "data.dir", "/tmp", "data sets that are read from files"),
        (IMAGES, "task.metric", "accuracy", "language modelling"),
        (IMAGES, "task.local_counting", "0.1", "counting by density maps"),
        (IMAGES, "task.switch", "0.3", "task.mixup together with task.cutmix"),
        (IMAGES, "nested.reduce", "sum", "methods that choose sub-networks"),
        (IMAGES, "nested.execution", "parallel", "methods that choose sub-networks"),
        (IMAGES, "nested.sort_importance", "True", "train.init_from"),
        (IMAGES, "report.latency_batches", "(1,)", "report.latency"),
        (IMAGES, "report.sample", "a", "language modelling"),
        (IMAGES, "data.augment.crop_padding", "0", "data.augment.crop_padding"),
    ],
)
def test_what_nothing_goes_by_is_refused(text, field, value, reader):
    more = {"data.augment.crop_mode": "reflect"} if field == "data.augment.crop_padding" else {}
    with pytest.raises(UserError) as caught:
        recipe.load(text, {field: value, **more})
    assert (
        "is not read in this run, only by" in str(caught.value)
        and reader in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_a_goal_needs_evaluations():
    with pytest.raises(
        UserError, match=r"config.eval.stop_at=0.9 is not read in this run, only by runs with eval.every"
    ):
        recipe.load(IMAGES, {"eval.every": "0ep", "eval.stop_at": "0.9"})
    assert recipe.load(IMAGES, {"eval.stop_at": "0.9"})["eval"]["stop_at"] == 0.9


def test_what_is_read_may_be_set():
    fields = {"task.mixup": "0.2", "task.cutmix": "1", "task.switch": "0.3", "data.augment.crop_mode": "reflect"}
    assert recipe.load(IMAGES, fields)["task"]["switch"] == 0.3
    fields = {"method.sandwich.count": "3", "method.sandwich.distill": "0.5"}
    assert recipe.load("tests/tiny.py:sandwich", fields)["method"]["sandwich"] == {"count": 3, "distill": 0.5}
    assert (
        recipe.load(TEXT, {"data.dir": "/tmp", "task.metric": "accuracy", "report.sample": "a"})["data"]["dir"]
        == "/tmp"
    )


def test_what_belongs_to_another_choice_may_stay_in_a_recipe():
    config = recipe.load("configs/quickstart.py", {"methods": "", "report.latency": "False"})
    assert config["method"] == {} and config["report"]["latency_batches"] == [1]
    with pytest.raises(UserError, match=r"config.method.sandwich.count is not read in this run; name 'sandwich' in"):
        recipe.load("configs/quickstart.py", {"methods": "", "method.sandwich.count": "2"})
    with pytest.raises(UserError, match=r"config.data.augment={.* is not read"):
        recipe.load("configs/quickstart.py", {"data.name": "stdlib_text"})


def test_readers_name_fields_that_there_are():
    for reader in readers():
        assert reader.field in FIELDS or reader.field.startswith("data.augment"), reader
    check_used(resolved(base_config()))


def test_an_older_run_with_such_a_setting_continues_without_it():
    new = recipe.load(TEXT, {"data.dir": "/tmp"})
    old = recipe.load(TEXT, {"data.dir": "/tmp"})
    value_of(old, "task")["label_smoothing"] = 0.1
    assert differences(old, new) == ["task.label_smoothing: 0.1 -> 0.0"]
    assert differences(old, new, ignored=ignored(old, new)) == []
    value_of(old, "train")["nan"] = "skip"
    assert differences(old, new, ignored=ignored(old, new)) == ["train.nan: 'skip' -> 'stop'"]


PAIRS = "configs/domain_encoder.py"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (PAIRS, {"task.contrastive.loss": "mnr_plus"}, "mnr_plus' takes its targets from the lengths"),
        (
            IMAGES,
            {"nested.points.half,width": "width=0.5"},
            "a name in config.nested.points='half,width'.*letters, digits and _",
        ),
    ],
)
def test_what_a_new_run_is_refused_an_older_one_continues_with(text, overrides, message, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=message):
        recipe.load(text, overrides, str(tmp_path))
    with monkeypatch.context() as before:
        before.setattr("research.train.used.check_new", lambda config: None)
        config = recipe.load(text, overrides)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert recipe.load(text, overrides, str(tmp_path)) == config == read_config(tmp_path)
    with pytest.raises(UserError, match=message):
        recipe.load(text, {**overrides, "seed": "7"}, str(tmp_path))


def test_a_run_whose_optimizer_is_no_longer_there_is_read_and_not_resumed(tmp_path):
    config = recipe.load(IMAGES, {})
    config["optim"]["name"] = "sm3"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path)["optim"]["name"] == "sm3"
    with pytest.raises(
        UserError, match="was trained by optim.name='sm3', which is no longer there: .* not resumed; start anew"
    ) as error:
        recipe.load(IMAGES, {"optim.name": "sm3"}, str(tmp_path))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="unknown optim.name 'sm3'"):
        recipe.load(IMAGES, {"optim.name": "sm3"}, str(tmp_path / "new"))
