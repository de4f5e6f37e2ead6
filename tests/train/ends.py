"""A run of seconds with three programs, and what its folder tells: shared by the tests of how runs end."""

import json

from launch import config as recipe
from research.train import loop
from research.train.manifests import MANIFEST
from tests.train.reporter import Lines


def tiny(**overrides):
    """One network of two blocks without statistics: three programs."""
    fields = {"train.duration": "6", "eval.every": "0", "checkpoint.every": "4"}
    config = recipe.load("tests/tiny.py:full", fields | {k.replace("__", "."): str(v) for k, v in overrides.items()})
    config["model"] = {"name": "vit_tiny_patch16_224", "patch_size": 4, "dim": 16, "depth": 1, "num_heads": 2}
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


def train_alone(folder):
    """Trains a run that nothing happens to: (workdir, report)."""
    workdir = folder / "run"
    return workdir, loop.train(tiny(), str(workdir), Lines())
