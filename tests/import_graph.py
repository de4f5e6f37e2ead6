"""Which module imports which, read from the text of research/ and launch/."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module(path): path for package in ("research", "launch") for path in sorted((ROOT / package).rglob("*.py"))}
"""Module -> its file."""


@functools.cache
def imports(path: Path, *, late: bool, types: bool = True) -> tuple[str, ...]:
    """Returns what a file imports, each name of `from module import name` as `module.name` where that is a
    module.

    Args:
      path: of the file.
      late: also what it imports inside of functions, when they are called.
      types: also what it imports for type checkers alone.
    """
    found: list[str] = []
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = (f"{node.module}.{alias.name}" for alias in node.names)
            found += (name if name in FILES else node.module for name in full)
        in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if (late or not in_function) and (types or not for_types):
            waiting += ast.iter_child_nodes(node)
    return tuple(found)


def graph(*, late: bool) -> dict[str, set[str]]:
    """Returns module -> our modules that it imports, for type checkers too: those it names and the packages around
    these, but for the packages around itself."""
    found: dict[str, set[str]] = {}
    for module, path in FILES.items():
        named = [name.split(".") for name in imports(path, late=late)]
        run = {".".join(parts[:depth]) for parts in named for depth in range(1, len(parts) + 1)}
        found[module] = {name for name in run & FILES.keys() if not f"{module}.".startswith(f"{name}.")}
    return found
