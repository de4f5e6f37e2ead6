"""How runs end: what is saved and when, splits that are missing, numbers that are none, reports that are whole."""

import errno
import json

import numpy as np
import orbax.checkpoint as ocp
import pytest

from launch import config as recipe
from research.data import pipeline
from research.errors import UserError
from research.report import plots
from research.search import criteria
from research.train import foreseen, loop, records
from research.train.evaluation import Evaluator
from research.train.setup import make_setup
from tests.train.ends import lines_of, status, tiny, train_alone, whole_steps
from tests.train.reporter import Lines


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return train_alone(tmp_path_factory.mktemp("reference"))


# -- saved before it is evaluated ------------------------------------------------------------------------------------


def test_what_fails_in_the_last_evaluation_loses_nothing(reference, tmp_path, monkeypatch):
    workdir = tmp_path / "run"

    def fails(*_):
        raise UserError("it cannot be evaluated")

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "run", fails)
        with pytest.raises(UserError, match="cannot be evaluated"):
            loop.train(tiny(), str(workdir), Lines())
    assert whole_steps(workdir)[-1] == 6 and status(workdir)["state"] == "failed"
    lines = Lines()
    report = loop.train(tiny(), str(workdir), lines)
    assert "resumed from step 6" in lines.said and status(workdir)["state"] == "finished"
    assert report["subnets"] == reference[1]["subnets"]
    assert (workdir / "metrics.jsonl").read_bytes() == (reference[0] / "metrics.jsonl").read_bytes()


def test_the_last_step_can_be_the_best_one_though_it_was_saved_before(reference):
    run = loop.Run(tiny(), str(reference[0]), Lines())
    run.step, *_ = run._start()
    run.evaluations.recall(run.rundir.path, run.step, run.total, reads=True)
    value = records.evaluations(reference[0], "accuracy")[6]
    assert run.evaluations.values == {6: value[-1]} and run.evaluations.ended and not run.evaluations.reached
    assert run.checkpoints.best_step() == 6
    run.heart.close()
    run.checkpoints.close()
    run.rundir.close()


def test_a_kill_between_save_and_evaluation_does_that_evaluation_once(tmp_path, monkeypatch):
    """The evaluation of step 2 fails after the save of step 2; then, in another run, it is done and the run is killed
    after it."""
    config = tiny(train__duration=4, eval__every=2, checkpoint__every=2)
    done = {}
    for moment in ("before", "after"):
        workdir, evaluate = tmp_path / moment, loop.Run._evaluate

        def killed(run, final=False, evaluate=evaluate, moment=moment):
            if moment == "after":
                evaluate(run, final)
            raise loop.Preempted(run.step)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Run, "_evaluate", killed)
            with pytest.raises(loop.Preempted):
                loop.train(config, str(workdir), Lines())
        assert whole_steps(workdir) == [2]
        loop.train(config, str(workdir), Lines())
        done[moment] = (workdir / "metrics.jsonl").read_bytes()
    assert done["before"] == done["after"]
    assert {s: len(v) for s, v in records.evaluations(tmp_path / "after", "accuracy").items()} == {2: 1, 4: 1}


# -- saves that are given up -------------------------------------------------------------------------------------------


LATE = TimeoutError("the clock jumped")
HELD_UP = OSError(
    errno.ENOTEMPTY, "Directory not empty", "state.orbax-checkpoint-tmp"
)  # by what the save before still writes


@pytest.mark.parametrize(("end", "error"), [("goal", LATE), ("signal", LATE), ("signal", HELD_UP)])
def test_a_save_that_the_clock_ended_is_not_taken_for_done(end, error, tmp_path, monkeypatch):
    """The due save of step 4 is given up, then the run ends at step 4: by its goal, or told to stop."""
    given_up, finalize = [], ocp.CheckpointManager._finalize_checkpoint

    def jumps(self, step):
        if not given_up:
            given_up.append(step)
            raise LATE
        if error is HELD_UP and len(given_up) == 1:
            given_up.append(step)
            raise error
        finalize(self, step)

    monkeypatch.setattr(ocp.CheckpointManager, "_finalize_checkpoint", jumps)
    workdir, lines = tmp_path / "run", Lines()
    if end == "goal":
        loop.train(tiny(eval__every=4, eval__stop_at=0.0), str(workdir), lines)
        assert status(workdir)["state"] == "finished"
    else:
        tick = loop.Run._tick_step

        def told(run):
            if run.step == 4:
                run.stop.told = "SIGTERM"
            tick(run)

        monkeypatch.setattr(loop.Run, "_tick_step", told)
        with pytest.raises(loop.Preempted, match="stopped by SIGTERM at step 4; the state is saved"):
            loop.train(tiny(), str(workdir), lines)
    assert given_up == [4] * (2 if error is HELD_UP else 1) and whole_steps(workdir) == [4]
    assert any("was given up, because the clock jumped" in line for line in lines.said)


