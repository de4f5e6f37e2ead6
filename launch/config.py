"""Reads `--config=configs/NAME.py[:arg]` and its `--config.any.field=value` overrides."""

import ast
import difflib
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from research.errors import UserError
from research.files import user_path
from research.train.config import FREE, check, resolved

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


def load(text: str, overrides: dict[str, str]) -> dict[str, Any]:
    """Returns the resolved config of a recipe with overrides applied.

    Raises:
      UserError: no such file, a field that does not exist, a value of another type.
    """
    config = load_recipe(text)
    for field, value in overrides.items():
        _set(config, field, value)
    check(config)
    return resolved(config)


def load_recipe(text: str) -> Any:
    """Calls `get_config(arg)` of `FILE.py[:arg]`."""
    path, arg = split_recipe(text)
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, [str(p) for p in sorted(Path("configs").glob("*.py"))], n=3, cutoff=0.3)
        raise UserError(f"no config file {path}; near: {', '.join(near) or 'none (run from the root of the repository)'}")
    try:
        module = runpy.run_path(path)
        return module["get_config"](arg) if arg else module["get_config"]()
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{path}: missing {error}; a config defines get_config(arg='')") from None
    except Exception as error:
        place = next((f"line {t.lineno}" for t in reversed(_frames(error)) if t.filename == path), "get_config")
        raise UserError(f"{path}, {place}: {type(error).__name__}: {str(error).splitlines()[0]}") from None


def split_recipe(text: str) -> tuple[str, str]:
    """Returns (file, argument) of `FILE.py[:ARG]`; neither a colon in a folder's name nor one in the argument is taken for the border."""
    whole = str(user_path(text)) if text.startswith("~") else text
    if Path(whole).is_file():
        return whole, ""
    borders = [at + len(".py") for at in range(len(whole)) if whole.startswith(".py:", at)]
    files = [at for at in borders if Path(whole[:at]).is_file()]
    border = files[0] if files else borders[-1] if borders else whole.find(":")
    return (whole, "") if border < 0 else (whole[:border], whole[border + 1 :])


def split_recipes(texts: Sequence[str]) -> list[str]:
    """Returns the recipes of a flag that is repeated or separated by commas; a comma before what is no `FILE.py` belongs to an argument."""
    return [part for text in texts for part in re.split(r",(?=[^,:]*\.py(?:[,:]|$))", text)]


def _frames(error: BaseException) -> list[Any]:
    import traceback

    return list(traceback.extract_tb(error.__traceback__))


def _set(config: Any, field: str, text: str) -> None:
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
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    old = node.get(name, None)
    if isinstance(old, bool) and text.lower() in ("true", "false"):
        value = text.lower() == "true"
    elif isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    elif isinstance(old, str) and not isinstance(value, str):
        value = text
    if old is not None and hasattr(old, "items"):
        raise UserError(f"{where}.{name} is a group of fields ({', '.join(old)}); set one of them")
    wrong = UserError(f"{where}.{name}={text!r} is not of type {type(old).__name__} (as in {old!r})")
    if old is not None and not _same_kind(value, old, free):
        raise wrong
    if old is None and not free and isinstance(value, dict | list | tuple):
        raise UserError(f"{where}.{name}={text!r} is no single value")
    try:
        with node.unlocked():
            node[name] = tuple(value) if isinstance(old, tuple) and isinstance(value, list | tuple) else value
    except TypeError:
        raise wrong from None


def _same_kind(value: Any, old: Any, free: bool) -> bool:
    """Whether a field that holds `old` may become `value`; where a reader of its own checks the field, numbers of any type may."""
    if isinstance(old, tuple | list):
        return isinstance(value, tuple | list) or not free
    numbers = free and isinstance(old, int | float) and not isinstance(old, bool)
    return isinstance(value, int | float) if numbers else type(value) is type(old)


def _unknown(where: str, name: str, node: Any) -> None:
    keys = list(node)
    near = difflib.get_close_matches(name, keys, n=3, cutoff=0.4) or keys
    raise UserError(f"unknown config field {where}.{name}; near: {', '.join(f'{where}.{n}' for n in near)}")


def from_argv() -> dict[str, str]:
    """Takes the overrides out of sys.argv; call before the flags are parsed."""
    return take_overrides(sys.argv)
