"""What the loop hands to compiled programs lies on devices: nothing is copied from the host behind its back."""

import jax
import numpy as np
import pytest

from launch import config as recipe
from research.train import loop
from tests.train.reporter import Lines


@pytest.fixture
def guarded(monkeypatch):
    """Lets no compiled program take memory of the host; holds how many were called."""
    call, calls = jax.stages.Compiled.__call__, []

    def guarded_call(self, *args, **kwargs):
        calls.append(self)
        with jax.transfer_guard("disallow"):
            return call(self, *args, **kwargs)

    monkeypatch.setattr(jax.stages.Compiled, "__call__", guarded_call)
    return calls


def test_the_guard_sees_memory_of_the_host(guarded):
    program = jax.jit(lambda x: 2 * x).lower(np.float32(1)).compile()
    assert program(jax.device_put(np.float32(1))) == 2
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        program(np.float32(1))
    assert len(guarded) == 2


def test_programs_of_a_run_are_given_arrays_on_devices(guarded, tmp_path):
    fields = {"train.duration": "2", "train.accumulate": "2", "method.sandwich.count": "2", "eval.every": "1"}
    loop.train(recipe.load("tests/tiny.py:sandwich", fields), str(tmp_path / "run"), Lines())
    assert len(guarded) > 2 * 5  # of both updates four gradients and the update itself; evaluations
