"""Reads `--config=configs/NAME.py[:arg]` and its `--config.any.field=value` overrides."""

import copy
import difflib
import inspect
import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from research.errors import UserError, near_names
from research.files import user_path
from research.optim.section import drop_left_over
from research.train.config import check, refuse_moved, resolved
from research.train.sections import FIELDS, FREE
from research.values import fit, parse

PREFIX = "--config."


def take_overrides(argv: list[str]) -> dict[str, str]:
    """Removes the `--config.field=value` arguments from `argv` and returns field -> text."""
    out = {}
    for arg in [a for a in argv[1:] if a.startswith(PREFIX)]:
        argv.remove(arg)
        field, found, value = arg[len(PREFIX) :].partition("=")
        if not found:
            raise UserError(f"{arg} has no value; write {arg}=VALUE")
        out[field] = value
    return out


def load(text: str, overrides: dict[str, str], workdir: str = "") -> dict[str, Any]:
    """Returns the resolved config of a recipe with overrides applied.

    Args:
      workdir: of a run that continues, if it is there: it keeps what only a new one would be refused.

    Raises:
      UserError: no such file, a field that does not exist, a value of another type or out of range, a setting that
        nothing goes by.
    """
    config = load_recipe(text)
    before = copy.deepcopy(config)
    for field, value in overrides.items():
        _set(config, field, value)
    from research.train.rundir import check_optimizer, continues
    from research.train.used import check_new, check_used

    if workdir:
        check_optimizer(workdir, config.optim.name)
    drop_left_over(config.optim, {name.removeprefix("optim.") for name in overrides if name.startswith("optim.")})
    check(config)
    whole = resolved(config)
    check_used(whole, resolved(before), overrides)
    if not workdir or not continues(workdir, whole):
        check_new(whole)
    return whole


def load_recipe(text: str) -> Any:
    """Calls `get_config(arg)` of `FILE.py[:arg]`."""
    path, arg = split_recipe(text)
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, [str(p) for p in sorted(Path("configs").glob("*.py"))], n=3, cutoff=0.3)
        raise UserError(
            f"no config file {path}; near: {', '.join(near) or 'none (run from the root of the repository)'}"
        )
    try:
        get_config = runpy.run_path(path)["get_config"]
        if arg and not inspect.signature(get_config).parameters:
            raise UserError(f"{path} takes no argument, and {arg!r} is given; fields are set by --config.FIELD=VALUE")
        return get_config(arg) if arg else get_config()
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{path}: missing {error}; a config defines get_config()") from None
    except Exception as error:
        place = next((f"line {t.lineno}" for t in reversed(_frames(error)) if t.filename == path), "get_config")
        raise UserError(f"{path}, {place}: {type(error).__name__}: {str(error).splitlines()[0]}") from None


def split_recipe(text: str) -> tuple[str, str]:
    """Returns (file, argument) of `FILE.py[:ARG]`; neither a colon in a folder's name nor one in the argument is taken
    for the border."""
    whole = str(user_path(text)) if text.startswith("~") else text
    if Path(whole).is_file():
        return whole, ""
    borders = [at + len(".py") for at in range(len(whole)) if whole.startswith(".py:", at)]
    files = [at for at in borders if Path(whole[:at]).is_file()]
    border = files[0] if files else borders[-1] if borders else whole.find(":")
    return (whole, "") if border < 0 else (whole[:border], whole[border + 1 :])


def split_recipes(texts: Sequence[str]) -> list[str]:
    """Returns the recipes of a flag that is repeated or separated by commas; a comma before what is no `FILE.py`
    belongs to an argument."""
    return [part for text in texts for part in re.split(r",(?=[^,:]*\.py(?:[,:]|$))", text)]


def _frames(error: BaseException) -> list[Any]:
    import traceback

    return list(traceback.extract_tb(error.__traceback__))


def _set(config: Any, field: str, text: str) -> None:
    refuse_moved(field)
    parts = field.split(".")
    node, where = config, "config"
    for part in parts[:-1]:
        if part not in node:
            if not f"{where}.".startswith(tuple(f"config.{section}." for section in FREE)):
                _unknown(where, part, node)
            node[part] = {}
        node, where = node[part], f"{where}.{part}"
    name = parts[-1]
    free = any(f"{where}.".startswith(f"config.{section}.") for section in FREE)
    if name not in node and not free:
        _unknown(where, name, node)
    old = node.get(name, None)
    if f"{where}.{name}" == "config.nested.points":
        raise UserError("config.nested.points holds sub-networks by name; set --config.nested.points.NAME=width=0.5")
    if isinstance(old, Mapping | ConfigDict):
        raise UserError(f"{where}.{name} is a group of fields ({', '.join(old)}); set one of them")
    known = FIELDS.get(field)
    if known is not None:
        value = parse(text, known.kind)
        if known.kind == tuple[str, ...] and isinstance(value, str):
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        value = fit(value, known.kind, f"{where}.{name}", known.rule)
    else:
        value = _as_old(text, old, f"{where}.{name}", free)
    try:
        with node.unlocked(), node.ignore_type():
            node[name] = value
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}.{name}={text!r}: {error}") from None


def _as_old(text: str, old: Any, where: str, free: bool) -> Any:
    """Returns a text as a value of the type that the field has; in free sub-trees, whose readers judge, only texts and
    booleans stay such."""
    if old is None or (free and not isinstance(old, str | bool)):
        return parse(text, Any)
    kind = tuple if isinstance(old, tuple | list) else type(old)
    value = parse(text, kind)
    return value if free and not isinstance(value, str) else fit(value, kind, where)


def _unknown(where: str, name: str, node: Any) -> None:
    keys = list(node)
    near = near_names(name, keys)
    raise UserError(f"unknown config field {where}.{name}; near: {', '.join(f'{where}.{n}' for n in near)}")


def from_argv() -> dict[str, str]:
    """Takes the overrides out of sys.argv; call before the flags are parsed."""
    return take_overrides(sys.argv)
