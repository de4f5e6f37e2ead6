"""What a run tells of itself, and injected faults of data and of folders: one line each, nothing lost."""

import json
import threading
import time

import numpy as np
import pytest

from launch import config as recipe
from research.data import pipeline
from research.errors import UserError
from research.train import loop, watch
from research.train.config import base_config, differences, resolved, with_defaults
from research.train.rundir import RunDir
from research.train.update import Update
from tests.train.reporter import Lines


def tiny(**overrides):
    fields = {"train.duration": "6", "eval.every": "0", "checkpoint.every": "2"}
    return recipe.load("tests/tiny.py:full", fields | {k.replace("__", "."): str(v) for k, v in overrides.items()})


def faulty(monkeypatch, step, do):
    load = pipeline._load
    monkeypatch.setattr(pipeline, "_load", lambda *args: do() if int(args[-1]) == step else load(*args))


@pytest.mark.slow
def test_status_breakdown_and_norms_are_written(tmp_path):
    loop.train(tiny(train__norms=True), str(tmp_path / "run"), Lines())
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["total"], status["checkpoint"]) == ("finished", 6, 6, 6)
    timings = [json.loads(line) for line in (tmp_path / "run" / "timings.jsonl").read_text().splitlines()]
    assert all({"data_ms", "dispatch_ms", "wait_ms"} <= set(t) for t in timings) and any(
        t["dispatch_ms"] > 0 for t in timings
    )
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    parts = np.array([v for k, v in first.items() if k.startswith("norm/grad/")])
    assert "norm/param/embed*classes" in first and np.sqrt((parts**2).sum()) == pytest.approx(
        first["grad_norm"], rel=1e-5
    )


def test_a_source_that_raises_ends_the_run_in_one_line_and_it_continues(tmp_path, monkeypatch):
    def broken():
        raise OSError(5, "Input/output error", "shard-7")

    with monkeypatch.context() as patch:
        faulty(patch, 5, broken)
        with pytest.raises(
            UserError, match=r"data digits failed at step \d: OSError.*error.txt.*last good checkpoint: step 4"
        ) as caught:
            loop.train(tiny(), str(tmp_path / "run"), Lines())
    assert len(str(caught.value).splitlines()) == 1 and "shard-7" in (tmp_path / "run" / "error.txt").read_text()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    lines = Lines()
    loop.train(tiny(), str(tmp_path / "run"), lines)
    assert "resumed from step 4" in lines.said


def test_a_source_that_stalls_ends_the_run(tmp_path, monkeypatch):
    released = threading.Event()
    faulty(monkeypatch, 3, lambda: released.wait(600))
    with pytest.raises(
        UserError, match=r"gave no batch for step \d in 2 s \(data.stall_s\); last good checkpoint: step 2"
    ):
        loop.train(tiny(data__stall_s=2.0), str(tmp_path / "run"), Lines())
    released.set()


def test_a_folder_is_for_one_run_at_a_time(tmp_path):
    config = resolved(base_config())
    first = RunDir(tmp_path / "run", config, {})
    with pytest.raises(UserError, match=r"in use by process \d+, which trains there"):
        RunDir(tmp_path / "run", config, {})
    first.close()
    RunDir(tmp_path / "run", config, {}).close()


def test_an_address_is_no_folder():
    with pytest.raises(UserError, match="gs://bucket/run is an address, not a folder; mount"):
        RunDir("gs://bucket/run", tiny(), {})


def test_a_process_that_does_not_write_leaves_nothing(tmp_path):
    silent = RunDir(tmp_path / "run", {}, {}, writes=False)
    silent.metrics(1, {"loss": 1.0})
    silent.timings(1, {})
    silent.status({})
    silent.cut_back(0)
    silent.close()
    assert not (tmp_path / "run").exists()


def test_runs_of_older_versions_take_the_defaults_of_new_fields():
    now = resolved(base_config())
    old = json.loads(json.dumps(now))
    del old["data"]["stall_s"], old["nested"]["execution"]
    old["model"] = {"name": "vit"}
    assert differences(with_defaults(old), {**now, "model": {"name": "vit"}}) == []
    assert differences(old, now) != []
    old["optim"] |= {"momentum": 0.9, "nesterov": True}  # held by every run once; AdamW has neither
    del old["optim"]["b3"], old["optim"]["rho"]
    assert differences(with_defaults(old), {**now, "model": {"name": "vit"}}) == []
    old["task"]["mixup"] = 0.5
    assert differences(with_defaults(old), {**now, "model": {"name": "vit"}}) == ["task.mixup: 0.5 -> 0.0"]


def test_a_profile_is_of_one_update_where_no_count_is_given(tmp_path):
    assert watch.Profile("3:", tmp_path).last == 4


@pytest.mark.parametrize("text", ["x", "3:0", "-1:2", "3:x", "1:2:3"])
def test_profile_that_cannot_be_read(text, tmp_path):
    with pytest.raises(UserError, match="START:COUNT"):
        watch.Profile(text, tmp_path)


def test_profile_traces_its_updates(tmp_path):
    loop.train(tiny(train__profile="2:2"), str(tmp_path / "run"), Lines())
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_deadline():
    with pytest.raises(watch.Late), watch.deadline(0.05):
        time.sleep(2)
    with watch.deadline(5.0):
        pass
    with watch.deadline(0):
        pass
    time.sleep(0.1)  # no alarm is left behind


def test_stragglers_of_one_process_are_none():
    assert watch.stragglers(100.0) == []


def test_stragglers_are_far_above_the_median():
    assert watch.slow_ones(np.array([10.0, 11, 12, 40])) == [
        "process 3 is slow: 40 ms a step for data and host work, the median 12 ms"
    ]
    assert watch.slow_ones(np.array([10.0, 100])) != []
    assert watch.slow_ones(np.array([1.0, 1, 5])) == [], "a few ms are noise"


def test_waiting_for_a_program_in_the_middle_of_a_run_is_told(tmp_path, monkeypatch):
    lines = Lines()
    run = loop.Run(tiny(), str(tmp_path / "run"), lines)
    monkeypatch.setattr(type(run.learner.programs), "get", lambda *_: time.sleep(1.1))
    run.first, run.step = 0, 1
    run.learner._get(Update())
    assert not lines.said, "the first programs are waited for by all"
    run.step = 5
    run.learner._get(Update())
    run.rundir.close()
    assert len(lines.said) == 1 and lines.said[0].endswith("while the update program was compiled")
