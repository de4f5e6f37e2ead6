"""What commands write never lands on what they read, on a run or on a model: every flag of every command, found in its
source."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from research.errors import UserError

LAUNCH = Path("launch")
NEEDED = {
    "convert": ["--source=hf-mamba", "--weights={model}"],
    "export": ["--workdir={model}", "--format=safetensors"],
    "generate": ["--workdir={model}", "--prompt=x"],
}
"""Flags without which a command does not parse, or by which it reads a model."""
READ = {"config", "workdir", "weights", "from"}
"""Names of path flags that are not written to (`--workdir`: of commands that only read a run)."""
TRAINS = {"train", "local", "remote", "sweep", "compare", "reproduce", "versus", "in_context"}
SAYS = ("write", "Folder for", "CSV file", "JSON file", "PNG file", "Where to put")


def calls(path):
    """Yields (function, its call) of a source file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func.attr, node


def output_flags():
    """Returns (command, flag, place) of every flag that names what is written."""
    found = []
    for path in sorted(LAUNCH.glob("*.py")):
        for name, call in calls(path):
            if name == "output_flag":
                found.append((path.stem, call.args[0].value, call.args[1].attr))
    return found


def test_every_flag_that_names_an_output_is_checked():
    checked = {(command, flag) for command, flag, _ in output_flags()}
    assert len(checked) > 20
    for path in sorted(LAUNCH.glob("*.py")):
        for name, call in calls(path):
            if path.stem in ("common", "path_flags") or not (name == "path_flag" or name.startswith("DEFINE")):
                continue
            flag, texts = (
                call.args[0].value,
                [a.value for a in call.args[1:] if isinstance(a, ast.Constant) and isinstance(a.value, str)],
            )
            assert flag not in ("out", "csv", "plot"), f"launch.{path.stem} --{flag}: define it by outputs.output_flag"
            if name == "path_flag":
                assert flag in READ, (
                    f"launch.{path.stem} --{flag}: is it written? Define it by outputs.output_flag, else add it to READ"
                )
                assert not any(word in text for text in texts for word in SAYS), f"launch.{path.stem} --{flag}"
        if path.stem in TRAINS:
            assert (path.stem, "workdir") in checked


def test_every_command_that_writes_has_such_a_flag():
    """Found by what it calls; terminals, clusters' scripts and the table of implementations have no place that a user
    names."""
    writers = {
        "write_csv",
        "write_both",
        "write_text",
        "write_json",
        "replace_file",
        "save_folder",
        "to_folder",
        "makedirs",
    }
    with_flag = {command for command, _, _ in output_flags()} | {
        "slurm",
        "tpu",
        "jobset",
    }  # theirs is defined in remote.py
    for path in sorted(LAUNCH.glob("*.py")):
        if any(name in writers for name, _ in calls(path)):
            assert path.stem in with_flag, f"launch.{path.stem} writes, but has no flag of outputs.output_flag"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    (root / "run" / "checkpoints" / "3").mkdir(parents=True)
    (root / "model").mkdir()
    for name in (
        "run/config.json",
        "run/metrics.jsonl",
        "run/environment.json",
        "model/config.json",
        "model/model.safetensors",
    ):
        (root / name).write_text("{}\n")
    (root / "link").symlink_to("run")
    return root


def snapshot(root):
    return {p: (s.st_ino, s.st_mtime_ns, s.st_size) for p in sorted(root.rglob("*")) for s in [p.lstat()]}


COMMANDS = [(command, flag, place) for command, flag, place in output_flags() if command != "remote"]


@pytest.mark.parametrize("command, flag, place", COMMANDS, ids=[f"{c}-{f}" for c, f, _ in COMMANDS])
def test_an_output_onto_a_run_or_a_model_is_refused_before_any_work(places, command, flag, place):
    target = {"FILE": "link/metrics.jsonl", "RUN": "model"}.get(
        place, "model" if "{model}" in "".join(NEEDED.get(command, [])) else "link"
    )
    before = snapshot(places)
    more = [word.format(model=places / "model") for word in NEEDED.get(command, [])]
    words = [sys.executable, "-m", f"launch.{command}", *more, f"--{flag}={places / target}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith(f"error: --{flag}={places / target} "), done.stderr
    assert done.stderr.count("\n") == 1 and any(word in done.stderr for word in ("overwritten", "damaged"))
    assert snapshot(places) == before


@pytest.mark.parametrize(
    "place, target, words",
    [
        ("FILE", ".", "is a folder; expected a file"),
        ("FILE", "pipe", "is not a regular file"),
        ("FOLDER", "file", "is no folder; expected one"),
        ("FILE", "file/x.csv", "is no folder; give another one"),
    ],
)
def test_what_cannot_be_written_is_told_before_any_work(tmp_path, place, target, words):
    from launch import outputs

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=words):
        outputs._check_place(str(tmp_path / target), outputs.Place[place], "--out")
