"""Sequences cut over the mesh axis `context`: the same numbers and gradients as whole, packed documents too."""

import json
import subprocess
import sys

import pytest

from research.models.sequence import SequenceConfig
from tests.train.test_sharding import FAST

QUICK = ("gla", "attention")


def deviations(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tests.modules.context_meshes", *arguments],
        capture_output=True,
        text=True,
        timeout=1500,
        env=FAST,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(results):
    assert results
    for name, found in results.items():
        assert found["deviation"] < 1e-5, name
        if not SequenceConfig.specs()[
            name.split(" ")[0]
        ].carries:  # routing attention: its clusters are of all tokens, and it sees them
            continue
        # What goes from device to device: states, or the keys and values of attention; never a batch.
        assert not any("over data" in gathered and "context" not in gathered for gathered in found["gathered"]), (
            name,
            found,
        )


@pytest.mark.slow
def test_stretches_of_packed_sequences_give_the_whole_s_numbers():
    results = deviations("--packed_only", *QUICK)
    check(results)
    assert all(found["passed_on"] for name, found in results.items() if name.startswith("gla"))


@pytest.mark.slow
def test_every_mixer_over_cut_sequences_gives_the_whole_s_numbers():
    results = deviations()
    assert {name.split(" ")[0] for name in results} == {
        kind for kind, spec in SequenceConfig.specs().items() if getattr(spec, "causal", True)
    }
    check(results)
