"""What every mixer of sequence models must do, generated from the kinds there are; wrong mixers are caught; a new one
is a file and a field."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from research.models import registry
from research.models.sequence import SequenceConfig
from tests.modules.mixers import echo
from tests.modules.mixers.agreement import check_documents

DIM = 16


QUICK = ("attention", "gla", "hgrn", "mamba2", "sla", "window")
"""Kinds of every way of keeping a state, whose check compiles quickly."""


@pytest.mark.slow_unless(*QUICK)
@pytest.mark.parametrize("kind", SequenceConfig.specs())
def test_documents_states_and_padding_are_kept_apart(kind):
    config = registry.model_config(f"{kind}_small", **registry.entry(f"{kind}_small").tiny)
    check_documents(getattr(config, kind), DIM)


@pytest.mark.parametrize("ignores, caught", [("", False), ("segments", True), ("state", True), ("steps", True)])
def test_a_mixer_that_ignores_what_it_is_told_is_caught(ignores, caught):
    if not caught:
        return check_documents(echo.Echo(ignores), DIM)
    with pytest.raises(AssertionError):
        check_documents(echo.Echo(ignores), DIM)


ADD = """
import dataclasses
import research.models.sequence as sequence
from echo import Echo

@dataclasses.dataclass(frozen=True)
class WithEcho(sequence.SequenceConfig):
    echo: Echo = Echo()

sequence.SequenceConfig = WithEcho  # the field that the documentation asks for
from research.models import registry
from research.modules.state import apply, initialize
import jax, jax.numpy as jnp
info = registry.model_info("echo_small")
config = registry.model_config("echo_small", **registry.entry("echo_small").tiny)
params, stats = initialize(config, jax.random.key(0))
logits = apply(config, params, stats, jnp.zeros((1, 3), jnp.int32))[0]
print(info["paper"], info["params"], logits.shape)
"""


@pytest.mark.slow
def test_a_mixer_is_a_file_and_a_field(tmp_path):
    """From a file outside the repository, as WORKSPACE.md says."""
    (tmp_path / "echo.py").write_text(pathlib.Path(echo.__file__).read_text())
    (tmp_path / "add.py").write_text(ADD)
    root = str(pathlib.Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "add.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("arXiv 0000.00000 ") and done.stdout.strip().endswith("(1, 3, 10)")


def test_every_kind_names_its_paper():
    kinds = SequenceConfig.specs()
    assert all(spec.kind == kind and spec.paper.startswith("arXiv") for kind, spec in kinds.items())
    assert [registry.entry(f"{kind}_small").paper for kind in kinds] == [spec.paper for spec in kinds.values()]
    assert all(dataclasses.is_dataclass(spec) for spec in kinds.values())
