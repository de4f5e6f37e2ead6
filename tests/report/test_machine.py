"""Rates are consistent with a clock of our own; the environment says what git says."""

import json
import subprocess
import time

import jax
import jax.numpy as jnp
import pytest

from research.report import machine


def test_gemm_rate_counts_two_flops_a_product_and_is_measured_once(monkeypatch):
    machine._gemm_rate.cache_clear()
    monkeypatch.setattr(machine, "_median_seconds", lambda run: (run(), 0.5)[1])
    assert machine.gemm_rate(64) == 2 * 64**3 / 0.5
    monkeypatch.setattr(machine, "_median_seconds", lambda run: 0.25)
    assert machine.gemm_rate(64, jnp.float32) == 2 * 64**3 / 0.5
    machine._gemm_rate.cache_clear()


def test_bandwidth_counts_reads_and_writes(monkeypatch):
    machine._bandwidth.cache_clear()
    monkeypatch.setattr(machine, "_median_seconds", lambda run: run() or 0.5)
    assert machine.bandwidth(2**20) == 2 * 2**20 / 0.5
    machine._bandwidth.cache_clear()


def test_median_seconds_stops_at_its_budget(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    calls = []

    def run():
        calls.append(None)
        now[0] += 0.02

    assert machine._median_seconds(run, budget_s=0.03) == pytest.approx(0.02)
    assert len(calls) == 3  # one to warm up, then two are beyond 0.03 s


def git(folder, *args):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *identity, "-C", folder, *args], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_git_state(tmp_path, monkeypatch):
    assert machine.git_state(tmp_path) is None
    git(tmp_path, "init", "-q")
    (tmp_path / "a.txt").write_text("one\n")
    assert machine.git_state(tmp_path) == {"commit": None, "dirty": True, "diff": None, "untracked": ["a.txt"]}
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert machine.git_state(tmp_path) == {"commit": commit, "dirty": False, "diff": "", "untracked": []}
    (tmp_path / "a.txt").write_text("two\n")
    state = machine.git_state(tmp_path)
    assert state["dirty"] and "-one\n+two\n" in state["diff"]
    monkeypatch.setattr(machine, "MAX_DIFF_CHARS", 10)
    assert machine.git_state(tmp_path)["diff"] == f"diff --git\n[cut: {len(state['diff'])} characters in all]\n"
    (tmp_path / "inner").mkdir()
    assert machine.git_state(tmp_path / "inner") is None  # an installed copy inside somebody else's checkout


def test_environment_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_foo")
    monkeypatch.setenv("MY_SECRET", "hunter2")
    env = machine.environment()
    text = json.dumps(env)
    assert env["git"] is None
    assert env["packages"]["jax"] == jax.__version__
    assert env["devices"]["platform"] == jax.local_devices()[0].platform
    assert env["devices"]["count"] == jax.device_count()
    assert env["variables"]["XLA_FLAGS"] == "--xla_foo"
    assert "hunter2" not in text
    assert env["command"].startswith("python ")


def test_command_line_can_be_pasted(monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["/x/bin/python3", "-m", "launch.train", "--config=a b.py"])
    assert machine.command_line() == "python -m launch.train '--config=a b.py'"


@pytest.mark.parametrize("package, version", [("no-such-package", None), ("jax", jax.__version__)])
def test_versions(package, version):
    assert machine._version(package) == version
