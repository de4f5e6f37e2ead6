"""A training step of every family moves between devices what its layout calls for, and nothing else: compared with a stored file.

Renew tests/train/collectives.json with `python -m tests.train.family_meshes --store` when a change is meant, and read the difference.
"""

import json
import re
import subprocess
import sys

import pytest

from tests.train.family_meshes import BATCH, STORED
from tests.train.test_sharding import FAST

QUICK = ("lenet",)
GATHERS = ("hmode", "resnet", "unireplknet", "vim", "vit", "vmamba")
"""Families whose step still gathers a batch: depthwise convolutions and their kernels' gradients, patches, the logits of a test."""


def collectives_of(*families):
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.family_meshes", *families], capture_output=True, text=True, timeout=3000, env=FAST
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_family_has_the_stored_collectives():
    stored = json.loads(STORED.read_text())
    for family, found in collectives_of(*QUICK).items():
        assert found == stored[family]


FAMILIES = sorted(json.loads(STORED.read_text()))
STILL = pytest.mark.xfail(strict=True, reason="issue 6: still gathers a batch")


@pytest.mark.parametrize("family", [pytest.param(f, marks=STILL) if f in GATHERS else f for f in FAMILIES])
def test_no_batch_is_gathered(family):
    """A gather over the batch's axes whose result has the whole batch as its first axis; the batch's size is that of no parameter's axis."""
    for way, found in json.loads(STORED.read_text())[family].items():
        for name in found:
            if name.startswith("all-gather"):
                shapes = re.findall(r"\[([\d,]*)\]", name.split(": ")[1])
                assert not any(shape.split(",")[0] == str(BATCH) and len(shape.split(",")) > 1 for shape in shapes), (way, name)
