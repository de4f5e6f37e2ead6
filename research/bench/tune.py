"""Measures the table that chooses implementations on a CPU: every implementation of an op, direction by direction, over
a grid of shapes.

A tuner is a function that yields (features of the shape, {direction: {implementation: call without arguments}}) and
registers itself in its own file. An implementation that cannot do a case is left out of it there.
"""

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.bench import run
from research.plugins import import_all
from research.report.tables import MADE_BY

COLUMNS = ("op", "direction", "at", "implementation", "ms")
SECONDS = 0.3  # of timed calls of one implementation in one direction

Row = dict[str, str]
Measured = tuple[Mapping[str, float], Mapping[str, Mapping[str, Callable[[], Any]]]]


Tuner = Callable[[], Iterator[Measured]]
_TUNERS: dict[str, Tuner] = {}


def register(op: str) -> Callable[[Tuner], Tuner]:
    """Makes what is decorated known as the tuner of an op."""

    def add(tuner: Tuner) -> Tuner:
        if op in _TUNERS:
            raise ValueError(f"op {op} has two tuners")
        _TUNERS[op] = tuner
        return tuner

    return add


def known() -> dict[str, Tuner]:
    """Op to its tuner, sorted."""
    import_all(__package__ or "")
    return dict(sorted(_TUNERS.items()))


def rows_of(op: str, at: Mapping[str, float], directions: Mapping[str, Mapping[str, Callable[[], Any]]]) -> list[Row]:
    """Times one point of the grid; a row a direction, its implementations from the fastest to the slowest."""
    rows = []
    for direction, calls in directions.items():
        times = {implementation: stats["median_ms"] for implementation, stats in run.timed(calls, SECONDS).items()}
        order = sorted(times, key=times.__getitem__)
        ms = " ".join(f"{implementation} {times[implementation]:.3g}" for implementation in order)
        where = " ".join(f"{key}={value:g}" for key, value in at.items())
        rows.append({"op": op, "direction": direction, "at": where, "implementation": order[0], "ms": ms})
    return rows


def write(table: Path, op: str, rows: Sequence[Row], command: str) -> None:
    """Replaces an op's rows, and the line that says how they were made; all other rows stay as they are. Atomic."""
    made, kept = _read(table) if table.exists() else ([], [])
    made = [line for line in made if f"--tune={op} " not in f"{line} "] + [f"{MADE_BY}{command}"]
    temporary = table.with_name(f".{table.name}.{os.getpid()}.tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in made)
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([row for row in kept if row["op"] != op] + list(rows))
    os.replace(temporary, table)


def _read(table: Path) -> tuple[list[str], list[Row]]:
    """Comment lines and rows."""
    lines = table.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    return comments, list(csv.DictReader(line for line in lines if not line.startswith("#")))
