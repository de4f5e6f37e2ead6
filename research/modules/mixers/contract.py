"""Whether a mixer keeps its contract, told from shapes alone before anything is trained: the methods that generation
calls are there, and states have the same structure wherever they come from."""

import contextlib
import functools
import inspect
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from research.errors import UserError
from research.files import printable
from research.modules.axes import Init
from research.modules.mixers.base import Call, Spec
from research.modules.state import split

FORMS = {
    "__call__": ("x", "call", "state"),
    "step": ("x", "call", "state"),
    "init_state": ("batch", "capacity", "dtype"),
}
"""Method of a mixer -> its arguments, which are given in this order."""
BATCH, TOKENS = 2, 3


@functools.lru_cache(maxsize=256)
def check(spec: Spec, dim: int, length: int) -> None:
    """Judges a mixer by the shapes of what it computes, once for equal arguments; no array is made.

    Args:
      spec: its options, every size filled in.
      dim: channels of the model.
      length: most tokens of the model.

    Raises:
      UserError: a method is missing, fails or takes other arguments, an array has no entry, or an output or a state has
        another structure, shape or dtype than it should.
    """
    with _told(spec, f"{type(spec).__name__}.shrink"), contextlib.suppress(UserError):
        small = spec.shrink(1.0, None, None)
        if type(small) is not type(spec):
            raise TypeError(f"returns {_shown(small)}; wanted: a {type(spec).__name__}, as replace(self, ...) gives")
    jax.eval_shape(lambda key: _judge(spec, key, dim, length), jax.eval_shape(lambda: jax.random.key(0)))


def _judge(spec: Spec, key: Array, dim: int, length: int) -> None:
    with _told(spec, f"{type(spec).__name__}.build"):
        mixer = spec.build(dim, length, "layer/mixer", Init(key), "cpu")
        if not isinstance(mixer, nnx.Module):
            raise TypeError(f"returns {_shown(mixer)}; wanted: the mixer, an nnx.Module")
    _check_arrays(spec, mixer)
    _check_methods(spec, mixer)
    name, tokens = type(mixer).__name__, min(TOKENS, length)
    x, ids = jnp.zeros((BATCH, tokens, dim)), jnp.zeros((BATCH, tokens), jnp.int32)
    with _told(spec, f"{name}.__call__"):
        y, after = _pair(spec, f"{name}.__call__", mixer(x, Call("train", key, ids, tokens=ids), None))
    _same(spec, f"{name}.__call__ returns y", y, "as x is", x)
    if spec.sees_later():
        return  # no state carries it on
    with _told(spec, f"{name}.init_state"):
        state = mixer.init_state(BATCH, tokens, x.dtype)
    _same(spec, f"{name}.__call__ returns the state", after, "as init_state gives", state)
    for method, form, own_x, own_ids in (("__call__", mixer, x, ids), ("step", mixer.step, x[:, 0], ids[:, 0])):
        call = Call(position=jnp.int32(0), tokens=own_ids, carried=True)
        with _told(spec, f"{name}.{method} from a state"):
            y, after = _pair(spec, f"{name}.{method}", form(own_x, call, state))
        _same(spec, f"{name}.{method} from a state returns y", y, "as x is", own_x)
        _same(spec, f"{name}.{method} from a state returns the state", after, "as it was given", state)


def _check_arrays(spec: Spec, mixer: Any) -> None:
    _, params, stats, _ = split(mixer)
    empty = next((name for name, array in {**params, **stats}.items() if 0 in array.shape), None)
    if empty is not None:
        zero = ", ".join(f"{field}=0" for field, value in vars(spec).items() if value == 0 and value is not False)
        because = f" with {zero}" if zero else ""
        raise UserError(
            f"mixer {spec.kind}: {empty} of {type(mixer).__name__} would have no entry{because};"
            f" wanted: {type(spec).__name__}.resolve(dim) that fills in every size ({_file(spec)})"
        )


def _check_methods(spec: Spec, mixer: Any) -> None:
    for method, arguments in FORMS.items():
        told = f"{method}({', '.join(arguments)})"
        if method not in dir(type(mixer)):
            raise UserError(f"mixer {spec.kind}: {type(mixer).__name__} has no {told} ({_file(spec)})")
        signature = inspect.signature(inspect.getattr_static(type(mixer), method))
        try:
            signature.bind(mixer, *arguments)
        except TypeError:
            own = f"{method}({', '.join(str(p) for p in list(signature.parameters.values())[1:])})"
            raise UserError(
                f"mixer {spec.kind}: {type(mixer).__name__} has {own}; wanted: {told} ({_file(spec)})"
            ) from None


def _pair(spec: Spec, what: str, given: Any) -> tuple[Any, Any]:
    if not isinstance(given, tuple) or len(given) != 2:
        raise UserError(f"mixer {spec.kind}: {what} returns {_shown(given)}; wanted: a pair (y, state) ({_file(spec)})")
    return given


def _same(spec: Spec, what: str, found: Any, how: str, wanted: Any) -> None:
    """Raises UserError unless two trees of arrays have the same structure, shapes and dtypes."""
    if (given := _shown(found)) != (expected := _shown(wanted)):
        raise UserError(f"mixer {spec.kind}: {what} {given}; wanted, {how}: {expected} ({_file(spec)})")


def _shown(tree: Any) -> str:
    """The arrays of a tree in words: their places, dtypes and shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    plain = [isinstance(leaf, jax.Array) for _, leaf in leaves]
    parts = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.dtype}{list(leaf.shape)}".strip()
        if array
        else f"a {type(leaf).__name__}"
        for (path, leaf), array in zip(leaves, plain, strict=True)
    ]
    told = ", ".join(parts) or "nothing"
    return told if isinstance(tree, jax.Array) else f"{type(tree).__name__}({told})"


@contextlib.contextmanager
def _told(spec: Spec, what: str) -> Iterator[None]:
    """Makes one line of what a method of the mixer raises, with the line of the mixer's file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames = reversed(traceback.extract_tb(error.__traceback__))
        line = next((f":{frame.lineno}" for frame in frames if frame.filename == _file(spec)), "")
        told = printable((str(error).strip().splitlines() or [""])[0], 500)
        raise UserError(
            f"mixer {spec.kind}: {what} fails: {type(error).__name__}: {told} ({_file(spec)}{line})"
        ) from error


def _file(spec: Spec) -> str:
    """Where the mixer is defined; a notebook has no file."""
    return str(vars(sys.modules[type(spec).__module__]).get("__file__", type(spec).__module__))
