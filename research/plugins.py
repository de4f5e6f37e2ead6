"""Components that register themselves: those of a package are found by importing its files, a user's own by loading a
file."""

import functools
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path

from research.errors import UserError
from research.files import user_path


@functools.cache
def import_all(package: str) -> None:
    """Imports every file of a package, each of which registers what it holds."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")


def load(file: str) -> None:
    """Imports a user's own file, which registers models, mixers or other components; once, however often it is named.

    Raises:
      UserError: no such file, or one that cannot be imported.
    """
    path = Path(user_path(file)).resolve()
    name = f"plugin_{path.stem}"
    if not path.is_file():
        raise UserError(f"--plugin={file}: no such file")
    if (loaded := sys.modules.get(name)) is not None:
        if loaded.__file__ != str(path):
            raise UserError(f"--plugin={file} and {loaded.__file__} have the same name; rename one")
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin={file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        sys.modules.pop(name)
        raise
    except Exception as error:
        sys.modules.pop(name)
        line = next((f" in line {frame.lineno}" for frame in _frames(error) if frame.filename == str(path)), "")
        raise UserError(f"--plugin={file} cannot be imported{line}: {type(error).__name__}: {error}") from error


def _frames(error: BaseException) -> list:
    import traceback

    return list(reversed(traceback.extract_tb(error.__traceback__)))
