"""The ImageNet recipe runs: two shrunken updates on synthetic data, by the command that its docstring names."""

import json
import subprocess
import sys

import numpy as np
import pytest


@pytest.mark.slow
def test_imagenet_recipe_runs_two_shrunken_updates(tmp_path):
    command = [sys.executable, "-m", "launch.train", "--config=configs/imagenet_unireplknet_t.py:shrunken", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2]
    assert all(np.isfinite(m["loss"]) for m in metrics if "loss" in m)
