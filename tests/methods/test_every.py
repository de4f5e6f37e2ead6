"""Every method and every pair of methods: traced or refused with a reason; killed and resumed with the same bits; the
same losses on several devices."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import config as recipe
from research.errors import UserError
from research.train import loop
from research.train.extraction import Trained
from research.train.method_registry import known
from research.train.setup import make_setup
from research.train.supervised import Supervised
from research.train.update import Update
from tests.methods.cases import NEEDS
from tests.train.reporter import Lines

ROOT = Path(__file__).resolve().parents[2]
OURS = [name for name, method in known().items() if method.__module__.startswith("research.methods.")]
PAIRS = list(itertools.permutations(OURS, 2))
TRAINED = [
    ("ema", "sandwich"),
    ("sandwich", "ema"),
    ("ema", "sorted"),
    ("all", "ema"),
    ("random", "attacks"),
    ("pgd", "ema"),
    ("trades", "sandwich"),
    ("advmoe", "sandwich"),
    ("advmoe", "sorted"),
    ("advmoe", "ema"),
]
"""Ten pairs that are trained, killed and resumed."""


def tiny(*names, **fields):
    robust = {"pgd", "trades", "advmoe"} & set(names)
    text = f"tests/tiny_robust.py:{min(robust)}" if robust else "tests/methods/tiny.py:" + ",".join(names)
    given = {"methods": ",".join(names), "train.duration": "4", "checkpoint.every": "2", "eval.every": "0"}
    given |= {"nested.points.s": "width=0.5", "model.dims": "(16, 32)", "model.stem_dim": "16"} if robust else {}
    for name in names:
        if name == "upcycling" and "customisation" in names:
            continue  # whose model has no place for experts: refused, whatever the rest
        given |= {} if robust or name not in NEEDS else NEEDS[name]()
    given |= {f"method.{name}.count": "2" for name in names if name in ("sorted", "sandwich")}
    return recipe.load(text, given | {k.replace("__", "."): str(v) for k, v in fields.items()})


def ids(pairs):
    return ["-".join(pair) for pair in pairs]


@pytest.mark.parametrize("pair", PAIRS, ids=ids(PAIRS))
def test_every_pair_is_traced_or_refused_with_a_reason(pair):
    try:
        learner = Supervised(make_setup(tiny(*pair)))
    except UserError as refused:
        message = str(refused)
        assert "\n" not in message and any(name in message for name in pair), message
        return
    try:
        programs = learner.programs
        for step in range(len(learner.setup.phases)):
            draws, phase = learner.setup.draw(step), learner.setup.phase(step)
            for program in {p.title: p for p in learner.execution.programs(draws, phase)}.values():
                shapes = jax.eval_shape(
                    program.program(programs),
                    programs.held_shapes(),
                    dict(programs.full.params),
                    program.microbatch(programs),
                )
                assert shapes.grads.keys() == programs.full.params.keys()
            shapes = programs.shapes
            step_shape = jax.ShapeDtypeStruct((), np.int32)
            moved = jax.eval_shape(
                Update(phase.name).program(programs),
                shapes,
                dict(programs.full.params),
                step_shape,
                shapes.stats,
                shapes.stats,
            )
            assert jax.tree.structure(moved.state.methods) == jax.tree.structure(shapes.methods)
    finally:
        learner.close()


def resumed_equals(names, tmp_path):
    reference, workdir = tmp_path / "whole", tmp_path / "resumed"
    loop.train(tiny(*names), str(reference), Lines())
    shutil.copytree(reference, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    lines = Lines()
    loop.train(tiny(*names), str(workdir), lines)
    assert "resumed from step 2" in lines.said
    states = []
    for folder in (reference, workdir):
        trained = Trained(folder)
        trained.programs.close()
        states.append(jax.device_get((trained.state.params, trained.state.stats, trained.state.methods)))
    assert jax.tree.all(jax.tree.map(np.array_equal, *states))
    assert (workdir / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    assert all(np.isfinite(json.loads(line).get("loss", 0)) for line in (workdir / "metrics.jsonl").open())


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_every_method_is_killed_and_resumed_with_the_same_bits(name, tmp_path):
    resumed_equals([name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pair", TRAINED, ids=ids(TRAINED))
def test_ten_pairs_are_killed_and_resumed_with_the_same_bits(pair, tmp_path):
    resumed_equals(pair, tmp_path)


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
from research.train.config import base_config, resolved
from research.train.method_registry import known, make
from research.train.setup import make_setup
from research.train.supervised import Supervised
names = list(known())
methods = [make(name, {}) for name in names]
config = base_config()
config.model = {"name": "vit_tiny_patch16_224", "patch_size": 4, "dim": 16, "depth": 1, "num_heads": 2}
learner = Supervised(make_setup(resolved(config)))
assert learner.setup.draw(0)[0].name == "full"
learner.close()
print(*names)
"""


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_the_rest_stands_without_any_one_file(file, tmp_path):
    """Only the method of that file is gone; `bases/` holds what several share."""
    shutil.copytree(ROOT / "research", tmp_path / "research", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "research/methods" / file).unlink()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    gone = {name for name, method in known().items() if method.__module__ == f"research.methods.{file[:-3]}"}
    assert set(done.stdout.split()) == set(OURS) - gone and len(gone) == 1


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
