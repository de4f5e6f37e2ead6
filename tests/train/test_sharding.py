"""Meshes and layouts: rules as data, and the same losses on 8 simulated devices as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from research.errors import UserError
from research.models import registry
from research.modules.axes import ROLES
from research.modules.state import abstract
from research.nested.slicing import CUTS
from research.train import sharding
from tests.methods.test_draws import space_of
from tests.models import twins

STORED = Path(__file__).parent / "layouts.json"
MESHES = ["data=2,fsdp=2,tensor=2"]
PURE = ["data=8", "fsdp=8", "tensor=8"]
SEQUENCE = "sequence:data=2,fsdp=2,tensor=2"
MOVED = "fsdp=8>data=2,fsdp=1,tensor=4"
UP = "stages/0/layer/phases/0/up/kernel"
FAST = {**os.environ, "XLA_FLAGS": " ".join(f"--{name}={str(value).lower()}" for name, value in twins.FAST.items())}
"""Where numbers of equally compiled programs are compared, compiling is what takes the time."""


def mesh(**sizes):
    return AbstractMesh(tuple(sizes.get(n, 1) for n in sharding.MESH_AXES), sharding.MESH_AXES)


def test_every_role_has_its_rules():
    assert set(ROLES) == set(CUTS) == {role for role, _ in sharding.RULES}


def test_first_rule_that_divides_wins():
    spec, refused = sharding.partition_spec(("stage1/embed", "stage1/layer/mlp"), (64, 256), mesh(fsdp=4, tensor=2))
    assert spec == PartitionSpec("fsdp", "tensor") and refused == []
    spec, refused = sharding.partition_spec(("stage1/embed", "stage1/layer/mlp"), (63, 258), mesh(fsdp=4, tensor=2), 1)
    assert spec == PartitionSpec(None, "tensor") and refused == ["stage1/embed=63 over fsdp=4"]
    spec, _ = sharding.partition_spec(("stage1/embed", "stage2/embed"), (64, 128), mesh(fsdp=4), 1)
    assert spec == PartitionSpec(None, "fsdp"), "a mesh axis is used once per array"


def test_small_arrays_are_replicated():
    assert sharding.partition_spec(("stage1/embed",), (64,), mesh(fsdp=4))[0] == PartitionSpec()


def test_mesh_errors():
    with pytest.raises(UserError, match="unknown mesh axis 'model'; valid: data, fsdp"):
        sharding.make_mesh({"model": 2})
    with pytest.raises(UserError, match="does not fit 1 devices"):
        sharding.make_mesh({"data": 3}, jax.devices()[:1])
    assert sharding.make_mesh({"data": -1}, jax.devices()[:1]).size == 1


@pytest.mark.parametrize("name", ["unireplknet_t", "vit_base_patch16_224", "resnet50"])
def test_layout_of_named_models_is_the_stored_one(name):
    """Renew tests/train/layouts.json with `python -m tests.train.test_sharding` when a change of layout is meant."""
    assert json.loads(STORED.read_text())[name] == layout_of(name)


def layout_of(name):
    full = abstract(registry.entry(name).config)
    place = mesh(data=2, fsdp=4, tensor=2)
    shapes = {**full.params, **full.stats}
    return {k: str(tuple(sharding.partition_spec(full.axes[k], s.shape, place)[0])) for k, s in sorted(shapes.items())}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_on({1: ["data=1"], 8: [*MESHES, MOVED]}, tmp_path_factory.mktemp("meshes"))


def run_on(wanted, out):
    """Runs meshes, by the number of devices, and returns what `tests.train.meshes` says of each."""
    found = {}
    for devices, meshes in wanted.items():
        command = [sys.executable, "-m", "tests.train.meshes", str(out / str(devices)), str(devices), *meshes]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=FAST)
        assert done.returncode == 0, done.stderr[-3000:]
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_losses_on_eight_devices_are_those_on_one(results, name):
    one, many = results["data=1"], results[name]
    assert len(one["losses"]) == 6
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=2e-5)
    np.testing.assert_allclose(many["values"], one["values"], atol=0.01)


@pytest.mark.slow
def test_parameters_on_eight_devices_in_one_way(tmp_path):
    results = run_on({1: ["data=1"], 8: PURE}, tmp_path)
    for name in PURE:
        np.testing.assert_allclose(results[name]["losses"], results["data=1"]["losses"], rtol=2e-5)
        assert results[name]["split"][UP] == results[name]["split"][f"mu:{UP}"] == (1 if name == "data=8" else 8)
        assert_same_parameters(results[name], results["data=1"])


@pytest.mark.slow
def test_a_hybrid_sequence_model_is_the_same_on_eight_devices(tmp_path):
    """Mamba-2, gated linear attention and attention with a gated FFN, and half of their width."""
    results = run_on({1: ["sequence:data=1"], 8: [SEQUENCE]}, tmp_path)
    one, many = results["sequence:data=1"], results[SEQUENCE]
    assert len(one["losses"]) == 6
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=2e-5)
    assert max(many["split"].values()) == 4 and set(one["split"].values()) == {1}


@pytest.mark.slow
def test_a_sequence_cut_over_devices_trains_as_a_whole(tmp_path):
    """Mamba-2, gated linear attention and attention with the mesh axis `context`, alone and with others."""
    meshes = ["sequence:context=8", "sequence:data=2,context=4", "sequence:fsdp=2,tensor=2,context=2"]
    results = run_on({1: ["sequence:data=1"], 8: meshes}, tmp_path)
    for name in meshes:
        np.testing.assert_allclose(results[name]["losses"], results["sequence:data=1"]["losses"], rtol=2e-5)


@pytest.mark.slow
def test_bfloat16_on_eight_devices_is_that_of_one_but_for_rounding(tmp_path):
    name = "bf16:fsdp=2,tensor=2,context=2"
    results = run_on({1: ["bf16:data=1"], 8: [name]}, tmp_path)
    np.testing.assert_allclose(results[name]["losses"], results["bf16:data=1"]["losses"], rtol=5e-3)


@pytest.mark.slow
def test_experts_on_eight_devices_train_as_on_one(tmp_path):
    meshes = ["moe:data=2,expert=4", "moe:fsdp=2,tensor=2,expert=2"]
    results = run_on({1: ["moe:data=1"], 8: meshes}, tmp_path)
    for name in meshes:
        np.testing.assert_allclose(results[name]["losses"], results["moe:data=1"]["losses"], rtol=2e-5)


@pytest.mark.slow
def test_networks_on_different_devices_give_the_numbers_of_one_after_the_other(tmp_path):
    results = run_on({1: ["spread:data=1"], 8: ["spread:data=8"]}, tmp_path)
    one, many = results["spread:data=1"], results["spread:data=8"]
    assert len(one["losses"]) == 6
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=2e-5)


def test_spreading_that_does_not_fit_is_refused():
    from launch import config as recipe
    from research.train import parallel
    from research.train.method_registry import make
    from research.train.methods import Methods
    from research.train.sections import RunConfig

    fields = {"nested.execution": "parallel", "method.sorted.count": "2"}
    config = RunConfig.of(recipe.load("tests/tiny.py:sorted", fields))

    def check(where, name="sorted", **options):
        methods = Methods((make(name, options),))
        parallel.check(config, methods, methods.draws(space_of(("full", "m", "s")), 0, 0), where)

    check(mesh(data=8), count=2)
    with pytest.raises(UserError, match=r"divides 8 devices among 3 networks"):
        check(mesh(data=8), count=3)
    with pytest.raises(UserError, match=r"set mesh.fsdp=1"):
        check(mesh(data=4, fsdp=2), count=2)
    with pytest.raises(UserError, match=r"methods=\('all',\) does not give; valid: methods with 'sorted'"):
        check(mesh(data=8), "all")


class Chip:
    """A device as JAX's mesh utilities see it."""

    def __init__(self, number, slices):
        self.id, self.slice_index, self.process_index = number, number * slices // 16, number // 4
        self.platform, self.device_kind = "gpu", "chip"

    def __repr__(self):
        return f"{self.slice_index}:{self.id}"


