"""Several processes as one run: the numbers of one process, checkpoints that go from one number of processes to another, lost peers."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from research.data.pipeline import batch_indices
from tests.train.test_sharding import FAST

FLAGS = ["--config=tests/tiny.py:sorted", "--config.nested.count=2", "--config.train.duration=6", "--config.eval.every=0"]
FLAGS += ["--config.checkpoint.every=3"]


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_of_a_part_make_it_up(parts, count):
    whole, epochs = batch_indices(50, 3, batch_size=48, seed=1)
    shares = [batch_indices(50, 3, batch_size=48, seed=1, shard_index=i, shard_count=count, parts=parts) for i in range(count)]
    size = 48 // parts
    for part in range(parts):
        cut = slice(part * size // count, (part + 1) * size // count)
        np.testing.assert_array_equal(np.concatenate([share[0][cut] for share in shares]), whole[part * size : (part + 1) * size])
        np.testing.assert_array_equal(np.concatenate([share[1][cut] for share in shares]), epochs[part * size : (part + 1) * size])


def run(workdir, *more, module="launch.train"):
    done = subprocess.run(
        [sys.executable, "-m", module, *FLAGS, f"--workdir={workdir}", *more], capture_output=True, text=True, timeout=600, env=FAST
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-1500:]
    return done.stdout


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([v for line in lines for k, v in sorted(line.items()) if k.startswith(("loss/", "validation/loss"))])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    run(workdir)
    return workdir


def test_two_processes_give_the_numbers_of_one_which_goes_on_from_their_checkpoint(one, tmp_path):
    """The first half by two processes, the second by one: the sorted scheme gives each network a part of every batch of its own."""
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
    (victim,) = subprocess.run(["pgrep", "-f", f"{workdir} .*--process=1"], capture_output=True, text=True).stdout.split()
    os.kill(int(victim), signal.SIGKILL)
    began = time.time()
    output = parent.communicate(timeout=120)[0]
    if parent.returncode == 0:
        pytest.skip("the run ended before its process was killed")
    assert parent.returncode == 1 and time.time() - began < 30 and "Traceback" not in output
    assert "error: process 1 of 2 was killed by SIGKILL" in output.strip().splitlines()[-1]
    output = run(workdir)
    assert "resumed from step" in output
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, devices, mesh", [(2, 1, ""), (4, 1, ""), (2, 4, "fsdp=4"), (2, 2, "tensor=4"), (4, 2, "expert=2,tensor=2")]
)
def test_processes_and_meshes_give_the_numbers_of_one(one, tmp_path, count, devices, mesh):
    workdir = tmp_path / "many"
    fields = [f"--config.mesh.{part}" for part in mesh.split(",") if part]
    run(workdir, f"--processes={count}", f"--devices={devices}", "--config.mesh.min_size=1", *fields, module="launch.local")
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=2e-5)


@pytest.mark.slow
def test_sigterm_is_agreed_on_and_saved_by_all(one, tmp_path):
    workdir = tmp_path / "stopped"
    more = ["--config.train.duration=100000", "--config.checkpoint.every=0"]
    parent = subprocess.Popen(
        [sys.executable, "-m", "launch.local", "--processes=2", *FLAGS, *more, f"--workdir={workdir}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=FAST,
    )
    until = time.time() + 500
    while not (workdir / "metrics.jsonl").exists():
        assert parent.poll() is None and time.time() < until
        time.sleep(0.05)
    parent.terminate()
    output = parent.communicate(timeout=120)[0]
    assert parent.returncode == 75, output[-2000:]
    steps = [p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(steps) == 1 and f"stopped by SIGTERM at step {steps[0]}" in output
