"""What every command shares: paths as users write them, what the system refuses told in a line, output that nobody
reads."""

import errno
import json
import os
import subprocess
import sys

import pytest
from absl import flags

from launch import common, path_flags, report
from launch import config as recipe
from research import files
from research.data import idx
from research.errors import UserError
from tests.documents.pages import ROOT


@pytest.fixture
def nobody(monkeypatch):
    """A container: no HOME, and a user that has no name."""
    pwd = pytest.importorskip("pwd")

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("NESTAX_DATA", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = path_flags._PathParser()
    assert parser.parse("~/runs/x") == f"{tmp_path}/runs/x" and [
        parser.parse(text) for text in ("runs/~x", "", "gs://a/b")
    ] == [
        "runs/~x",
        "",
        "gs://a/b",
    ]
    values = flags.FlagValues()
    path_flags.path_flag("place", None, "A folder.", flag_values=values)
    values(["program", "--place=~/deep"])
    assert values.place == f"{tmp_path}/deep"
    assert report._found("~") == [str(tmp_path)]
    (tmp_path / "r.py").write_text("def get_config(arg=''): return arg")
    assert recipe.load_recipe("~/r.py:some") == "some"


def test_without_a_home_no_folder_named_tilde_is_made(nobody, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^~/x: the home folder is not known; set HOME"):
        files.user_path("~/x")
    with pytest.raises(ValueError, match="home folder is not known"):
        path_flags._PathParser().parse("~/x")
    assert [str(place) for place in idx.usual_folders("mnist")][-1] == "/usr/share/datasets/mnist"
    monkeypatch.setattr(idx, "usual_folders", lambda name: [tmp_path / name])
    with pytest.raises(UserError, match=f"mnist is in none of {tmp_path}/mnist"):
        idx.find_folder("mnist", None)


def test_names_that_are_no_utf8_are_refused():
    with pytest.raises(ValueError, match=r"^runs/\\udcff is not UTF-8; give another name$"):
        path_flags._PathParser().parse("runs/\udcff")


def test_notices_are_lines():
    done = shell("import warnings; [warnings.warn('2 files left out', common.Notice) for _ in range(2)]")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "note: 2 files left out\n" * 2)


def test_colons_in_paths_and_arguments_of_recipes(tmp_path):
    folder = tmp_path / "with:colons" / "x.py:y"
    folder.mkdir(parents=True)
    path = folder / "recipe.py"
    path.write_text("def get_config(arg='none'): return [arg]")
    assert recipe.load_recipe(f"{path}:a:b.py:c") == ["a:b.py:c"] and recipe.load_recipe(str(path)) == ["none"]
    assert recipe.split_recipe("configs/none.py:64x16") == ("configs/none.py", "64x16")
    with pytest.raises(UserError, match="no config file configs/quikstart.py; near: configs/quickstart.py"):
        recipe.load_recipe("configs/quikstart.py:x")
    assert recipe.split_recipes(["a.py:x=1,y=2,b.py", "c.py"]) == ["a.py:x=1,y=2", "b.py", "c.py"]


def test_a_recipe_without_arguments_refuses_one(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text("def get_config(): return 3")
    assert recipe.load_recipe(str(path)) == 3
    with pytest.raises(UserError, match=r"recipe.py takes no argument, and 'small' is given; fields are set by"):
        recipe.load_recipe(f"{path}:small")


def test_files_of_one_s_own_are_named_where_they_are_missing(tmp_path):
    """The run's command has two, one of which is given here; other mistakes say nothing of them."""
    command = "python -m launch.train --plugin=a.py --workdir=x --plugin b.py"
    (tmp_path / "environment.json").write_text(json.dumps({"command": command}))
    (tmp_path / "a.py").write_text("")
    code = (
        "import os, sys; from absl import flags; from launch import common\n"
        "from research.errors import Unregistered, UserError\n"
        "flags.DEFINE_string('workdir', None, '')\n"
        "def main(): common.print_next('python -m launch.x'); raise {error}('unknown model m')\n"
        "sys.path.insert(0, os.getcwd()); os.chdir({folder!r})\n"
        "sys.argv[1:] = ['--workdir={folder}', '--plugin=a.py']\ncommon.run(main)"
    )

    def end_of(error):
        own = code.format(error=error, folder=str(tmp_path))
        return subprocess.run([sys.executable, "-c", own], cwd=ROOT, capture_output=True, text=True, timeout=60)

    done = end_of("Unregistered")
    told = "error: unknown model m (one's own: --plugin=FILE); the run's command has --plugin=b.py\n"
    assert (done.returncode, done.stderr) == (2, told)
    assert done.stdout == "next: python -m launch.x --plugin=a.py\n"
    assert end_of("UserError").stderr == "error: unknown model m\n"


def test_commas_equals_signs_and_brackets_in_names_of_runs(tmp_path):
    names = ["a,b", "lr=0.1,wd=2", "[x]", "y1", "y2"]
    for name in names:
        (tmp_path / name).mkdir()
    whole = [f"{tmp_path}/{name}" for name in names[:3]]
    assert report._runs(whole) == {path: [path] for path in whole}
    both = [f"{tmp_path}/y1", f"{tmp_path}/y2"]
    assert report._runs([f"both={tmp_path}/y*,{both[0]}", whole[1]]) == {
        "both": both,
        both[0]: both[:1],
        whole[1]: [whole[1]],
    }
    assert report._runs([f"one={whole[1]}"]) == {"one": [whole[1]]}
    with pytest.raises(UserError, match=r"--workdir: no directory matches /nowhere/\\x1b\[2J$"):
        report._runs(["/nowhere/\x1b[2J"])


@pytest.mark.parametrize(
    "error, told",
    [
        (
            OSError(errno.EMFILE, "Too many open files", "/a/b"),
            "Too many open files: /a/b; this process may not open more files: raise",
        ),
        (
            OSError(errno.EFBIG, "File too large", "/a/b"),
            "File too large: /a/b; files may not become as large here: raise the limit (ulimit -f)",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "No space left on device: /a/b; free space there"),
        (OSError(errno.EROFS, "Read-only file system", b"/a/\xff"), "Read-only file system: /a/"),
        (OSError(errno.EACCES, "Permission denied", "/a\x1b[2J"), r"Permission denied: /a\x1b[2J; get the right to it"),
    ],
)
def test_what_the_system_refuses_names_the_file_and_the_right_remedy(error, told):
    line = common._refused_by_system(error)
    assert line.startswith(told) and line.isprintable()
    assert ("space" in line) == (error.errno == errno.ENOSPC)


PROGRAM = """
import sys
from launch import common
def main():
    %s
sys.argv = ["program"]
common.run(main)
"""


def shell(body, redirect="", before="", **environment):
    """Runs a command whose `main` is this body, in a shell."""
    line = f'{before} "$0" -c "$1" {redirect}; exit ${{PIPESTATUS[0]}}'
    command = ["bash", "-c", line, sys.executable, PROGRAM % body]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


def test_a_reader_that_left_does_not_end_the_work(tmp_path):
    """| head: the command goes on to its end in silence, so that no state of a run is lost."""
    out = tmp_path / "end"
    body = f"[print('line', i, flush=True) for i in range(20000)]; open({str(out)!r}, 'w').write('whole')"
    done = shell(body, "| head -n 1")
    assert (done.returncode, done.stdout, done.stderr, out.read_text()) == (0, "line 0\n", "", "whole")
    done = shell(body, "2>&1 >&-")  # a standard output that is closed from the start
    assert (done.returncode, done.stdout, out.read_text()) == (0, "", "whole")


def test_a_full_disk_behind_standard_output_is_told_as_such():
    done = shell("print('x', flush=True)", ">/dev/full")
    assert done.returncode == 2
    assert (
        done.stderr.startswith("error: No space left on device: standard output; free space there")
        and done.stderr.count("\n") == 1
    )


def test_letters_that_a_terminal_lacks_are_question_marks():
    done = shell("print('na\u00efve \u2192'); raise common.UserError('\u00e9t\u00e9')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (2, "na?ve ?\n", "error: ?t?\n")


@pytest.mark.parametrize(
    "body, before, told",
    [
        ("bytearray(1 << 40)", "ulimit -v 8000000;", "error: out of memory; give smaller batches"),
        (
            "raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\\nmore')",
            "",
            "error: out of memory on the device: RESOURCE",
        ),
        ("[open('/dev/null') for _ in [0]] and keep(open)", "", None),
        (
            "kept = []\n    while True: kept.append(open('/dev/null'))",
            "ulimit -n 40;",
            "error: Too many open files: /dev/null; this process may",
        ),
        ("open('/dev/null/x')", "", "error: Not a directory: /dev/null/x; a part of this path is a file"),
    ],
)
def test_memory_and_descriptors_that_run_out_are_one_line(body, before, told):
    done = shell(body, before=before)
    if told is None:
        assert "NameError" in done.stderr  # a fault of ours keeps its traceback
        return
    assert done.returncode == 2 and done.stderr.startswith(told) and done.stderr.count("\n") == 1
