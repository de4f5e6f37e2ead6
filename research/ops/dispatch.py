"""How an op finds its implementation: an argument, else the platform that the program is compiled for, else a table by
shape.

The default back end is never read: an export for cuda from a CPU gets the cudan implementation. For CPU the table
`implementations.csv` names the fastest implementation at measured shapes; `launch.bench --tune=OP` makes its rows.
Other platforms get the implementation that each op gives as its `default`: products of matrices and no long sequential
loop.
"""

import csv
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax import lax

TABLE = Path(__file__).with_name("implementations.csv")


def resolve(implementation: str, op: str, valid: Sequence[str]) -> str:
    """The implementation that `implementation` asks for this op.

    Args:
      implementation: "auto" (by platform and shape), "cpu" (by shape, for a CPU: half the tracing of "auto"), one of
        `valid`, or a list for several ops, `"depthwise_conv2d=dft,grouped_matmul=naive"`, which leaves ops that it does
        not name at "auto" (an entry without `=` is for all).
      op: name of the op.
      valid: its own implementations.

    Raises:
      ValueError: for an implementation that is not valid.
    """
    if "=" in implementation or "," in implementation:
        entries = {}
        for entry in implementation.split(","):
            name, named, choice = entry.strip().partition("=")
            entries[name if named else ""] = choice if named else name
        implementation = entries.get(op, entries.get("", "auto"))
    if implementation not in ("auto", "cpu", *valid):
        raise ValueError(
            f"{op}: implementation is {implementation!r}; expected one of {', '.join(('auto', 'cpu', *valid))}"
        )
    return implementation


def per_platform(implementation: str, cpu: Callable[..., Any], default: Callable[..., Any], *operands: Any) -> Any:
    """Calls `cpu(*operands)` for implementation "cpu", else leaves it to the platform that the program is compiled
    for."""
    if implementation == "cpu":
        return cpu(*operands)
    return lax.platform_dependent(*operands, cpu=cpu, default=default)


def known(size: Any) -> bool:
    """Whether a size is a number: one that an exported program leaves open, such as its batch, is none until the
    program is called."""
    return isinstance(size, int)


@functools.cache
def _rows(op: str, direction: str) -> tuple[tuple[dict[str, float], str], ...]:
    with open(TABLE, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        found = [
            (row["at"], row["implementation"]) for row in rows if row["op"] == op and row["direction"] == direction
        ]
    if not found:
        raise LookupError(f"{TABLE.name} has no row for {op}, {direction}: make them by launch.bench --tune={op}")
    return tuple(
        ({key: float(value) for key, value in (pair.split("=") for pair in at.split())}, implementation)
        for at, implementation in found
    )


@functools.lru_cache(maxsize=4096)
def _nearest(op: str, direction: str, at: tuple[tuple[str, float], ...]) -> str:
    def distance(point: dict[str, float]) -> float:
        return sum((math.log2(value) - math.log2(point[key])) ** 2 for key, value in at)

    return min(_rows(op, direction), key=lambda row: distance(row[0]))[1]


def choose(op: str, direction: str = "forward", **at: float) -> str:
    """The implementation of the measured shape that is nearest, in the logarithms of the features `at`, on a CPU.

    Args:
      op: name of the op.
      direction: "forward", or the gradient with respect to something, e.g. "input_grad".
      at: positive features of the shape, e.g. pixels=196, taps=13; each is a key of the table's column `at`.
    """
    return _nearest(op, direction, tuple(sorted(at.items())))
