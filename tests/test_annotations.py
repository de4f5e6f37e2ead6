"""Annotations of arrays hold at run time: of every model, of its ops in all implementations and of decoding."""

import os
import subprocess
import sys

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Array, Float

from research.models import registry
from tests.annotations import ROOT, SWITCH, checked


@jaxtyping.jaxtyped(typechecker=checked)
def scaled(x: Float[Array, "B D"], by: Float[Array, " B"]) -> Float[Array, "B D"]:
    return x * by[:, None]


@pytest.mark.slow
def test_every_model_keeps_its_annotations():
    run = subprocess.run([sys.executable, "-m", "tests.annotations"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    assert sorted(run.stdout.split()) == sorted(registry.list_models())


@pytest.mark.slow
def test_tasks_and_attacks_keep_their_annotations():
    """Their own tests, with every package of `research` checked at each call."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "tests/tasks", "tests/robust"]
    environment = {**os.environ, SWITCH: "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.parametrize(
    ("x", "by"),
    [(jnp.ones((2, 3), jnp.int32), jnp.ones(2)), (jnp.ones(2), jnp.ones(2)), (jnp.ones((2, 3)), jnp.ones(3))],
)
def test_other_types_and_sizes_are_errors(x, by):
    with pytest.raises(jaxtyping.TypeCheckError):
        scaled(x, by)


def test_arrays_of_numpy_are_taken_for_those_of_jax():
    np.testing.assert_array_equal(scaled(np.ones((2, 3), np.float32), np.arange(2.0)), [[0, 0, 0], [1, 1, 1]])
