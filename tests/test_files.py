"""Files that others may have touched are read or refused in a line; outputs are whole or not there."""

import json
import os
import zipfile

import pytest

from research import files
from research.errors import UserError


@pytest.mark.parametrize(
    "content, words",
    [
        (b'{"a": "\xff"}', "no UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1, 2]", "holds a list"),
        (b"{}", "'a' is missing"),
        (b'{"a": ', "damaged"),
        (b"", "damaged"),
    ],
)
def test_damaged_json_is_told_in_a_line(tmp_path, content, words):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        files.read_json(path, ("a",), "start anew")
    assert str(path) in str(error.value) and "start anew" in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "not a regular file"), ("none", "missing"), ("", "not a regular file")):
        with pytest.raises(UserError, match=words):
            files.read_text(tmp_path / name)


def test_damaged_lines_are_counted_and_the_cut_one_is_not(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\n[1]\n{"other": 2}\n{"step": 2}\n{"step": 3')
    assert files.read_json_lines(path, ("step",)) == ([{"step": 1}, {"step": 2}], 3)
    assert files.read_json_lines(tmp_path / "none") == ([], 0)


def test_json_never_holds_nan(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": [float("nan"), float("inf"), 1.5], "b": {"c": float("-inf")}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, None, 1.5], "b": {"c": None}}


def test_links_are_not_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(precious)
    with pytest.raises(UserError, match="is a link"):
        files.open_for_append(tmp_path / "a")
    files.write_text(tmp_path / "b", "new")
    assert (
        precious.read_text() == "mine" and (tmp_path / "b").read_text() == "new" and not (tmp_path / "b").is_symlink()
    )


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    for text in ("one", "two"):
        with files.whole_folder(out, "config.json", ("model-*",)) as stage:
            (stage / "config.json").write_text(text)
            (stage / f"model-{text}").write_text(text)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model-two"]
    with pytest.raises(RuntimeError), files.whole_folder(out, "config.json", ("model-*",)) as stage:
        (stage / "model-three").write_text("three")
        raise RuntimeError
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model-two"]


def make_run(folder):
    (folder / "checkpoints" / "3").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "out", ["run", "run/", "run/checkpoints", "run/checkpoints/3/x", "run/config.json", "link", "run/../run", "other"]
)
def test_an_output_onto_a_run_is_refused(tmp_path, out):
    run = make_run(tmp_path / "run")
    make_run(tmp_path / "other")
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(UserError, match="--out="):
        files.check_output(tmp_path / out, run)


def test_an_output_onto_its_input_is_refused_and_others_are_not(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text("{}")
    (tmp_path / "link").symlink_to(model / "model.safetensors")
    for out in (model, model / "model.safetensors", model / "config.json", tmp_path / "link"):
        with pytest.raises(UserError, match="overwritten"):
            files.check_output(out, model)
    with pytest.raises(UserError, match="overwritten"):
        files.check_output(model, model / "model.safetensors")
    run = make_run(tmp_path / "run")
    for out in (run / "w50", tmp_path / "new", model / "model.stablehlo", run / "pareto_of_mine.png"):
        files.check_output(out, model, run)


def test_a_link_inside_what_is_read_leads_to_no_overwriting(tmp_path):
    """A folder whose weights lie elsewhere, as caches of downloads have them."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "model.safetensors").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to("../store/model.safetensors")
    for out in ("store", "store/model.safetensors"):
        with pytest.raises(UserError, match="is a file of what is read"):
            files.check_output(tmp_path / out, tmp_path / "model")


def test_a_run_that_has_just_started_is_a_run(tmp_path):
    for name in ("config.json", "environment.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="directory of a run"):
        files.check_output(tmp_path)


def test_a_workdir_is_no_models_folder_and_no_part_of_a_run(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("x")
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="--workdir=.* holds a model"):
        files.check_workdir(tmp_path / "model")
    with pytest.raises(UserError, match="is part of the run"):
        files.check_workdir(run / "checkpoints" / "again")
    for fine in (run, run / "fine_tuned", tmp_path / "new"):
        files.check_workdir(fine)


def test_folders_that_are_links_and_pipes_are_not_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a link"):
        files.make_folder(tmp_path / "link")
    for write in (files.open_for_append, files.open_anew):
        with pytest.raises(UserError, match="cannot write"):
            write(tmp_path / "pipe")


def test_foreign_names_are_shown_short_and_without_control_characters():
    assert files.printable("a\x1b[31mb\n") == "a\\x1b[31mb\\n"
    assert len(files.printable("x" * 10**6)) == 80


def test_archives_that_swell_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(2**27))
    with pytest.raises(
        UserError,
        match=r"a.npz claims 134,217,728 bytes in a file of \d+,\d+: damaged, or made to fill the memory; more",
    ):
        files.check_zip(path, "more")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(2**20))
    files.check_zip(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="is damaged or no zip archive"):
        files.check_zip(path)
