"""Every method and every pair of methods: traced, or refused for the reason that is stored; killed and resumed with the
same bits; the same losses on several devices; and each without the files of the others."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from research.train.method_registry import known
from research.train.setup import make_setup
from research.train.supervised import Supervised
from tests.methods import pairs
from tests.methods.pairs import OURS, PAIRS, tiny
from tests.train.killed import Processes, arrays

ROOT = Path(__file__).resolve().parents[2]
TRAINED = [
    ("sandwich", "ema"),
    ("sorted", "ema"),
    ("random", "attacks"),
    ("pgd", "all"),
    ("trades", "sandwich"),
    ("advmoe", "sandwich"),
    ("advmoe", "ema"),
    ("upcycling", "sorted"),
    ("upcycling", "trades"),
    ("customisation", "random"),
]
"""Ten pairs that are trained, killed and resumed; no two are the same methods."""


def ids(pairs):
    return ["-".join(pair) for pair in pairs]


def test_the_stored_pairs_are_all_pairs():
    """And most of them run: what is stored is not that everything is refused."""
    stored = pairs.read()
    assert list(stored) == [" ".join(pair) for pair in PAIRS]
    assert len(PAIRS) == len(OURS) * (len(OURS) - 1) and list(stored.values()).count("runs") > len(PAIRS) / 2
    for name in OURS:
        assert any(told == "runs" for pair, told in stored.items() if name in pair.split()), name


@pytest.mark.parametrize("pair", PAIRS, ids=ids(PAIRS))
def test_every_pair_is_traced_or_refused_for_the_stored_reason(pair):
    """`python -m tests.methods.pairs` stores what is found."""
    told, stored = pairs.outcome(*pair), pairs.read()[" ".join(pair)]
    assert told == stored
    assert told == "runs" or ("\n" not in told and any(name in told for name in pair))


@pytest.fixture(scope="module")
def processes():
    with Processes() as processes:
        yield processes


def resumed_equals(processes, names, tmp_path):
    config, whole, killed = tiny(*names), tmp_path / "whole", tmp_path / "killed"
    processes.train(config, whole)
    processes.kill(config, killed, at=3, saved=2)
    assert "resumed from step 2" in processes.train(config, killed)
    ours, theirs = arrays(killed), arrays(whole)
    assert theirs["params"] and jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    losses = [json.loads(line)["loss"] for line in (whole / "metrics.jsonl").open() if '"loss":' in line]
    assert len(losses) == 4 and np.isfinite(losses).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_every_method_is_killed_and_resumed_with_the_same_bits(name, processes, tmp_path):
    resumed_equals(processes, [name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pair", TRAINED, ids=ids(TRAINED))
def test_ten_pairs_are_killed_and_resumed_with_the_same_bits(pair, processes, tmp_path):
    resumed_equals(processes, pair, tmp_path)


@pytest.mark.slow
def test_every_method_has_the_same_losses_on_eight_devices(tmp_path):
    losses = {}
    for devices in (1, 8):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        command = [sys.executable, "-m", "tests.methods.test_every", *OURS]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stderr[-3000:]
        losses[devices] = json.loads(done.stdout.splitlines()[-1])
    for name in OURS:
        np.testing.assert_allclose(losses[8][name], losses[1][name], rtol=2e-5, err_msg=name)


FILES = sorted(path.name for path in (ROOT / "research/methods").glob("*.py") if path.name != "__init__.py")
WITHOUT = """
import importlib
import os
import pkgutil
import launch
for module in pkgutil.iter_modules(launch.__path__):
    if not (child := os.fork()):  # commands define flags, many the same
        importlib.import_module(f"launch.{module.name}")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, module.name
for name in ("research.train", "research.tasks", "research.data", "research.models"):
    for module in pkgutil.iter_modules(importlib.import_module(name).__path__):
        importlib.import_module(f"{name}.{module.name}")
from research.train.setup import make_setup
from research.train.supervised import Supervised
from tests.methods.pairs import OURS, tiny
for names in ((), *((name,) for name in OURS)):
    learner = Supervised(make_setup(tiny(*names)))
    assert learner.setup.draw(0)[0].name in learner.setup.order
    learner.close()
print(*OURS)
"""


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_the_rest_stands_without_any_one_file(file, tmp_path):
    """Only the method of that file is gone: all other files are imported, and a run of each other method is set up;
    `bases/` holds what several share."""
    for folder in ("research", "launch", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.xz"))
    (tmp_path / "research/methods" / file).unlink()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    gone = {name for name, method in known().items() if method.__module__ == f"research.methods.{file[:-3]}"}
    assert set(done.stdout.splitlines()[-1].split()) == set(OURS) - gone and len(gone) == 1


def losses_of(name):
    learner = Supervised(make_setup(tiny(name, mesh__min_size=1, eval__batch_size=64)))
    state, batches, found = learner.initial(print), learner.batches(0), []
    for step in range(2):
        state, numbers = learner.update(step, state, next(batches))
        found += [loss for _, loss in learner.read(step, jax.device_get(numbers)).losses]
    learner.close()
    return found


if __name__ == "__main__":
    from research.process import set_xla_flags

    set_xla_flags()
    print(json.dumps({name: losses_of(name) for name in sys.argv[1:]}))
