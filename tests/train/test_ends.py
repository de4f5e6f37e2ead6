"""How runs end: what is saved and when, signals, splits that are missing, numbers that are none, reports that are whole."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from launch import config as recipe
from research import stopping
from research.data import pipeline
from research.errors import UserError
from research.report import plots
from research.search import promises
from research.train import foreseen, heartbeat, loop, processes, records
from research.train.evaluation import Evaluator
from research.train.manifests import MANIFEST
from research.train.programs import Programs
from research.train.rundir import RunDir
from research.train.setup import make_setup
from tests.models.twins import FAST
from tests.train.reporter import Lines


def tiny(**overrides):
    """One network of two blocks without statistics: three programs."""
    fields = {"train.duration": "6", "eval.every": "0", "checkpoint.every": "4"}
    config = recipe.load("tests/tiny.py:full", fields | {k.replace("__", "."): str(v) for k, v in overrides.items()})
    config["model"] = {"name": "vit_tiny_patch16_224", "patch_size": 4, "dim": 16, "depth": 1, "heads": 2}
    config["nested"]["points"] = {}
    return config


def lines_of(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def status(workdir):
    return json.loads((workdir / "status.json").read_text())


def whole_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if (p / MANIFEST).exists())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that nothing happens to: (workdir, report)."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Programs, "_effort", lambda self, kind: FAST)
        return workdir, loop.train(tiny(), str(workdir), Lines())


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
    run._recall()
    value = records.evaluations(reference[0], "accuracy")[6]
    assert run.metrics == {6: value[-1]} and len(value) == 1 and run.ended and not run.reached
    assert run.checkpoints.best_step() == 6
    run.heart.close()
    run.checkpoints.close()
    run.rundir.close()


def test_a_kill_between_save_and_evaluation_does_that_evaluation_once(tmp_path, monkeypatch):
    """The evaluation of step 2 fails after the save of step 2; then, in another run, it is done and the run is killed after it."""
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
HELD_UP = OSError(errno.ENOTEMPTY, "Directory not empty", "state.orbax-checkpoint-tmp")  # by what the save before still writes


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
    report = loop.train(tiny(data__validation_fraction=0.0, eval__every=2, train__duration=4), str(tmp_path / "run"), lines)
    assert report["metric"] == "test accuracy" and report["subnets"][0]["value"] > 0
    assert sum("no validation split" in line for line in lines.said) == 1
    assert not any(key.startswith("validation") for row in lines_of(tmp_path / "run") for key in row)


def test_without_any_split_the_report_has_costs(tmp_path):
    config = tiny(data__validation_fraction=0.0, report__test=False, train__duration=2)
    report = loop.train(config, str(tmp_path / "run"), Lines())
    stored = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["split"] is None and stored["subnets"][0]["value"] is None and stored["subnets"][0]["params"] > 0
    assert "FLOPs" in (tmp_path / "run" / "report.md").read_text()
    with pytest.raises(UserError, match="accuracy of full is no number or was not measured, so no promise can be judged"):
        promises.measures([report])


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"eval.stop_at": "0.5"}, "eval.stop_at=0.5 needs a validation split, which digits does not have"),
        (
            {"report.attacks": "('pgd2',)", "report.test": "False", "data.augment.mean": "0.0"},
            "report.attacks needs a test or validation split",
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
    with pytest.raises(UserError, match="report.sample='once' needs a language model over a text, which probe:mqar is not; remove it"):
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
    nan = lambda *args: {name: {**values, "accuracy": float("nan")} for name, values in evaluate(*args).items()}  # noqa: E731
    monkeypatch.setattr(Evaluator, "run", nan)
    with pytest.raises(loop.NotFinite, match="validation accuracy of the full network is nan at step 2; last good checkpoint: step 2"):
        loop.train(tiny(train__duration=2), str(tmp_path / "run"), Lines())
    assert status(tmp_path / "run")["state"] == "failed"


# -- finished is what has its report ------------------------------------------------------------------------------------


def test_a_report_that_cannot_be_written_is_made_again(reference, tmp_path, monkeypatch):
    workdir = tmp_path / "run"

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(plots, "pareto_plot", full)
        with pytest.raises(UserError, match="No space left"):
            loop.train(tiny(), str(workdir), Lines())
    assert status(workdir)["state"] == "failed" and not (workdir / "report.json").exists() and not (workdir / "report.md").exists()
    report = loop.train(tiny(), str(workdir), Lines())
    assert report["subnets"] == reference[1]["subnets"] and (workdir / "pareto.png").exists() and status(workdir)["state"] == "finished"


# -- signals --------------------------------------------------------------------------------------------------------------


class Interrupting(Lines):
    """Sends this process a signal at the second line of the log."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def progress(self, done, total, text):
        super().progress(done, total, text)
        if len(self.steps) == 2:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_every_signal_saves_and_stops(reference, name, tmp_path):
    before = signal.getsignal(getattr(signal, name))
    lines = Interrupting(getattr(signal, name))
    with pytest.raises(loop.Preempted, match=r"stopped by \S.* at step [23]; the state is saved") as stop:
        loop.train(tiny(), str(tmp_path / "run"), lines)
    assert whole_steps(tmp_path / "run") == [stop.value.step] and status(tmp_path / "run")["state"] == "stopped"
    assert signal.getsignal(getattr(signal, name)) is before
    loop.train(tiny(), str(tmp_path / "run"), Lines())
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (reference[0] / "metrics.jsonl").read_bytes()


