"""A result counts only where it belongs to the config that is asked for, and is whole."""

import json
import subprocess
import sys

import pytest

from launch import config as recipe
from research.errors import UserError
from research.files import write_json
from research.report.run_card import write_report
from research.train.results import finished

REPORT = {
    "metric": "test accuracy",
    "subnets": [{"name": "full", "value": 0.123, "params": 7, "flops": 3}],
    "updates": 24,
    "wall_s": 1.0,
    "train_flops": 1e9,
}


def made(folder, config, state="finished", **report):
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    write_json(folder / "status.json", {"state": state})
    write_report(folder, {**REPORT, **report})
    return folder


@pytest.fixture
def config():
    return recipe.load("tests/tiny.py", {})


def test_a_whole_result_of_the_same_config_counts(config, tmp_path):
    assert finished(tmp_path / "none", config) is None
    folder = made(tmp_path / "run", config)
    assert finished(folder, config)["subnets"][0]["value"] == 0.123
    (folder / "status.json").unlink()  # runs of older versions have none
    assert finished(folder, config)["updates"] == 24
    assert finished(folder, recipe.load("tests/tiny.py", {"train.log_every": "5"})) is not None


def test_another_config_is_refused(config, tmp_path):
    folder = made(tmp_path / "run", config)
    with pytest.raises(
        UserError, match=r"holds a run of another config \(optim.lr: 0.02 -> 0.5 and 1 more\); give another --workdir"
    ):
        finished(folder, recipe.load("tests/tiny.py", {"optim.lr": "0.5", "seed": "3"}))


def test_what_is_not_whole_or_asks_for_other_measurements_does_not_count(config, tmp_path):
    assert finished(made(tmp_path / "training", config, state="training"), config) is None
    folder = made(tmp_path / "run", config)
    assert finished(folder, recipe.load("tests/tiny.py", {"report.test": "False"})) is None
    attacked = made(tmp_path / "attacked", recipe.load("tests/tiny.py:full", {"methods": "attacks"}))
    for fields, counts in (({}, True), ({"method.attacks.names": "('pgd2',)"}, False), ({"methods": ""}, False)):
        asked = recipe.load("tests/tiny.py:full", {"methods": "attacks"} | fields)
        assert (finished(attacked, asked) is not None) == counts, fields
    text = (folder / "report.json").read_text()
    for damaged in (
        text[: len(text) // 2],
        "[]",
        json.dumps({**json.loads(text), "subnets": []}),
        json.dumps({"metric": "x"}),
    ):
        (folder / "report.json").write_text(damaged)
        assert finished(folder, config) is None


def test_commands_do_not_print_numbers_of_another_config(config, tmp_path):
    made(tmp_path / "seed0", config)
    command = [
        sys.executable,
        "-m",
        "launch.reproduce",
        "--config=tests/tiny.py",
        f"--workdir={tmp_path}",
        "--config.optim.lr=0.5",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (
        done.returncode == 2 and "holds a run of another config (optim.lr" in done.stderr and "0.123" not in done.stdout
    )
