"""Commands, flags, config fields, make targets and files that documents name are there."""

import ast
import re

import pytest

from research.train.config import base_config
from research.train.sections import FREE
from tests.documents.pages import DOCUMENTS, LINK, ROOT, commands, name

SECTIONS = "|".join(base_config())
TEXTS = [pytest.param(path.read_text(), id=name(path)) for path in DOCUMENTS]


def flags(command):
    """The flags that a command and the files of launch/ that it imports define."""
    seen, files, out = set(), [f"launch/{command}.py"], {"helpshort", "help"}
    while files:
        path = ROOT / files.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "launch":
                files += [f"launch/{alias.name}.py" for alias in node.names]
            if isinstance(node, ast.Call) and re.search(r"DEFINE|_flag$", ast.unparse(node.func)):
                out |= {arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant)}
    return out


def is_field(dotted):
    """Whether a config has this field or group; what `model` and the like hold is checked by whoever reads it."""
    value = base_config().to_dict()
    for i, key in enumerate(parts := dotted.split(".")):
        if any(".".join(parts[: n + 1]) in FREE for n in range(i)):
            return True
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True


@pytest.mark.parametrize("text", TEXTS)
def test_commands_and_flags_are_there(text):
    for command, rest in commands(text):
        if not command.islower():
            continue
        assert (ROOT / f"launch/{command}.py").is_file(), command
        for flag in re.findall(r"--(\w+)(?![\w.])", re.sub(r"--config\.\S+", "", rest)):
            assert flag in flags(command) or flag.removeprefix("no") in flags(command), (command, flag)


@pytest.mark.parametrize("text", TEXTS)
def test_config_fields_are_there(text):
    named = re.findall(r"--config\.([a-z_]+(?:\.[a-z_]+)*)(?![\w.])", text)
    named += re.findall(rf"(?<![\w.-])config\.((?:{SECTIONS})(?:\.[a-z_]+)*)(?![\w(])", text)
    assert [field for field in named if field != "any.field" and not is_field(field)] == []


@pytest.mark.parametrize("text", TEXTS)
def test_make_targets_and_files_are_there(text):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE)) <= targets
    plain = LINK.sub("", text)  # links have a test of their own
    files = re.findall(r"(?<![\w/.~])((?:configs|tests|research|launch|results)/[\w./-]*\w\.(?:py|csv|md|json))", plain)
    assert [file for file in files if "NAME" not in file and not (ROOT / file).is_file()] == []


def test_the_checks_find_what_is_not_there():
    assert {"workdir", "plugin", "config", "distributed"} <= flags("train") and "split" not in flags("train")
    assert (
        is_field("methods")
        and is_field("method.ema.decay")
        and is_field("model.anything.at.all")
        and is_field("data.options.period")
    )
    assert not is_field("train.ema") and not is_field("seed.x") and not is_field("nothing")
    assert list(commands("x `python -m launch.train --config=A --workdir=B` y")) == [
        ("train", " --config=A --workdir=B")
    ]