def listens(pid, number):
    """Whether a process has a handler for a signal, as Linux tells it."""
    with open(f"/proc/{pid}/status") as file:
        mask = next(line.split()[1] for line in file if line.startswith("SigCgt"))
    return int(mask, 16) >> (number - 1) & 1


def wait_until_it_listens(process):
    until = time.monotonic() + 120
    while not listens(process.pid, signal.SIGTERM):
        assert process.poll() is None and time.monotonic() < until, "it does not listen"
        time.sleep(0.01)


TELLS = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not tell which signals a process listens to")


@TELLS
@pytest.mark.parametrize("name, seconds", [("SIGTERM", 0.0), ("SIGINT", 1.0)])
def test_a_signal_before_the_first_update_claims_no_save(name, seconds, tmp_path):
    command = [sys.executable, "-m", "launch.train", "--config=tests/tiny.py", f"--workdir={tmp_path / 'run'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until_it_listens(process)
    time.sleep(seconds)
    process.send_signal(getattr(signal, name))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and "nothing was to be saved, start the same command again" in output, output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "status.json").exists() or status(tmp_path / "run")["state"] == "stopped"


SLEEPS = """
import time
from launch import common

def main():
    print("sleeps", flush=True)
    time.sleep(100)

common.run(main, trains=True)
"""


