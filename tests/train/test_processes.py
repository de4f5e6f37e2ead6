"""Several processes as one run: the numbers of one process, checkpoints that go from one number of processes to
another, lost peers."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from research.data.pipeline import batch_indices
from tests.train.test_sharding import FAST

FLAGS = [
    "--config=tests/tiny.py:sorted",
    "--config.method.sorted.count=2",
    "--config.train.duration=6",
    "--config.eval.every=0",
]
FLAGS += ["--config.checkpoint.every=3"]


@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_of_a_microbatch_make_it_up(microbatches, count):
    whole, epochs = batch_indices(50, 3, batch_size=48, seed=1)
    shares = [
        batch_indices(50, 3, batch_size=48, seed=1, shard_index=i, shard_count=count, microbatches=microbatches)
        for i in range(count)
    ]
    size = 48 // microbatches
    for micro in range(microbatches):
        cut = slice(micro * size // count, (micro + 1) * size // count)
        np.testing.assert_array_equal(
            np.concatenate([share[0][cut] for share in shares]), whole[micro * size : (micro + 1) * size]
        )
        np.testing.assert_array_equal(
            np.concatenate([share[1][cut] for share in shares]), epochs[micro * size : (micro + 1) * size]
        )


def run(workdir, *more, module="launch.train"):
    flags = [] if any(word.startswith("--config=") for word in more) else FLAGS
    done = subprocess.run(
        [sys.executable, "-m", module, *flags, f"--workdir={workdir}", *more],
        capture_output=True,
        text=True,
        timeout=600,
        env=FAST,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-1500:]
    return done.stdout


def processes_with(word):
    """Returns (pid, words) of every process of this machine whose command line has a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_text().split("\0")
            if word in words:
                found.append((int(path.parent.name), words))
    return found


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array(
        [v for line in lines for k, v in sorted(line.items()) if k.startswith(("loss/", "validation/loss"))]
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    run(workdir)
    return workdir


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one_which_continues_from_their_checkpoint(one, tmp_path):
    """The first half by two processes, the second by one: the sorted scheme gives each network a part of every batch of
    its own."""
    workdir = tmp_path / "two"
    parent = subprocess.Popen(
        [sys.executable, "-m", "launch.local", "--processes=2", *FLAGS, f"--workdir={workdir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=FAST,
    )
    until = time.time() + 500
    while not (workdir / "checkpoints" / "3" / "nestax_manifest.json").exists():
        assert parent.poll() is None and time.time() < until, parent.communicate()[0][-2000:]
        time.sleep(0.05)
    (victim,) = [p for p in processes_with(f"--workdir={workdir}") if "--process=1" in p[1]]
    os.kill(victim[0], signal.SIGKILL)
    output = parent.communicate(timeout=120)[0]
    if parent.returncode == 0:
        pytest.skip("the run ended before its process was killed")
    assert parent.returncode == 1 and "Traceback" not in output
    assert "error: process 1 of 2 was killed by SIGKILL" in output.strip().splitlines()[-1]
    output = run(workdir)
    assert "resumed from step" in output
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, devices, sizes", [(4, 1, "data=4"), (2, 2, "fsdp=4"), (4, 2, "data=2,fsdp=2,tensor=2")]
)
def test_processes_with_meshes_across_them_give_the_numbers_of_one(count, devices, sizes, one, tmp_path):
    """Weights cut over devices of several processes; then the same run's last checkpoint is read by one process."""
    workdir = tmp_path / "run"
    mesh = [f"--config.mesh.{size}" for size in ("data=1," + sizes if "data" not in sizes else sizes).split(",")] + [
        "--config.mesh.min_size=1"
    ]
    output = run(workdir, f"--processes={count}", f"--devices={devices}", *mesh, module="launch.local")
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=2e-5)
    assert "of the 2 networks" in output


@pytest.mark.slow
def test_experts_over_two_processes(tmp_path):
    flags = [
        "--config=tests/tiny_lm.py:moe",
        "--config.train.duration=3",
        "--config.eval.every=0",
        "--config.mesh.min_size=1",
    ]
    flags += ["--config.data.batch_size=16"]
    run(tmp_path / "one", *flags)
    run(
        tmp_path / "two",
        "--processes=2",
        "--devices=2",
        *flags,
        "--config.mesh.data=1",
        "--config.mesh.expert=4",
        module="launch.local",
    )
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-5)


@pytest.mark.slow
def test_processes_agree_on_the_step_at_which_sigterm_stops_them(one, tmp_path):
    workdir = tmp_path / "two"
    command = [sys.executable, "-m", "launch.local", "--processes=2", *FLAGS, f"--workdir={workdir}"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=FAST)
    metrics = workdir / "metrics.jsonl"
    while parent.poll() is None and not (metrics.exists() and '"loss"' in metrics.read_text()):
        time.sleep(0.02)
    parent.send_signal(signal.SIGTERM)
    output = parent.communicate(timeout=120)[0]
    assert parent.returncode == 75 and "Traceback" not in output, output[-1000:]
    stopped = int(output.split("stopped by SIGTERM at step ")[1].split(";")[0])
    assert (workdir / "checkpoints" / str(stopped) / "nestax_manifest.json").exists()
    run(workdir, "--processes=2", module="launch.local")
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=2e-5)
