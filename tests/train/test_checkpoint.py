"""Checkpoints: what the manifest catches, what is kept, what a full disk does."""

import errno
import json

import numpy as np
import pytest

from research.errors import UserError
from research.train import checkpoint as module
from research.train.checkpoint import MANIFEST, Checkpoints, fault


def tree(value):
    return {"params": {"w": np.full((64, 8), value, np.float32), "b": np.arange(5, dtype=np.float32)}}


@pytest.fixture
def saved(tmp_path):
    """A folder with steps 1, 2 and 3."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=3, keep_best=False)
    for step in (1, 2, 3):
        checkpoints.save(step, tree(step), {"step": step, "wall_s": 1.5, "flops": 2.0})
    checkpoints.close()
    return tmp_path / "checkpoints"


def reopen(folder):
    said = []
    checkpoints = Checkpoints(folder, keep_last=3, keep_best=False, say=said.append)
    return checkpoints, said


def restore(checkpoints, step):
    import jax

    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree(0))
    place = jax.tree.map(lambda a: jax.sharding.SingleDeviceSharding(jax.devices()[0]), target)
    return checkpoints.restore(step, target, place)


def test_round_trip_is_bitwise(saved):
    checkpoints, said = reopen(saved)
    state, run = restore(checkpoints, 2)
    assert said == [] and checkpoints.steps() == [1, 2, 3]
    assert np.array_equal(state["params"]["w"], tree(2)["params"]["w"]) and run == {"step": 2, "wall_s": 1.5, "flops": 2.0}
    checkpoints.close()


def test_every_flipped_bit_is_noticed(saved):
    """One bit in each file of a step, one file at a time: none may pass."""
    step = saved / "3"
    files = [p for p in step.rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 3
    for path in files:
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        assert fault(step) is not None, path
        path.write_bytes(original)
        assert fault(step) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "empty_folder", "no_manifest", "extra"])
def test_damaged_newest_step_is_said_and_the_one_before_used(saved, damage):
    step = saved / "3"
    largest = max((p for p in step.rglob("*") if p.is_file() and p.name != MANIFEST), key=lambda p: p.stat().st_size)
    if damage == "flip":
        data = bytearray(largest.read_bytes())
        data[7] ^= 0x10
        largest.write_bytes(data)
    elif damage == "truncate":
        largest.write_bytes(largest.read_bytes()[:-3])
    elif damage == "missing":
        largest.unlink()
    elif damage == "empty_folder":
        import shutil

        shutil.rmtree(step)
        step.mkdir()
    elif damage == "no_manifest":
        (step / MANIFEST).unlink()
    else:
        (step / "stranger").write_text("x")
    checkpoints, said = reopen(saved)
    assert checkpoints.steps() == [1, 2]
    assert len(said) == 1 and said[0].startswith("checkpoint 3 is not used")
    assert (saved / "rejected" / "3").is_dir(), "nothing that was there may be lost"
    assert restore(checkpoints, 2)[0]["params"]["w"][0, 0] == 2
    checkpoints.save(3, tree(33), {"step": 3, "wall_s": 0.0, "flops": 0.0})
    checkpoints.close()
    again, said = reopen(saved)
    assert again.steps() == [1, 2, 3] and said == [] and restore(again, 3)[0]["params"]["w"][0, 0] == 33
    again.close()


def test_keeps_last_best_and_every(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep_last=2, keep_every=4, keep_best=True)
    for step, metric in [(1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3), (5, 0.4), (6, 0.5)]:
        checkpoints.save(step, tree(step), {"step": step}, metric)
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", keep_last=2, keep_every=4, keep_best=True)
    assert again.steps() == [2, 4, 5, 6] and again.best_step() == 2
    again.close()


def test_full_disk_names_what_is_safe(saved, monkeypatch):
    checkpoints, _ = reopen(saved)

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(module, "write_manifest", full)
    checkpoints.save(4, tree(4), {"step": 4})
    with pytest.raises(UserError, match="no space left on the disk; step 3 is safe"):
        checkpoints.wait()
    monkeypatch.undo()
    checkpoints.close()
    again, said = reopen(saved)
    assert again.steps()[-1] == 3 and "no manifest" in said[0]
    again.close()


def test_other_arrays_are_refused_in_one_line(saved):
    import jax

    checkpoints, _ = reopen(saved)
    target = {"params": {"other": jax.ShapeDtypeStruct((3,), np.float32)}}
    place = {"params": {"other": jax.sharding.SingleDeviceSharding(jax.devices()[0])}}
    with pytest.raises(UserError, match="does not fit this config") as error:
        checkpoints.restore(3, target, place)
    assert "\n" not in str(error.value)
    checkpoints.close()


def test_manifest_lists_every_file(saved):
    hashes = json.loads((saved / "1" / MANIFEST).read_text())["sha256"]
    assert set(hashes) == {str(p.relative_to(saved / "1")) for p in (saved / "1").rglob("*") if p.is_file() and p.name != MANIFEST}
    assert all(len(h) == 64 for h in hashes.values())
