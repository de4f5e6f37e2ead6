"""Recipes by the commands that their docstrings name: ImageNet's two shrunken updates, SIGTERM on the quickstart;
and a disk that really is full."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from research.report.tables import read_csv
from research.train.manifests import MANIFEST, fault


@pytest.mark.slow
def test_imagenet_recipe_runs_two_shrunken_updates(tmp_path):
    command = [
        sys.executable,
        "-m",
        "launch.train",
        "--config=configs/imagenet_unireplknet_t.py:shrunken",
        f"--workdir={tmp_path / 'run'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2]
    assert all(np.isfinite(m["loss"]) for m in metrics if "loss" in m)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_bench_prints_the_bare_step_beside_the_loop(accumulate, tmp_path):
    command = [
        sys.executable,
        "-m",
        "launch.bench",
        "--config=tests/tiny.py",
        "--steps=5",
        f"--csv={tmp_path / 'overhead.csv'}",
    ]
    command.append(f"--config.train.accumulate={accumulate}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    bare, loop, save = read_csv(tmp_path / "overhead.csv")
    assert [row["what"] for row in (bare, loop, save)] == [
        "bare jitted step",
        "update of the loop",
        "blocked by a save",
    ]
    assert bare["median_ms"] > 0 and 0 < loop["median_ms"] < 10 * bare["median_ms"]
    assert save["median_ms"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 20])
def test_quickstart_stops_at_the_next_update_after_sigterm(lines, tmp_path):
    """Early, while programs are still being compiled, and in the middle."""
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "launch.train", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count('"loss"') >= lines):
        time.sleep(0.05)
    read = json.loads(metrics.read_text().splitlines()[0])["step"]
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    stopped = int(out.split("stopped by SIGTERM at step ")[1].split(";")[0])
    assert (workdir / "checkpoints" / str(stopped) / MANIFEST).exists()
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] <= stopped
    total = json.loads((workdir / "status.json").read_text())["total"]
    assert read <= stopped < total / 2


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_full_is_told_and_the_checkpoints_stay(tmp_path):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        workdir = tmp_path / "run"
        command = [sys.executable, "-m", "launch.train", "--config=tests/tiny.py", f"--workdir={workdir}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2, done.stderr[-3000:]
        # Threads of the libraries that write may add lines of their own about their share of the injected fault.
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, done.stderr[-3000:]
        assert "no space left on" in errors[0].lower()  # met by a checkpoint or by the metrics, whichever comes first
        assert any(
            fault(path, int(path.name)) is None for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
        )
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
