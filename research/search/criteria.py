"""Judges reports of runs by the acceptance criteria of a recipe, `expect`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import UserError
from research.report.logs import base as logs
from research.report.run_card import higher_is_better


def measures(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the figures that an acceptance criterion can name, over the reports of several seeds (see
    `launch.reproduce`).

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
    return {
        "full": float(np.mean([n["value"] for n in full])),
        "full_least": float((min if higher else max)(n["value"] for n in full)),
        "mean": float(np.mean([n["value"] for r in reports for n in r["subnets"]])),
        "smallest_share": float(min(shares)),
        "smallest_flops": float(max(least)),
        "networks": float(min(len(r["subnets"]) for r in reports)),
        "wall_s": float(max(r["wall_s"] for r in reports)),
        **{
            key: float(np.mean([n[key] for n in full]))
            for key in full[0]
            if key.startswith("robust_") or key.endswith("accuracy")
        },
        **{name: float(max(r[name] for r in reports)) for name in logs.counts() if name in reports[0]},
    }


def by_network(reports: Sequence[Mapping[str, Any]], seeds: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row per network: its costs in the first run, its value in each and their mean, as text; accuracies in
    percent."""
    rows, percent = [], "accuracy" in reports[0]["metric"]
    text = lambda value: f"{100 * value:.1f}" if percent else f"{value:.4f}"
    for i, first in enumerate(reports[0]["subnets"]):
        values = [r["subnets"][i]["value"] for r in reports]
        row = {k: first[k] for k in ("name", "params", "flops", "latency_ms") if k in first}
        row |= {f"seed {seed}": text(value) for seed, value in zip(seeds, values, strict=True)}
        rows.append(row | ({"mean": text(np.mean(values))} if len(values) > 1 else {}))
    return rows


NAMES = (
    "full",
    "full_least",
    "mean",
    "smallest_share",
    "smallest_flops",
    "networks",
    "wall_s",
    "robust_ATTACK",
    "accuracy",
)
"""What an acceptance criterion can name, beside the counts of `research.report.logs`; accuracies of other names end in
it."""


def check_criteria(expect: Mapping[str, Any]) -> None:
    """Raises UserError for an acceptance criterion that no run could be judged by, before any is trained."""
    valid = (*NAMES, *logs.counts())
    for name in expect:
        if name not in valid and not name.startswith("robust_") and not name.endswith("accuracy"):
            raise UserError(f"expect: unknown acceptance criterion {name!r}; valid: {', '.join(valid)}")


def judge(found: Mapping[str, float], expect: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a row per acceptance criterion: {"criterion", "expected", "found", "met"}.

    Raises:
      UserError: an acceptance criterion about something that is not measured.
    """
    rows = []
    for name, bound in expect.items():
        if name not in found:
            raise UserError(f"expect: unknown acceptance criterion {name!r}; valid: {', '.join(found)}")
        low, high = bound if isinstance(bound, list | tuple) else (bound, None)
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
