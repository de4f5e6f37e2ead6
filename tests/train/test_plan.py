"""What a mesh would need: bytes that are exactly the compiler's, collectives, and a config of seven billion
parameters."""

import json
import subprocess
import sys

import jax
import pytest

from launch import config as recipe
from research.nested.draws import Draw
from research.train import dry_run
from research.train.plan import activation_bytes, plan
from research.train.setup import make_setup
from research.train.supervised import Supervised
from research.train.turns import InParallel, InTurn
from tests.methods import cases  # noqa: F401  (registers own_stream and teacher)
from tests.train.test_sharding import FAST

CONTROL = 24
"""Bytes of the step's numbers: four of its clock, its scale, the place of a teacher."""


def planned(tmp_path, *flags, timeout=900):
    out = tmp_path / "plan.json"
    done = subprocess.run(
        [sys.executable, "-m", "launch.plan", *flags, f"--out={out}"],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=FAST,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return json.loads(out.read_text()), done.stdout


@pytest.mark.slow
def test_bytes_are_the_compiler_s_and_fsdp_gathers_what_it_cut(tmp_path):
    flags = [
        "--config=tests/tiny_lm.py:probe",
        "--devices=4",
        "--config.data.batch_size=32",
        "--config.eval.batch_size=64",
    ]
    flags += [
        "--config.mesh.fsdp=4",
        "--config.mesh.min_size=1",
        "--config.methods=",
        "--config.optim.name=adamw",
    ]
    plan, text = planned(tmp_path, *flags, "--chips=h100")
    for program, (theirs, ours) in plan["arguments"].items():
        assert 0 <= theirs - ours <= CONTROL and ours > 0, program
    held = plan["bytes"]
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.01)  # two moments
    assert held["parameters"] == held["gradients"] and plan["activations"] > 0
    assert any(name.startswith("all-gather over fsdp") for name in plan["collectives"]["gradient"])
    assert "floor of an update" in text and "h100" in text


@pytest.mark.slow
def test_seven_billion_parameters_lower_on_64_devices(tmp_path):
    plan, _ = planned(
        tmp_path,
        "--config=configs/lm_7b.py",
        "--devices=64",
        "--config.mesh.fsdp=8",
        "--config.mesh.tensor=8",
        timeout=3000,
    )
    assert all(0 <= theirs - ours <= CONTROL for theirs, ours in plan["arguments"].values())
    assert 64 * plan["bytes"]["parameters"] > 4 * 6.5e9


@pytest.mark.parametrize("second", [False, True])
def test_all_streams_and_brought_networks_are_counted(second):
    config = recipe.load("tests/methods/tiny.py:own_stream,teacher", {"method.own_stream.second": str(second)})
    setup = make_setup(config)
    found, whole = plan(setup), setup.batch_shapes(32)
    one = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(whole))
    assert found.bytes["batch"] == (1 + second) * one
    assert found.bytes["brought"] == found.bytes["parameters"] > 0  # a teacher of the same shape, without statistics
    theirs, ours = found.arguments["gradient"]
    unread = second * one  # the objective reads the first stream alone, so that XLA leaves the second out
    assert 0 <= theirs - (ours - unread) <= CONTROL
    learner = Supervised(setup)
    foreseen = learner.foresee()
    learner.close()
    activations = foreseen.bytes.pop("activations (estimate)")
    assert foreseen.bytes == found.bytes and activations == found.activations


def test_activations_of_a_method_s_objective_are_counted():
    """Adversarial training keeps the activations of clean and attacked images: about twice those of plain training."""
    found = {}
    for methods in ("trades", ""):
        learner = Supervised(make_setup(recipe.load("tests/tiny_robust.py:trades", {"methods": methods})))
        (gradient,) = learner.execution.programs(learner.setup.draw(0), learner.setup.phase(0))
        found[methods] = activation_bytes(learner.programs, gradient, 32)
        learner.close()
    assert 1.7 * found[""] < found["trades"] < 3 * found[""]


def test_activations_of_networks_in_parallel_are_those_of_the_largest():
    """The program of all networks holds a gradient of each, which a device computes on its rows."""
    learner = Supervised(make_setup(recipe.load("tests/tiny.py:sorted", {"method.sorted.count": "2"})))
    setup, programs = learner.setup, learner.programs
    parallel, draws, phase = InParallel(setup, programs), setup.draw(0), setup.phase(0)
    (program,) = parallel.gradient_programs(draws, phase)
    size = setup.config.data.batch_size
    sizes = [activation_bytes(programs, part, size) for part in program.parts(programs)]
    assert len(set(sizes)) > 1 and activation_bytes(programs, program, size) == max(sizes) > 0
    found = dry_run.foresee(setup, programs, parallel, [program], 2e9)
    assert found.bytes["activations (estimate)"] >= max(sizes) / 2 and found.programs == ["parallel gradient"]
    learner.close()


@pytest.mark.parametrize("kind", [InTurn, InParallel])
def test_what_is_ready_is_what_the_programs_of_an_update_take(kind):
    learner = Supervised(make_setup(recipe.load("tests/tiny.py:sorted", {"method.sorted.count": "2"})))
    setup, programs = learner.setup, learner.programs
    execution, draws = kind(setup, programs), setup.draw(3) if kind is InTurn else (Draw("full"),)
    ready = execution.ready(3, next(learner.batches(3)), draws)
    assert [program for program, _ in ready] == list(execution.gradient_programs(draws, setup.phase(3)))
    for program, given in ready:
        state = programs.held_shapes(), dict(programs.full.params)
        found = jax.eval_shape(program.program(programs), *state, given)
        assert {k: v.shape for k, v in found.grads.items()} == {k: v.shape for k, v in programs.full.params.items()}
    assert execution.planned() == (setup.draw(0) if kind is InParallel else (Draw("full", microbatches=2),))
    learner.close()
