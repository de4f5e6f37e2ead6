"""What methods share that start from a trained network, their option `source`: a run, or a folder of weights."""

from collections.abc import Callable
from typing import Any

from research.errors import UserError
from research.files import user_path
from research.modules.state import Arrays
from research.train.extraction import load_model
from research.train.hooks import About


def check_source(method: str, source: str, about: About) -> None:
    """Judges whether a run says what it starts from, once; the network itself is opened when the run starts.

    Raises:
      UserError: no source, or another start beside it.
    """
    if not source:
        raise UserError(f"method {method} starts from a trained network; give its run: config.method.{method}.source")
    if init_from := about.config.train.init_from:
        raise UserError(f"method {method} starts from its source, not from train.init_from={init_from}; remove that")


def load_source(method: str, source: str, say: Callable[[str], None]) -> tuple[Any, Arrays, Arrays]:
    """Returns (config, params, stats) of the full network of a method's source.

    Raises:
      UserError: nothing usable there.
    """
    try:
        return load_model(str(user_path(source)), "full", say)
    except UserError as error:
        raise UserError(f"method.{method}.source={source}: {error}") from None
