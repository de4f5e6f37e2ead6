"""The files of a run's folder, hostile: bytes that are no UTF-8, deep nesting, other types, missing keys, links,
pipes."""

import contextlib
import errno
import json
import os

import pytest

from research.data.tokenizer_files import load_tokenizer
from research.errors import UserError
from research.report import run_card
from research.train.config import base_config, resolved
from research.train.rundir import RunDir, read_config
from tests.train.test_run import tiny

ENVIRONMENT = {"command": "x"}
DAMAGE = {
    "bytes": b'{"metric": "\xff\xfe"}',
    "nesting": b"[" * 200_000,
    "list": b"[1, 2]",
    "number": b"3",
    "null": b"null",
    "empty": b"",
    "missing": b"{}",
    "nul": b"\x00" * 50,
}


@pytest.fixture
def run(tmp_path):
    """A folder that a run has written its config and some lines into."""
    rundir = RunDir(tmp_path / "run", tiny(), ENVIRONMENT)
    for step in (1, 2, 3, 4):
        rundir.metrics(step, {"loss": 1 / step})
        rundir.timings(step, {"wall_s": 0.1 * step})
    rundir.close()
    return tmp_path / "run"


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_config_is_told_in_a_line(run, damage):
    (run / "config.json").write_bytes(DAMAGE[damage])
    with pytest.raises(UserError, match="config.json is damaged") as error:
        read_config(run)
    assert "start anew" in one_line(error)
    with pytest.raises(UserError, match="config.json is damaged"):
        RunDir(run, tiny(), ENVIRONMENT)


@pytest.mark.parametrize("section", ["model", "data", "optim", "train", "mesh", "nested", "eval", "seed", "report"])
@pytest.mark.parametrize("value", [3, "x", [1], None, {}, {"name": ["a"]}, {"every": {"a": 1}}])
def test_a_config_with_another_type_somewhere_is_refused_or_whole(run, section, value):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, section: value}))
    try:
        found = read_config(run)
    except UserError as error:
        assert "config.json is damaged" in str(error) and "\n" not in str(error)
    else:
        assert isinstance(found[section], dict | int)


def test_a_config_of_before_is_filled_up(run):
    config = json.loads((run / "config.json").read_text())
    del config["train"]["norms"], config["report"]
    (run / "config.json").write_text(json.dumps(config))
    assert read_config(run) == tiny() | {"report": resolved(base_config())["report"]}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_report_counts_as_none_or_is_told(run, damage):
    (run / "report.json").write_bytes(DAMAGE[damage])
    assert run_card.read_report(run) is None
    with pytest.raises(UserError, match="report.json") as error:
        run_card.compare([run])
    one_line(error)


@pytest.mark.parametrize(
    "content", [*DAMAGE.values(), b'{"devices": [1], "packages": 3, "git": "x"}'], ids=[*DAMAGE, "types"]
)
def test_a_damaged_environment_harms_no_report(run, content):
    (run / "environment.json").write_bytes(content)
    run_card.write_report(run, {"metric": "accuracy", "subnets": [{"name": "full", "value": 0.5, "flops": 3}]})
    assert "accuracy" in (run / "report.md").read_text()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tokenizer_is_told_in_a_line(run, damage):
    (run / "tokenizer.json").write_bytes(DAMAGE[damage])
    with pytest.raises(UserError, match="tokenizer.json is damaged") as error:
        load_tokenizer(run)
    one_line(error)


