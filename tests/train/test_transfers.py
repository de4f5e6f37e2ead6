"""What the loop hands to compiled programs lies on devices: nothing is copied from the host behind its back."""

import jax
import numpy as np
import pytest

from launch import config as recipe
from research.train import loop
from tests.methods import cases  # noqa: F401  (registers teacher)
from tests.train.killed import Processes
from tests.train.reporter import Lines


def train(config, workdir):
    """Trains while no compiled program may take memory of the host; returns how many were called."""
    with pytest.MonkeyPatch.context() as patch:
        calls = guard(patch)
        loop.train(config, workdir, Lines())
    return len(calls)


def guard(patch):
    """Lets no compiled program take memory of the host; returns a list of those that are called."""
    call, calls = jax.stages.Compiled.__call__, []

    def guarded_call(self, *args, **kwargs):
        calls.append(self)
        with jax.transfer_guard_host_to_device("disallow"):
            return call(self, *args, **kwargs)

    patch.setattr(jax.stages.Compiled, "__call__", guarded_call)
    return calls


def test_the_guard_sees_memory_of_the_host(monkeypatch):
    guarded = guard(monkeypatch)
    program = jax.jit(lambda x: 2 * x).lower(np.float32(1)).compile()
    assert program(jax.device_put(np.float32(1))) == 2
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        program(np.float32(1))
    assert len(guarded) == 2


TWO = {"train.duration": "2", "eval.every": "1", "nested.points.s": "width=0.5"}
COUNTED = {f"method.{name}.count": "2" for name in ("sandwich", "sorted")}
RUNS = {
    "sandwich": ("tests/tiny.py:sandwich", {"train.accumulate": "2"}, 5),
    "phases": ("tests/tiny_robust.py", {"methods": "advmoe", "model.dims": "(16, 32)", "model.stem_dim": "16"}, 2),
    "parallel": ("tests/methods/tiny.py", {"methods": "sorted", "nested.execution": "parallel", "mesh.data": "2"}, 2),
    "brought": ("tests/methods/tiny.py", {"methods": "teacher,sandwich"}, 3),
}
"""Of each kind the recipe, fields, and programs of an update: gradients and the update itself."""


SLOW = ("phases", "parallel")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in RUNS])
def test_programs_of_a_run_are_given_arrays_on_devices(kind, tmp_path):
    text, fields, programs = RUNS[kind]
    counted = {k: v for k, v in COUNTED.items() if k.split(".")[1] in f"{text} {fields}"}
    config, workdir = recipe.load(text, TWO | counted | fields), str(tmp_path / "run")
    if kind == "parallel":
        with Processes(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="2") as processes:
            calls = processes.call(train, config, workdir)
    else:
        calls = train(config, workdir)
    assert calls > 2 * programs  # of two updates; evaluations beside
