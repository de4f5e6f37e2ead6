"""What a sweep over the values of some fields is made of: its points, the names of their folders, and the tables of
what they gave."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from research.errors import UserError
from research.report.columns import VALUE, declared
from research.report.logs import base as logs
from research.report.tables import is_finite

Point = dict[str, str]
LONGEST = 120
"""Characters of a folder's name."""
COSTS = ("params", "state", "flops", "wall_s")
"""Columns whose spread over seeds says nothing."""


def axes(texts: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Reads FIELD=VALUE,VALUE,... texts: [(field, values)]; commas inside brackets belong to a value, as do all where
    ';' separates.

    Raises:
      UserError: no values, or a field or a value that is there twice.
    """
    out: list[tuple[str, list[str]]] = []
    for text in texts:
        field, _, values = text.partition("=")
        if not field or not values:
            raise UserError(f"--grid={text} is no FIELD=VALUE,VALUE,...; e.g. --grid=model.dim=32,64")
        parts = values.split(";") if ";" in values else _outside_brackets(values)
        if twice := [part for part in parts if parts.count(part) > 1]:
            raise UserError(f"--grid={text} has the value {twice[0]!r} twice")
        if field in dict(out):
            raise UserError(f"--grid names {field} twice; give all its values at once")
        out.append((field, parts))
    return out


def _outside_brackets(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def points(grid: Sequence[tuple[str, Sequence[str]]]) -> list[Point]:
    """Returns every combination of the fields' values, the last field changing fastest."""
    fields = [field for field, _ in grid]
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*(values for _, values in grid))]


def folder_name(point: Mapping[str, str]) -> str:
    """Returns FIELD=VALUE_FIELD=VALUE of a point, a function of it alone; blanks are dashes.

    Where other characters do not suit a folder, or the name is too long, a digest of the values tells it from its like.
    """
    plain = "_".join(f"{field}={value}" for field, value in point.items()).replace(" ", "-")
    safe = re.sub(r"[^A-Za-z0-9_.,+=-]", "-", plain)
    if safe == plain and len(safe) <= LONGEST:
        return safe
    return f"{safe[:LONGEST]}.{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def former_name(point: Point) -> str:
    """Returns the name that earlier versions gave a point's folder, its values alone."""
    return "_".join(value.replace(" ", "-") for value in point.values())


def default_x(grid: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Returns what a sweep is drawn against: its first field of numbers other than the seed, else the number of
    parameters."""
    return next(
        (field for field, values in grid if field not in ("seed", "arg") and all(map(_is_number, values))), "params"
    )


def _is_number(text: str) -> bool:
    try:
        return is_finite(float(text))
    except ValueError:
        return False


def row(point: Point, report: Mapping[str, Any], columns: Sequence[str] = ()) -> dict[str, Any]:
    """Returns a finished point's line: its costs, its value, and what else was measured and has a better direction.

    Args:
      columns: further ones of the full network's.

    Raises:
      UserError: the report has no numbers of that name.
    """
    full = report["subnets"][0]
    costs = {key: full[key] for key in COSTS if key in full}
    numbers = [key for key, value in full.items() if is_finite(value) and key != VALUE]
    for name in columns:
        if name not in numbers:
            raise UserError(f"the report has no column of numbers {name!r}; valid: {', '.join(numbers)}")
    judged = [name for name, column in declared(report).items() if column.higher_is_better is not None]
    more = {key: full[key] for key in full if key in columns or (key in judged and key != VALUE)}
    more |= {key: report[key] for key in logs.counts() if key in report}
    return {**point, **costs, "value": full["value"], **more, "updates": report["updates"], "wall_s": report["wall_s"]}


def over_seeds(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a line for the points that differ in nothing but the seed: the number of seeds, means, and "+- KEY", the
    largest distance.

    A point without a number, because it failed, does not count; [] where there are no seeds.

    Args:
      rows: lines of points, as of `row`.
      fields: those of the grid.
    """
    if "seed" not in fields:
        return []
    places = [field for field in fields if field != "seed"]
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for line in rows:
        groups.setdefault(tuple(line[field] for field in places), []).append(line)
    out = []
    for place, group in groups.items():
        whole = [line for line in group if is_finite(line.get("value"))]
        mean: dict[str, Any] = dict(zip(places, place, strict=True)) | {"seeds": len(whole)}
        for key in dict.fromkeys(key for line in whole for key in line if key not in (*fields, "updates")):
            values = [float(line[key]) for line in whole if is_finite(line.get(key))]
            if len(values) < len(whole):
                continue
            mean[key] = sum(values) / len(values)
            if key not in COSTS:
                mean[f"+- {key}"] = max(abs(value - mean[key]) for value in values)
        out.append(mean)
    return out
