"""Checks the shapes and types that annotations of arrays promise, at every call.

jaxtyping's import hook decorates every function and dataclass of the packages with `checked`, and binds the sizes that
one call's annotations name. `python -m tests.annotations` traces every model of the registry so, in small;
NESTAX_CHECK_ANNOTATIONS=1 has pytest run any tests so.
"""

import contextlib
import functools
import operator
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
from beartype import BeartypeConf, beartype

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [f"research.{path.parent.name}" for path in sorted(ROOT.glob("research/*/__init__.py"))]
"""All of them: names of new packages need no list."""
SWITCH = "NESTAX_CHECK_ANNOTATIONS"

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""As static checkers have it, an int is a float too."""
_raises = pytest.raises


def install() -> None:
    """Has everything that is imported from the packages from now on check its annotations."""
    jaxtyping.install_import_hook(PACKAGES, "tests.annotations.checked")
    pytest.raises = raises


def checked(function: Callable) -> Callable:
    """Returns the function with its annotations of arrays checked; all others are mypy's."""
    hints = getattr(function, "__annotations__", {})
    arrays = {name: _loose(hint) for name, hint in hints.items() if _holds_array(hint)}
    if not arrays:
        return function
    function.__annotations__ = arrays
    try:
        return _check(function)
    finally:
        function.__annotations__ = hints


@contextlib.contextmanager
def raises(*args: Any, **kwargs: Any):
    """`pytest.raises` with annotations unchecked: what is given wrong on purpose is for our own checks to refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with _raises(*args, **kwargs) as info:
            yield info
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _holds_array(hint: Any) -> bool:
    return _is_array(hint) or any(_holds_array(part) for part in typing.get_args(hint))


def _loose(hint: Any) -> Any:
    """The annotation with NumPy's arrays beside JAX's, whose functions take both."""
    if _is_array(hint):
        if hint.array_type is not jaxtyping.Array:
            return hint
        kind = getattr(jaxtyping, hint.__name__.split("[")[0])
        return kind[jaxtyping.Array | np.ndarray, hint.dim_str]
    if not _holds_array(hint):
        return hint
    parts = tuple(_loose(part) for part in typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return functools.reduce(operator.or_, parts)
    return hint.copy_with(parts) if hasattr(hint, "copy_with") else typing.get_origin(hint)[parts]


def trace_models() -> list[str]:
    """Traces the small twin of every model: training with its gradient and whatever implementation a platform may
    choose, evaluation by reference implementations, decoding; returns their names. Nothing is compiled."""
    import jax

    from research.models.base import ChoosesImplementations
    from research.models.sequence import SequenceConfig
    from research.modules.state import abstract
    from tests.models.twins import distinct_twins, images, loss

    names = []
    for config, own in distinct_twins().items():
        shapes, x = abstract(config), images(config)
        arrays = shapes.params, shapes.stats, x
        jax.eval_shape(jax.grad(functools.partial(loss, config)), *arrays)
        if isinstance(config, ChoosesImplementations):
            jax.eval_shape(functools.partial(loss, config.with_implementation("naive"), mode="eval"), *arrays)
        if isinstance(config, SequenceConfig) and not (config.vector_tokens or config.output_dim):
            jax.eval_shape(functools.partial(_decode, config), *arrays)
        names += own
    return names


def _decode(config, params, stats, tokens):
    from research.decode import models
    from research.decode.generate import generate

    functions = models.bind(config, params, stats, len(tokens), config.length)
    prompt, count = tokens[:, : config.length // 2], config.length // 2
    return generate(functions.prefill, functions.step, functions.state, prompt, num_tokens=count, temperature=0.0)


if __name__ == "__main__":
    import tests.annotations  # the hook finds `checked` by this name

    tests.annotations.install()
    print("\n".join(trace_models()))
