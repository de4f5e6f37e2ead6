"""Checkpoints: what the manifest catches, what is kept, what a full disk does."""

import errno
import json
import shutil
import threading

import numpy as np
import pytest

from research.errors import UserError
from research.train import checkpoint as module
from research.train.checkpoint import Checkpoints
from research.train.manifests import MANIFEST, fault, write_manifest
from research.train.restore import Wanted, restore_newest, whole_steps


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
    return checkpoints.restore(step, Wanted(target, place))


def test_round_trip_is_bitwise(saved):
    checkpoints, said = reopen(saved)
    state, run = restore(checkpoints, 2)
    assert said == [] and checkpoints.steps() == [1, 2, 3]
    assert np.array_equal(state["params"]["w"], tree(2)["params"]["w"]) and run == {
        "step": 2,
        "wall_s": 1.5,
        "flops": 2.0,
    }
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
        assert fault(step, 3) is not None, path
        path.write_bytes(original)
        assert fault(step, 3) is None


@pytest.mark.parametrize(
    "damage",
    [
        "flip",
        "truncate",
        "missing",
        "empty_folder",
        "no_manifest",
        "renamed",
        "is_a_file",
        "link",
        "nested_manifest",
        "list_manifest",
        "empty_manifest",
    ],
)
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
        shutil.rmtree(step)
        step.mkdir()
    elif damage == "no_manifest":
        (step / MANIFEST).unlink()
    elif damage == "renamed":
        shutil.rmtree(step)
        (saved / "1").rename(step)
        shutil.copytree(step, saved / "1")
        (saved / "1" / MANIFEST).write_text((saved / "1" / MANIFEST).read_text().replace('"step": 3', '"step": 1'))
    elif damage == "is_a_file":
        shutil.rmtree(step)
        step.write_text("x")
    elif damage == "link":
        step.rename(saved / "elsewhere")
        step.symlink_to(saved / "elsewhere")
    else:
        kinds = {"nested": "[" * 100_000, "list": "[1]", "empty": '{"step": 3, "sha256": {}}'}
        (step / MANIFEST).write_text(kinds[damage.removesuffix("_manifest")])
    checkpoints, said = reopen(saved)
    assert checkpoints.steps() == [1, 2]
    assert len(said) == 1 and said[0].startswith("checkpoint 3 is not used")
    assert (saved / "rejected" / "3").exists(), "nothing that was there may be lost"
    assert restore(checkpoints, 2)[0]["params"]["w"][0, 0] == 2
    checkpoints.save(3, tree(33), {"step": 3, "wall_s": 0.0, "flops": 0.0})
    checkpoints.close()
    again, said = reopen(saved)
    assert again.steps() == [1, 2, 3] and said == [] and restore(again, 3)[0]["params"]["w"][0, 0] == 33
    again.close()


STRAYS = (".DS_Store", "Thumbs.db", ".nfs0000c0de", "desktop.ini", "._state", "notes.txt")


def add_strays(folder):
    for name in STRAYS:
        (folder / name).write_bytes(b"\x00\xffstray")
    (folder / "stray folder").mkdir()
    (folder / "stray folder" / "1").write_text("x")


def test_strays_are_ignored_everywhere(saved):
    for folder in (saved, *(p for p in sorted(saved.rglob("*")) if p.is_dir())):
        add_strays(folder)
    for name in ("3 copy", "003", "\u00b2"):
        shutil.copytree(saved / "3", saved / name)
    checkpoints, said = reopen(saved)
    assert checkpoints.steps() == [1, 2, 3] and said == []
    for step in (1, 2, 3):
        assert restore(checkpoints, step)[0]["params"]["w"][0, 0] == step
    checkpoints.save(4, tree(4), {"step": 4})
    checkpoints.close()
    again, said = reopen(saved)
    assert again.steps() == [2, 3, 4] and said == [] and restore(again, 4)[0]["params"]["w"][0, 0] == 4
    again.close()


def test_a_stray_that_lies_there_while_a_step_is_sealed_may_vanish_later(saved):
    (saved / "3" / MANIFEST).unlink()
    for name in STRAYS[:-1]:
        (saved / "3" / name).write_text("x")
    write_manifest(saved / "3", 3)
    for name in STRAYS[:-1]:
        (saved / "3" / name).unlink()
    assert fault(saved / "3", 3) is None


def test_the_manifest_binds_the_step_and_an_older_one_is_taken_as_it_is(saved):
    (saved / "1").rename(saved / "5")
    assert fault(saved / "5", 5) == "it is that of step 1, renamed or copied"
    old = {"sha256": json.loads((saved / "2" / MANIFEST).read_text())["sha256"]}
    (saved / "2" / MANIFEST).write_text(json.dumps(old))
    assert fault(saved / "2", 2) is None


def newest(folder, say=lambda _: None):
    import jax

    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree(0))
    place = jax.tree.map(lambda a: jax.sharding.SingleDeviceSharding(jax.devices()[0]), target)
    return restore_newest(folder, lambda run: Wanted(target, place), say)


def snapshot(folder):
    return {p: (s.st_ino, s.st_size, s.st_mtime_ns) for p in sorted(folder.rglob("*")) for s in [p.lstat()]}