@TELLS
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_a_command_that_trains_where_it_does_not(name):
    process = subprocess.Popen([sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout.readline() == "sleeps\n"
    began = time.monotonic()
    process.send_signal(getattr(signal, name))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and time.monotonic() - began < 30
    line = f"stopped by {stopping.SIGNALS[name]} outside of training; nothing was to be saved, start the same command again\n"
    assert output.endswith(line) and "Traceback" not in output


IMPORTS = """
from launch import common

def main():
    import slow_module
    slow_module.time.sleep(100)

common.run(main, trains=True)
"""


@TELLS
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_waits_for_the_end_of_an_import(name, tmp_path):
    """Compiled modules that are interrupted while they are set up have crashed."""
    body = "import time\nprint('imports', flush=True)\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass\nprint('imported', flush=True)\n"
    (tmp_path / "slow_module.py").write_text(body)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdout.readline() == "imports\n"
    process.send_signal(getattr(signal, name))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75
    assert (
        output
        == f"imported\nstopped by {stopping.SIGNALS[name]} outside of training; nothing was to be saved, start the same command again\n"
    )


def test_what_was_told_while_it_was_heeded_ends_what_does_not_heed_it():
    with stopping.listening() as stop:
        with stop.heeded():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.told == "SIGTERM"
        with pytest.raises(stopping.Told, match="stopped by SIGTERM outside of training"):
            stopping.heed()
        with pytest.raises(stopping.Told):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


@pytest.mark.parametrize("moment", ["make_setup", "costs.training_flops", "data.keep", "machine.environment"])
def test_a_signal_before_a_run_begins_says_where_it_goes_on_and_leaves_nothing_open(moment, tmp_path, monkeypatch):
    """Beside a save of step 2 in its folder; a second run in the same process shows that the lock is free."""
    workdir = tmp_path / "run"
    step = workdir / "checkpoints" / "2"

    def told_then(run, final):
        raise loop.Preempted(run.step)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_evaluate", told_then)
        with pytest.raises(loop.Preempted):
            loop.train(tiny(train__duration=2), str(workdir), Lines())
    assert step.is_dir()

    (workdir / "status.json").write_text('{"state": "training"}')

    def told(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    with monkeypatch.context() as patch:
        patch.setattr(f"research.train.loop.{moment}", told)
        with pytest.raises(loop.Preempted, match="stopped by SIGTERM at step 2; the state is saved, start the same command again to go on"):
            loop.train(tiny(train__duration=2), str(workdir), Lines())
    assert status(workdir)["state"] == ("stopped" if moment == "data.keep" else "training")  # before, the folder is not claimed
    assert not any(thread.name == "heartbeat" and not thread.join(5) and thread.is_alive() for thread in threading.enumerate())
    RunDir(workdir, tiny(train__duration=2), {}).close()


def test_a_stop_that_is_swallowed_comes_again(monkeypatch):
    monkeypatch.setattr(stopping, "AGAIN_S", 2 * stopping.SAME_S)
    with stopping.listening():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except BaseException:  # as some libraries have it
            pass
        with pytest.raises(stopping.Told):
            time.sleep(10)


def test_a_second_ctrl_c_ends_an_import_that_hangs(tmp_path):
    body = "import time\nprint('imports', flush=True)\nwhile True: pass\n"
    (tmp_path / "slow_module.py").write_text(body)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", IMPORTS], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "imports\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == stopping.AT_ONCE


def test_sigterm_that_a_library_took_over_is_taken_back():
    with stopping.listening() as stop:
        stop.heed()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop.take_back(signal.SIGTERM)
        with pytest.raises(stopping.Told):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


def test_several_processes_leave_sigterm_to_jax(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    before, sent = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    with processes.listening() as stop:
        assert signal.getsignal(signal.SIGTERM) is before
        stop.hear(signal.SIGHUP)
    assert sent == [signal.SIGTERM]


def test_a_stop_while_programs_compile_does_not_wait_for_them(tmp_path, monkeypatch):
    run = loop.Run(tiny(), str(tmp_path / "run"), Lines())
    monkeypatch.setattr(run.programs, "_key", lambda *_, **__: ("update", ""))
    run.programs._futures[("update", "")] = never = type("Never", (), {"done": lambda _: False})()
    run.stop.told = "SIGTERM"
    with pytest.raises(loop.Preempted):
        run._program("update", "")
    assert run.programs.compiling() == "compiling the update program, 1 of 1" and not never.done()
    run.heart.close()
    run.rundir.close()


def test_the_second_ctrl_c_ends_at_once(monkeypatch):
    codes, said = [], []
    monkeypatch.setattr(os, "_exit", codes.append)
    stop, now = stopping.Stop(), [100.0]
    stop.last = lambda: said.append("last")
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with stop.heeded():
        stop.hear(signal.SIGTERM)
        stop.hear(signal.SIGTERM)
        stop.hear(signal.SIGINT)
        now[0] += 0.1
        stop.hear(signal.SIGINT)  # the same one, passed on by a wrapper
    assert (stop.told, codes) == ("SIGTERM", [])
    now[0] += 1
    with stop.heeded():
        stop.hear(signal.SIGINT)
    assert (codes, said) == ([130], ["last"])


def test_signals_that_are_ignored_stay_so():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
            with stopping.listening() as inner:
                assert inner is stop
    finally:
        signal.signal(signal.SIGHUP, old)


# -- signs of life ----------------------------------------------------------------------------------------------------------


def test_the_time_left_is_told_by_updates_beside_which_nothing_compiles(tmp_path):
    run = loop.Run(tiny(train__duration=100), str(tmp_path / "run"), Lines())
    journal, compiling = run.journal, [True]
    journal._compiling, journal._quiet = lambda: compiling[0], False
    assert journal._time_left(10, 10, 300.0) == (2700, False)
    compiling[0] = False
    assert journal._time_left(20, 10, 200.0) == (1600, False), "the first part of these updates was beside a compiler"
    assert journal._time_left(30, 10, 20.0) == (140, True)
    assert journal._time_left(40, 10, 40.0) == (180, True)
    run.heart.close()
    run.rundir.close()


def test_silence_is_broken(monkeypatch):
    """By a clock that each wait moves on: a line after ten seconds of silence, of the innermost body."""
    now, said = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    heart = heartbeat.Heartbeat(said.append)

    def silent(seconds):
        for _ in range(seconds):
            now[0] += 1
            heart.beat()

    monkeypatch.setattr(heart, "_run", lambda: None)  # the thread ends at once
    with heart.at(lambda: "outer"):
        silent(5)
        with heart.at(lambda: "inner"):
            silent(25)
        silent(6)
    silent(15)
    assert said == ["inner (10 s)", "inner (20 s)", "outer (35 s)"]


def test_the_heart_beats_beside_the_main_thread():
    said = threading.Event()
    heart = heartbeat.Heartbeat(lambda _: said.set(), every=0.05)
    with heart.at(lambda: "at work"):
        assert said.wait(60)
    heart.close()
