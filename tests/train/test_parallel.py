"""Networks on different devices in one program: unequal labels, balancing biases and alternating phases as one after
the other."""

import json
import os
import subprocess
import sys

import pytest

from tests.models import twins

FAST = {**os.environ, "XLA_FLAGS": " ".join(f"--{name}={str(value).lower()}" for name, value in twins.FAST.items())}


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, "-m", "tests.train.parallel_updates"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=900, env=FAST)
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["language", "moe"])
def test_devices_with_unequal_labels_give_the_update_and_the_line_of_one_after_the_other(found, name):
    assert found[name]["step"] < 2e-6
    for key, (ours, theirs) in found[name]["line"].items():
        assert ours == pytest.approx(theirs, rel=2e-6), key
    ours, theirs = found[name]["logged"]
    assert ours == theirs and bool(ours) == (name == "moe")


@pytest.mark.slow
def test_balancing_biases_move_by_what_the_devices_of_the_full_network_saw(found):
    for name, (ours, theirs) in found["moe"]["bias"].items():
        assert ours == theirs and any(map(any, ours)) == name.endswith("/bias")


@pytest.mark.slow
def test_phases_alternate_and_running_moments_move(found):
    rounds = found["alternating"]
    assert all(0 < loss < 100 for loss in rounds["losses"]) and rounds["moved"] == [True]
    assert [name[-1] for name in rounds["names"]] == ["loss_experts", "loss_router"] * 2
