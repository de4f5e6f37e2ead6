"""A training step of every family moves between devices what its layout calls for, and nothing else: compared with a
stored file.

Renew tests/train/collectives.json with `python -m tests.train.family_meshes --store` when a change is meant, and read
the difference.
"""

import json
import re
import subprocess
import sys

import pytest
from jax.sharding import AbstractMesh

from research.modules.mesh import MESH_AXES, tensor_axis
from research.modules.state import abstract
from research.train.sharding import partition_spec
from tests.models import twins
from tests.train.family_meshes import BATCH, STORED
from tests.train.test_sharding import FAST

QUICK = ("lenet",)


def collectives_of(*families):
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.family_meshes", *families],
        capture_output=True,
        text=True,
        timeout=3000,
        env=FAST,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_family_has_the_stored_collectives():
    stored = json.loads(STORED.read_text())
    for family, found in collectives_of(*QUICK).items():
        assert found == stored[family]


FAMILIES = sorted({config.family for config in twins.distinct_twins()})


def test_the_stored_file_has_every_family():
    assert sorted(json.loads(STORED.read_text())) == FAMILIES, "python -m tests.train.family_meshes --store"


@pytest.mark.slow
def test_every_family_has_the_stored_collectives():
    stored = json.loads(STORED.read_text())
    found = collectives_of()
    assert found.keys() == stored.keys()
    for family in found:
        assert found[family] == stored[family], family


@pytest.mark.parametrize("family", FAMILIES)
def test_no_batch_is_gathered_and_nothing_moves_by_a_slice(family):
    """Gathers are of weights and of features: none has the whole batch, whose size is that of no other axis. Nothing is
    passed around or exchanged."""
    assert not {BATCH} & {
        size for config in twins.distinct_twins() if config.family == family for size in sizes_of(config)
    }
    for way, found in json.loads(STORED.read_text())[family].items():
        for name in found:
            kind, shapes = name.split(" ")[0], re.findall(r"\[([\d,]*)\]", name.split(": ")[1])
            assert kind in ("all-reduce", "all-gather", "reduce-scatter"), (way, name)
            if kind == "all-gather":
                assert not any(str(BATCH) in shape.split(",") for shape in shapes), (way, name)


def sizes_of(config):
    shapes = abstract(config)
    return {size for array in (*shapes.params.values(), *shapes.stats.values()) for size in array.shape}


def test_rules_and_layers_agree_on_what_is_cut_over_tensor():
    """Layers lay out their input by `mesh.tensor_axis`, arrays are laid out by the rules: for every array of every
    model it is one axis."""
    devices = AbstractMesh((1, 1, 2, 1, 1), MESH_AXES)
    for config in twins.distinct_twins():
        full = abstract(config)
        for name, array in {**full.params, **full.stats}.items():
            spec, _ = partition_spec(full.axes[name], array.shape, devices, 1)
            cut = [i for i, where in enumerate(spec) if where == "tensor"]
            assert cut == [i for i in [tensor_axis(full.axes[name], array.shape, 2)] if i is not None], name