@pytest.mark.parametrize(
    "text", ['{"kind": ["chars"]}', '{"kind": "chars", "itos": 3}', '{"kind": "chars", "itos": "ba"}']
)
def test_a_tokenizer_of_other_types_is_told_in_a_line(run, text):
    (run / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer.json is damaged"):
        load_tokenizer(run)


def test_damaged_lines_are_counted_told_and_dropped(run):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    hostile = [
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b"[1]\n",
        b'{"loss": 1}\n',
        b'{"step": "2"}\n',
        b'{"step": 2, "loss": "x"}\n',
    ]
    (run / "metrics.jsonl").write_bytes(b"".join([lines[0], *hostile, lines[1], lines[3]]))
    assert [row["step"] for row in run_card.load_metrics(run)] == [1, 2, 4]
    run_card.write_report(run, {"metric": "accuracy", "subnets": [{"name": "full", "value": 0.5, "flops": 3}]})
    assert f"Damaged lines, which are left out: 6 of {run}/metrics.jsonl." in (run / "report.md").read_text()
    rundir = RunDir(run, tiny(), ENVIRONMENT)
    said = rundir.cut_back(3, {"metrics.jsonl": 3, "timings.jsonl": 3})
    rundir.close()
    assert said == [
        f"{run}/metrics.jsonl was damaged: 6 lines are no whole records and were dropped; 1 of 3 lines up to step 3 "
        "are lost"
    ]
    assert (run / "metrics.jsonl").read_bytes() == lines[0] + lines[1]


def test_what_a_truncated_file_has_lost_is_told(run):
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole[: len(whole) // 2])
    rundir = RunDir(run, tiny(), ENVIRONMENT)
    (said,) = rundir.cut_back(4, {"metrics.jsonl": 4, "timings.jsonl": 4})
    assert "2 of 4 lines up to step 4 are lost" in said or "3 of 4 lines up to step 4 are lost" in said
    assert rundir.cut_back(4) == [] and rundir.lines["timings.jsonl"] == 4
    rundir.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full disk to try on")
@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl", "tensorboard"])
def test_a_full_disk_is_told_of_the_file(run, name, monkeypatch):
    """The system does not name a file that is open."""
    rundir = RunDir(run, tiny(), ENVIRONMENT)
    write = rundir.timings if name == "timings.jsonl" else rundir.metrics
    write(5, {"loss": 1.0})
    with open("/dev/full", "w") as full:
        if name == "tensorboard":
            monkeypatch.setattr(rundir._board, "add_scalar", lambda *_: (full.write("x"), full.flush()))
        else:
            monkeypatch.setitem(rundir._files, name, full)
        with pytest.raises(OSError) as caught:
            write(6, {"loss": 1.0})
        assert caught.value.filename == str(run / name) and caught.value.errno == errno.ENOSPC
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    rundir.close()


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "timings.jsonl", "tensorboard"])
@pytest.mark.parametrize("dangling", [False, True])
def test_links_are_not_written_through(run, tmp_path, name, dangling):
    target = tmp_path / "precious"
    if not dangling:
        target.mkdir() if name == "tensorboard" else target.write_text("mine")
    if (run / name).is_dir():
        (run / name).rename(tmp_path / "moved")
    else:
        (run / name).unlink()
    (run / name).symlink_to(target)
    with pytest.raises(UserError, match=f"{name} is a link, which is not written through") as error:
        rundir = RunDir(run, tiny(), ENVIRONMENT)
        rundir.cut_back(4)
        rundir.metrics(5, {"loss": 1.0})
    one_line(error)
    assert target.exists() != dangling and (dangling or name == "tensorboard" or target.read_text() == "mine")
    assert (
        (not dangling and name == "tensorboard" and list(target.iterdir()) == []) or name != "tensorboard" or dangling
    )


@pytest.mark.parametrize(
    "name", ["config.json", "environment.json", "status.json", "report.json", "report.md", "pareto.png"]
)
def test_links_in_place_of_whole_files_are_replaced(run, tmp_path, name):
    precious = tmp_path / "precious"
    precious.write_bytes((run / "config.json").read_bytes())
    before = precious.read_bytes()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(precious)
    rundir = RunDir(run, tiny(), ENVIRONMENT)
    rundir.status({"state": "training"})
    rundir.close()
    run_card.write_report(run, {"metric": "accuracy", "subnets": [{"name": "full", "value": 0.5, "flops": 3}]})
    assert precious.read_bytes() == before and not (run / name).is_symlink()


def test_a_pipe_in_place_of_the_lock_holds_nobody_up(run):
    (run / "lock").unlink()
    os.mkfifo(run / "lock")
    with pytest.raises(UserError, match="cannot write .*lock"):
        RunDir(run, tiny(), ENVIRONMENT)


def test_a_refused_config_frees_the_lock(run):
    with pytest.raises(UserError, match="another config"):
        RunDir(run, tiny(seed=5), ENVIRONMENT)
    RunDir(run, tiny(), ENVIRONMENT).close()
    first = RunDir(run, tiny(), ENVIRONMENT)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        RunDir(run, tiny(), ENVIRONMENT)
    first.close()


def test_a_models_folder_is_no_run(run):
    (run / "model.safetensors").write_text("x")
    with pytest.raises(UserError, match="holds a stand-alone network, no run"):
        read_config(run)


def test_a_models_folder_is_no_workdir(tmp_path):
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(UserError, match="holds a model"):
        RunDir(tmp_path, tiny(), ENVIRONMENT)
    assert not (tmp_path / "config.json").exists()
