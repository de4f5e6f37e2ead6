"""Foreign arrays and ours: a table, made from a model's config, says of which of our arrays each foreign one is made,
and how.

Both directions and the report read the same table.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.files import printable
from research.interop.array_values import check_values
from research.modules.state import Arrays, abstract


class Layout(NamedTuple):
    """How an array of ours and its part of a foreign one are laid out, and along which axis foreign parts follow each
    other."""

    foreign: Callable[[np.ndarray], np.ndarray]
    ours: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    axis: int = 0


LAYOUTS = {
    "same": Layout(lambda w: w, lambda w, shape: w),
    "flat": Layout(lambda w: w.reshape(-1), lambda w, shape: w.reshape(shape)),
    "linear": Layout(lambda w: w.reshape(w.shape[0], -1).T, lambda w, shape: w.T.reshape(shape)),
    "out": Layout(lambda w: w.reshape(-1, w.shape[-1]).T, lambda w, shape: w.T.reshape(shape)),
    "conv": Layout(lambda w: w.reshape(w.shape[0], -1).T[:, None], lambda w, shape: w[:, 0].T.reshape(shape)),
    "experts": Layout(lambda w: w.swapaxes(1, 2), lambda w, shape: w.swapaxes(1, 2), 1),
}
"""Name -> ours to foreign and back: as it is; vectors; (in, *outs) and (*ins, out) to (out, in); (taps, *C) to (C, 1,
taps); (experts, in, out) to (experts, out, in)."""


class Entry(NamedTuple):
    """A foreign array and ours that follow each other in it; `index`: which entry of the first axes of ours (layer,
    expert)."""

    foreign: str
    ours: tuple[str, ...]
    layout: str
    index: tuple[int, ...] = ()  # type: ignore[assignment]  # in place of a tuple's method of this name


@dataclass(frozen=True)
class Report:
    """What fitted and what did not: foreign names that are missing or unknown, and (name, found, expected) shapes.

    `repeated` is the output head that a file of a tied model holds beside the embedding, bit for bit the same.
    """

    matched: int = 0
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    repeated: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Shapes = Mapping[str, tuple[int, ...]]


def _parts(entry: Entry, shapes: Shapes) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(our name, shape of one layer or expert of ours, shape of its part of the foreign array) of an entry."""
    parts = []
    for name in entry.ours:
        shape = tuple(shapes[name])[len(entry.index) :]
        parts.append((name, shape, LAYOUTS[entry.layout].foreign(np.broadcast_to(np.float32(0), shape)).shape))
    return parts


def _foreign_shape(entry: Entry, shapes: Shapes) -> tuple[int, ...]:
    parts, axis = [list(foreign) for _, _, foreign in _parts(entry, shapes)], LAYOUTS[entry.layout].axis
    parts[0][axis] = sum(shape[axis] for shape in parts)
    return tuple(parts[0])


def match(
    table: Iterable[Entry], shapes: Shapes, found: Mapping[str, Sequence[int]], optional: Iterable[str] = ()
) -> Report:
    """Compares the names and shapes of a foreign state dict with those of a table.

    Args:
      table: of the model.
      shapes: of our arrays.
      found: of the foreign ones.
      optional: foreign names that may be there and are then called `repeated`.
    """
    expected = {entry.foreign: _foreign_shape(entry, shapes) for entry in table}
    missing = tuple(name for name in expected if name not in found)
    wrong = tuple((n, tuple(found[n]), s) for n, s in expected.items() if n in found and tuple(found[n]) != s)
    repeated = tuple(name for name in optional if name in found)
    unexpected = tuple(name for name in found if name not in expected and name not in repeated)
    return Report(len(expected) - len(missing) - len(wrong), missing, unexpected, wrong, repeated)


def fill_model(
    source: str,
    config: Any,
    table: Sequence[Entry],
    state: Mapping[str, np.ndarray],
    *,
    repeats: Mapping[str, str],
    dtype: Any = np.float32,
) -> tuple[Arrays, Arrays, Report]:
    """Returns (params, stats, report) of a language model; statistics, which foreign files do not hold, are zeros.

    Args:
      source: the name of the foreign layout, for errors.
      config: of our model.
      table: of its arrays.
      state: foreign name -> array.
      repeats: foreign names that may be there as well -> the array that they must then be equal to.
      dtype: of the returned parameters.

    Raises:
      UserError: arrays that are missing, unknown or of another shape, values as `check_values`, or an output head that
        differs from the embedding it is tied to.
    """
    full = abstract(config)
    shapes = {name: s.shape for name, s in full.params.items()}
    report = match(table, shapes, {name: w.shape for name, w in state.items()}, repeats)
    sizes = f"{config.pattern}, {config.depth} layers of {config.dim} channels, {config.vocab_size} entries"
    check(report, f"{source}: the weights do not fit their config ({sizes})")
    for name in report.repeated:
        if not np.array_equal(state[name], state[repeats[name]], equal_nan=True):
            raise UserError(
                f"{source}: the config ties the embedding to {name}, but the file holds two that differ; "
                "say that it is not tied"
            )
    check_values(source, {entry.foreign: state[entry.foreign] for entry in table})
    stats = {name: jnp.zeros(s.shape, s.dtype) for name, s in full.stats.items()}
    return from_foreign_arrays(table, shapes, state, dtype), stats, report


def check(report: Report, what: str) -> None:
    """Raises UserError with the names that are missing, unknown or of another shape, if any."""
    wrong = [f"{printable(name)} is {found}, needs {needed}" for name, found, needed in report.wrong_shape]
    missing, unknown = (list(map(printable, names)) for names in (report.missing, report.unexpected))
    named = (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
    parts = [
        f"{len(names)} {which} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for which, names in named
        if names
    ]
    if parts:
        raise UserError(f"{what}: {'; '.join(parts)}")


def from_foreign_arrays(
    table: Iterable[Entry], shapes: Shapes, state: Mapping[str, np.ndarray], dtype: Any = np.float32
) -> Arrays:
    """Returns our arrays, in the order of `shapes`, of a state dict that `match` found to fit."""
    filled = {name: _empty(shape, dtype) for name, shape in shapes.items()}
    for entry in table:
        layout, whole, at = LAYOUTS[entry.layout], np.asarray(state[entry.foreign]), 0
        for name, shape, foreign in _parts(entry, shapes):
            part = whole[(slice(None),) * layout.axis + (slice(at, at + foreign[layout.axis]),)]
            filled[name][entry.index] = layout.ours(part, shape)
            at += foreign[layout.axis]
    return {name: jnp.asarray(filled.pop(name)) for name in shapes}


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that begins at a multiple of 64 bytes: a JAX on the CPU takes it as it is, where it would copy
    others."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def to_foreign_arrays(table: Iterable[Entry], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_foreign_arrays`: foreign name -> array, in the order of the table; views of ours where none
    are joined."""
    arrays, state = {name: np.asarray(w) for name, w in params.items()}, {}
    for entry in table:
        layout = LAYOUTS[entry.layout]
        parts = [layout.foreign(arrays[name][entry.index]) for name in entry.ours]
        state[entry.foreign] = np.concatenate(parts, layout.axis) if len(parts) > 1 else parts[0]
    return state