def test_slices_lie_along_one_axis():
    devices = [Chip(i, 2) for i in range(16)]
    grid = sharding.arrange(devices, (4, 2, 2, 1, 1))
    slices = np.vectorize(lambda d: d.slice_index)(grid)
    assert (slices[:2] == slices[0, 0, 0, 0, 0]).all() and (slices[2:] == 1 - slices[0, 0, 0, 0, 0]).all()
    along_fsdp = np.vectorize(lambda d: d.slice_index)(sharding.arrange(devices, (4, 4, 1, 1, 1), "fsdp"))
    assert (along_fsdp[:, :2] == along_fsdp[0, 0]).all() and (along_fsdp[:, 2:] != along_fsdp[0, 0]).all()
    with pytest.raises(UserError, match=r"mesh.data=1 does not divide over 2 slices"):
        sharding.arrange(devices, (1, 16, 1, 1, 1))
    with pytest.raises(UserError, match=r"mesh.across='layers'; valid: data"):
        sharding.arrange(devices, (16, 1, 1, 1, 1), "layers")


@pytest.mark.slow
def test_a_checkpoint_is_restored_on_another_mesh(results):
    moved, one = results[MOVED], results["data=1"]
    assert 0 < moved["resumed_at"] < 3
    np.testing.assert_allclose(moved["losses"], one["losses"], rtol=2e-5)
    assert_same_parameters(moved, one)


def assert_same_parameters(found, expected):
    found, expected = np.load(found["params"]), np.load(expected["params"])
    assert set(found.files) == set(expected.files)
    for name in expected.files:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6, rtol=2e-5, err_msg=name)


@pytest.mark.slow
def test_arrays_lie_where_the_rules_say(results):
    assert results["data=2,fsdp=2,tensor=2"]["split"][UP] == results["data=2,fsdp=2,tensor=2"]["split"][f"mu:{UP}"] == 4
    assert results["data=2,fsdp=2,tensor=2"]["layout"][UP] == "(None, 'fsdp', 'tensor')"


if __name__ == "__main__":
    names = ("unireplknet_t", "vit_base_patch16_224", "resnet50")
    STORED.write_text(json.dumps({name: layout_of(name) for name in names}, indent=1) + "\n")