# -- splits that are missing ------------------------------------------------------------------------------------------


def test_without_validation_nothing_is_evaluated_on_the_way_and_the_report_is_of_the_test_split(tmp_path):
    lines = Lines()
    report = loop.train(
        tiny(data__validation_fraction=0.0, eval__every=2, train__duration=4), str(tmp_path / "run"), lines
    )
    assert report["metric"] == "test accuracy" and report["subnets"][0]["value"] > 0
    assert sum("no validation split" in line for line in lines.said) == 1
    assert not any(key.startswith("validation") for row in lines_of(tmp_path / "run") for key in row)


def test_without_any_split_the_report_has_costs(tmp_path):
    config = tiny(data__validation_fraction=0.0, report__test=False, train__duration=2)
    report = loop.train(config, str(tmp_path / "run"), Lines())
    stored = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["split"] is None and stored["subnets"][0]["value"] is None and stored["subnets"][0]["params"] > 0
    assert "FLOPs" in (tmp_path / "run" / "report.md").read_text()
    with pytest.raises(
        UserError, match="accuracy of full is no number or was not measured, so no criterion can be judged"
    ):
        criteria.measures([report])


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"eval.stop_at": "0.5"}, "eval.stop_at=0.5 needs a validation split, which digits does not have"),
        (
            {"methods": "attacks", "report.test": "False", "data.augment.mean": "0.0"},
            "method attacks needs a test or validation split",
        ),
    ],
)
def test_what_the_end_would_fail_at_is_refused_at_the_start(fields, said, tmp_path):
    config = recipe.load("tests/tiny.py:full", {"data.validation_fraction": "0.0", **fields})
    with pytest.raises(UserError, match=said):
        loop.train(config, str(tmp_path / "run"), Lines())
    assert not (tmp_path / "run").exists()


def test_a_text_that_could_not_be_continued_is_refused_at_the_start():
    """The recipe is of a language model, but its tokens are no text."""
    config = recipe.load("tests/tiny_lm.py:probe", {"report.sample": "once"})
    with pytest.raises(
        UserError, match="report.sample='once' needs a language model over a text, which probe:mqar is not; remove it"
    ):
        foreseen.check(make_setup(config))


# -- numbers that are none --------------------------------------------------------------------------------------------


def test_an_update_that_is_no_number_can_be_skipped(tmp_path, monkeypatch):
    load = pipeline._load

    def once(*args):
        batch = load(*args)
        return {**batch, "image": np.full_like(batch["image"], np.nan)} if int(args[-1]) == 2 else batch

    monkeypatch.setattr(pipeline, "_load", once)
    config = tiny(train__nan="skip")
    report = loop.train(config, str(tmp_path / "run"), Lines())
    rows = lines_of(tmp_path / "run")
    assert [row["step"] for row in rows if row.get("skipped")] == [3] and rows[2]["loss"] is None
    assert report["skipped_updates"] == 1 and status(tmp_path / "run")["state"] == "finished"


def test_a_run_that_skips_most_updates_has_failed(tmp_path):
    config = tiny(optim__lr=1e30, optim__warmup=0, train__nan="skip")
    for _ in range(2):  # also when it is started again
        with pytest.raises(loop.NotFinite, match=r"[45] of 6 updates were skipped.*last good checkpoint: step 6"):
            loop.train(config, str(tmp_path / "run"), Lines())
        assert status(tmp_path / "run")["state"] == "failed" and not (tmp_path / "run" / "report.json").exists()
    assert any(row["loss"] is None for row in lines_of(tmp_path / "run") if "loss" in row)


def test_a_validation_that_is_no_number_is_a_failure(tmp_path, monkeypatch):
    evaluate = Evaluator.run
    nan = lambda *args: {name: {**values, "accuracy": float("nan")} for name, values in evaluate(*args).items()}
    monkeypatch.setattr(Evaluator, "run", nan)
    with pytest.raises(
        loop.NotFinite, match="validation accuracy of the full network is nan at step 2; last good checkpoint: step 2"
    ):
        loop.train(tiny(train__duration=2), str(tmp_path / "run"), Lines())
    assert status(tmp_path / "run")["state"] == "failed"


# -- finished is what has its report -----------------------------------------------------------------------------------


def test_a_report_that_cannot_be_written_is_made_again(reference, tmp_path, monkeypatch):
    workdir = tmp_path / "run"

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(plots, "pareto_plot", full)
        with pytest.raises(UserError, match="No space left"):
            loop.train(tiny(), str(workdir), Lines())
    assert (
        status(workdir)["state"] == "failed"
        and not (workdir / "report.json").exists()
        and not (workdir / "report.md").exists()
    )
    report = loop.train(tiny(), str(workdir), Lines())
    assert (
        report["subnets"] == reference[1]["subnets"]
        and (workdir / "pareto.png").exists()
        and status(workdir)["state"] == "finished"
    )
