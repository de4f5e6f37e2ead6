"""Judges reports of runs by the acceptance criteria of a recipe, `expect`."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import UserError
from research.report.columns import VALUE, declared, higher_is_better
from research.report.logs import base as logs
from research.report.tables import is_finite


def measures(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the figures that an acceptance criterion can name, over the reports of several seeds (see
    `launch.reproduce`); of the full network's columns of numbers the means.

    Raises:
      UserError: a network's value is no number, or there was no split to measure it on.
    """
    missing = [n["name"] for r in reports for n in r["subnets"] if n["value"] is None]
    if missing:
        raise UserError(
            f"{reports[0]['metric']} of {missing[0]} is no number or was not measured, so no criterion can be judged"
        )
    full = [r["subnets"][0] for r in reports]
    higher = higher_is_better(reports[0])
    ratio = lambda n, first: n["value"] / first["value"] if higher else first["value"] / n["value"]
    shares = [ratio(n, r["subnets"][0]) for r in reports for n in r["subnets"]]
    least = [min(n["flops"] for n in r["subnets"]) / r["subnets"][0]["flops"] for r in reports]
    columns = [key for key in full[0] if key != VALUE and all(is_finite(n.get(key)) for n in full)]
    return {
        **{key: float(np.mean([n[key] for n in full])) for key in columns},
        "full": float(np.mean([n["value"] for n in full])),
        "full_least": float((min if higher else max)(n["value"] for n in full)),
        "mean": float(np.mean([n["value"] for r in reports for n in r["subnets"]])),
        "smallest_share": float(min(shares)),
        "smallest_flops": float(max(least)),
        "networks": float(min(len(r["subnets"]) for r in reports)),
        "wall_s": float(max(r["wall_s"] for r in reports)),
        **{name: float(max(r[name] for r in reports)) for name in logs.counts() if name in reports[0]},
    }


def by_network(reports: Sequence[Mapping[str, Any]], seeds: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row per network: its costs in the first run, its value in each and their mean, as text."""
    rows, text = [], declared(reports[0])[VALUE].shown
    for i, first in enumerate(reports[0]["subnets"]):
        values = [r["subnets"][i]["value"] for r in reports]
        row = {k: first[k] for k in ("name", "params", "flops", "latency_ms") if k in first}
        row |= {f"seed {seed}": text(value) for seed, value in zip(seeds, values, strict=True)}
        rows.append(row | ({"mean": text(np.mean(values))} if len(values) > 1 else {}))
    return rows


NAMES = ("full", "full_least", "mean", "smallest_share", "smallest_flops", "networks", "wall_s")
"""What an acceptance criterion can name of every run, beside the counts of `research.report.logs` and the columns of
its report."""


def directions(reports: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Returns figure -> whether a larger one is better, of those of `measures` that have a better direction."""
    own = {name: c.higher_is_better for name, c in declared(reports[0]).items() if c.higher_is_better is not None}
    value = higher_is_better(reports[0])
    found = own | dict.fromkeys(("full", "full_least", "mean"), value) | {"smallest_share": True, "networks": True}
    return found | {"smallest_flops": False, "wall_s": False} | dict.fromkeys(logs.counts(), False)


def check_criteria(expect: Mapping[str, Any], columns: Iterable[str]) -> None:
    """Raises UserError, before any run is trained, for an acceptance criterion whose name is nearly that of another.

    Which columns a report will have is not known in full before there is one: other names are judged then.

    Args:
      columns: those that are known.
    """
    valid = (*NAMES, *logs.counts(), *columns)
    for name in expect:
        if name not in valid and difflib.get_close_matches(name, valid, cutoff=0.8):
            raise UserError(f"expect: unknown acceptance criterion {name!r}; valid: {', '.join(valid)}")


def judge(found: Mapping[str, float], expect: Mapping[str, Any], higher: Mapping[str, bool]) -> list[dict[str, Any]]:
    """Returns a row per acceptance criterion: {"criterion", "expected", "found", "met"}.

    Args:
      found: see `measures`.
      expect: figure -> (least, most), either may be None, or a single number: the worst that will do.
      higher: see `directions`.

    Raises:
      UserError: an acceptance criterion about something that is not measured, or a single number where neither
        direction is the better one.
    """
    rows = []
    for name, bound in expect.items():
        if name not in found:
            raise UserError(f"expect: unknown acceptance criterion {name!r}; valid: {', '.join(found)}")
        if not isinstance(bound, list | tuple) and name not in higher:
            raise UserError(f"expect: {name}={bound} says not which way is better; give (least, most), one may be None")
        low, high = bound if isinstance(bound, list | tuple) else (bound, None) if higher[name] else (None, bound)
        met = (low is None or found[name] >= low) and (high is None or found[name] <= high)
        text = " and ".join(
            t
            for t in (f"at least {low:g}" if low is not None else "", f"at most {high:g}" if high is not None else "")
            if t
        )
        rows.append(
            {"criterion": name, "expected": text, "found": round(found[name], 4), "met": "yes" if met else "NO"}
        )
    return rows