def test_reading_changes_nothing(saved):
    """Neither a half-written step nor orbax's temporary folder nor a damaged step is touched by a reader."""
    (saved / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (saved / "5").mkdir()
    (saved / "5" / "part").write_text("x")
    largest = max(
        (p for p in (saved / "3").rglob("*") if p.is_file() and p.name != MANIFEST), key=lambda p: p.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:-1])
    before, said = snapshot(saved), []
    step, state, run = newest(saved, said.append)
    assert (step, run["step"], state["params"]["w"][0, 0]) == (2, 2, 2)
    assert len(said) == 1 and said[0].startswith("checkpoint 3 is not used: ")
    assert snapshot(saved) == before


def test_no_whole_step_is_told_in_a_line(tmp_path):
    with pytest.raises(UserError, match="no whole step is in .* yet"):
        newest(tmp_path / "none")
    (tmp_path / "c" / "7").mkdir(parents=True)
    (tmp_path / "c" / "7" / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match="no step in .* is whole: checkpoint 7 is not used: its manifest is damaged"):
        newest(tmp_path / "c")


def test_a_reader_beside_a_writer_that_keeps_one_step_gets_a_whole_one(tmp_path):
    folder, failed = tmp_path / "c", []
    writer = Checkpoints(folder, keep_last=1, keep_best=False, say=failed.append)
    done = threading.Event()

    def read():
        try:
            while not done.is_set():
                step, state, run = newest(folder)
                assert step == run["step"] == state["params"]["w"][0, 0]
                seen.append(step)
        except Exception as error:
            failed.append(error)

    seen = []
    writer.save(1, tree(1), {"step": 1})
    writer.wait()
    reader = threading.Thread(target=read)
    reader.start()
    for step in range(2, 25):
        writer.save(step, tree(step), {"step": step})
    writer.close()
    done.set()
    reader.join()
    assert failed == [] and len(set(seen)) > 2 and not (folder / "rejected").exists()
    assert whole_steps(folder) == [23, 24]


def test_keeps_last_best_and_every(tmp_path):
    """A step's metric comes after its save, as in the loop."""
    metrics = {}
    keep = dict(keep_last=2, keep_every=4, keep_best=True, metrics=metrics)
    checkpoints = Checkpoints(tmp_path / "c", **keep)
    for step, metric in [(1, 0.1), (2, 0.9), (3, float("nan")), (4, 0.3), (5, 0.4), (6, 0.5)]:
        checkpoints.save(step, tree(step), {"step": step})
        metrics[step] = metric
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", **keep)
    assert again.steps() == [2, 4, 5, 6] and again.best_step() == 2
    again.close()


def test_full_disk_names_what_is_safe(saved, monkeypatch):
    checkpoints, _ = reopen(saved)

    def full(folder, step):
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
    with pytest.raises(
        UserError, match=r"does not fit this config: it lacks params/other and 2 more; open it with the version"
    ) as error:
        checkpoints.restore(3, Wanted(target, place))
    assert "\n" not in str(error.value)
    target = {"params": {"b": jax.ShapeDtypeStruct((6,), np.float32)}}
    place = {"params": {"b": place["params"]["other"]}}
    for others, message in (
        ((), "it holds params/w and 1 more; "),
        ({("params", "w")}, r"it holds \(5,\), needed is \(6,\), of params/b; "),
    ):
        with pytest.raises(UserError, match=f"does not fit this config: {message}"):
            checkpoints.restore(3, Wanted(target, place, others))
    target["params"]["b"] = jax.ShapeDtypeStruct((5,), np.float32)
    state, _ = checkpoints.restore(3, Wanted(target, place, {("params", "w")}))
    assert list(state["params"]) == ["b"] and np.array_equal(state["params"]["b"], tree(3)["params"]["b"])
    checkpoints.close()


def test_manifest_lists_every_file(saved):
    hashes = json.loads((saved / "1" / MANIFEST).read_text())["sha256"]
    assert set(hashes) == {
        str(p.relative_to(saved / "1")) for p in (saved / "1").rglob("*") if p.is_file() and p.name != MANIFEST
    }
    assert all(len(h) == 64 for h in hashes.values())


def test_a_folder_on_another_disk_is_written_by_its_link_and_no_link_below_it(saved, tmp_path):
    saved.rename(tmp_path / "disk")
    saved.symlink_to(tmp_path / "disk")
    checkpoints, said = reopen(saved)
    assert checkpoints.steps() == [1, 2, 3] and said == []
    checkpoints.save(4, tree(4), {"step": 4})
    checkpoints.close()
    assert (tmp_path / "disk" / "4" / MANIFEST).is_file() and saved.is_symlink() and newest(saved)[0] == 4
    (tmp_path / "disk" / "4").rename(tmp_path / "four")
    (tmp_path / "disk" / "4").symlink_to(tmp_path / "four")
    checkpoints, said = reopen(saved)
    checkpoints.close()
    assert checkpoints.steps() == [2, 3] and said == [
        "checkpoint 4 is not used: it is a link; moved to disk/rejected/4"
    ]


def test_a_link_that_leads_nowhere_or_into_another_run_is_refused(saved, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(saved)
    (tmp_path / "lost").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="link is part of the run in .*, which would be damaged"):
        Checkpoints(tmp_path / "link")
    with pytest.raises(UserError, match="lost is a link to .*unmounted, where no folder is; mount its disk"):
        Checkpoints(tmp_path / "lost")
    assert not (tmp_path / "unmounted").exists()
