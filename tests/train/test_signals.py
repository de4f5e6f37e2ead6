"""Signals: what tells a command to stop, wherever it is, and what it says meanwhile."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from research import stopping
from research.train import heartbeat, loop, processes
from research.train.rundir import RunDir
from research.train.update import Update
from tests.train.ends import status, tiny, train_alone, whole_steps
from tests.train.reporter import Lines


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return train_alone(tmp_path_factory.mktemp("reference"))


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


TELLS = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="the system does not tell which signals a process listens to"
)


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
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout.readline() == "sleeps\n"
    process.send_signal(getattr(signal, name))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75
    assert output.endswith(OUTSIDE.format(stopping.SIGNALS[name])) and "Traceback" not in output


OUTSIDE = "stopped by {} outside of training; nothing was to be saved, start the same command again\n"
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
    lines = ("import time", "print('imports', flush=True)", "end = time.monotonic() + 1.5")
    body = "\n".join((*lines, "while time.monotonic() < end: pass", "print('imported', flush=True)", ""))
    (tmp_path / "slow_module.py").write_text(body)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdout.readline() == "imports\n"
    process.send_signal(getattr(signal, name))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75
    assert output == "imported\n" + OUTSIDE.format(stopping.SIGNALS[name])


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


@pytest.mark.parametrize(
    "moment",
    ["supervised.make_setup", "supervised.costs.training_flops", "supervised.data.keep", "parts.machine.environment"],
)
def test_a_signal_before_a_run_begins_says_where_it_continues_and_leaves_nothing_open(moment, tmp_path, monkeypatch):
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
        patch.setattr(f"research.train.{moment}", told)
        with pytest.raises(
            loop.Preempted,
            match="stopped by SIGTERM at step 2; the state is saved, start the same command again to continue",
        ):
            loop.train(tiny(train__duration=2), str(workdir), Lines())
    assert status(workdir)["state"] == (
        "stopped" if moment == "supervised.data.keep" else "training"
    )  # before, the folder is not claimed
    assert not any(
        thread.name == "heartbeat" and not thread.join(5) and thread.is_alive() for thread in threading.enumerate()
    )
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


def test_a_second_ctrl_c_is_not_taken_for_what_the_process_sends_itself(monkeypatch):
    """It comes while the first one, put off for an import, is on its way again."""
    sent = []
    with stopping.listening() as stop:
        monkeypatch.setattr(stopping, "_importing", lambda frame: True)
        monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
        monkeypatch.setattr(os, "_exit", lambda code: sys.exit(code))
        stop.hear(signal.SIGINT)
        while not sent:
            time.sleep(0.01)
        stop._first_interrupt -= 2 * stopping.SAME_S
        with pytest.raises(SystemExit, match="130"):
            stop.hear(signal.SIGINT)
        assert sent[0] != signal.SIGINT


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
    compiler, program = run.learner.programs.compiler, Update()
    compiler._futures[program] = never = type("Never", (), {"done": lambda _: False})()
    run.stop.told = "SIGTERM"
    with pytest.raises(loop.Preempted):
        run.learner._get(program)
    assert run.learner.compiling() == "compiling the update program, 1 of 1" and not never.done()
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


# -- signs of life -----------------------------------------------------------------------------------------------------


def test_the_time_left_is_told_by_updates_beside_which_nothing_compiles(tmp_path, monkeypatch):
    run = loop.Run(tiny(train__duration=100), str(tmp_path / "run"), Lines())
    journal, compiling = run.journal, [True]
    monkeypatch.setattr(run.learner, "busy", lambda: compiling[0])
    journal._quiet = False
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
