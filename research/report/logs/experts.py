"""Mixtures of experts in a report: the load of every expert over training as a heat map, the last numbers, and who is
dead.

Read from the rows of metrics.jsonl: "experts/LAYER/load" is a list, "experts/LAYER/NUMBER" a number.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from research.report import plots, tables
from research.report.logs.base import LogReader, Rows, register

PREFIX, LOAD = "experts/", "/load"
LAST = 0.25
"""Part of the logged lines, at its end, in which an expert without a single token is dead."""
LEAST = 3


def loads(rows: Rows) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns layer -> (steps [S], load [S, E]: share of the tokens that chose each expert)."""
    layers = dict.fromkeys(
        key[len(PREFIX) : -len(LOAD)] for row in rows for key in row if key.startswith(PREFIX) and key.endswith(LOAD)
    )
    out = {}
    for layer in layers:
        found = [
            (row["step"], row[PREFIX + layer + LOAD])
            for row in rows
            if isinstance(row.get(PREFIX + layer + LOAD), list)
        ]
        found = [
            (step, load)
            for step, load in found
            if len(load) == len(found[-1][1]) and not any(isinstance(x, list) for x in load)
        ]
        if not found:
            continue
        out[layer] = np.array([step for step, _ in found]), np.array([load for _, load in found], float)
    return out


def dead(load: np.ndarray) -> list[int]:
    """Returns the experts that took no token in the last quarter of the lines [S, E]; nobody where there are fewer than
    `LEAST` lines."""
    last = load[-max(LEAST, math.ceil(LAST * len(load))) :]
    return [] if len(last) < LEAST else [int(e) for e in np.flatnonzero(~(last > 0).any(0))]


def summary(rows: Rows) -> list[dict[str, Any]]:
    """Returns a row per layer: the last of each of its numbers, least and largest load relative to uniform, and its
    dead experts."""
    out = []
    for layer, (_, load) in loads(rows).items():
        prefix = f"{PREFIX}{layer}/"
        numbers = {
            k[len(prefix) :]: v
            for row in rows
            for k, v in row.items()
            if k.startswith(prefix) and not isinstance(v, list)
        }
        even = load[-1].mean() or 1.0
        out.append(
            {
                "layer": layer,
                "experts": load.shape[1],
                "least load": float(load[-1].min() / even),
                "largest load": float(load[-1].max() / even),
                **{k: v for k, v in numbers.items() if k != "max_load"},
                "dead": ", ".join(map(str, dead(load))) or "none",
            }
        )
    return out


@register
class Experts(LogReader):
    """The reader of what `research.modules.moe` logs."""

    heading = "experts"
    files = ("experts.png",)
    counts = ("dead_experts",)

    def facts(self, rows: Rows) -> dict[str, Any]:
        """Returns {"dead_experts": how many, in all layers}."""
        layers = _dead(rows)
        return {"dead_experts": sum(map(len, layers.values()))} if layers else {}

    def remarks(self, rows: Rows) -> list[str]:
        return [
            f"experts of {layer} that got no token in the last quarter of the log: {', '.join(map(str, names))}"
            for layer, names in _dead(rows).items()
            if names
        ]

    def figures(self, rows: Rows) -> dict[str, Callable[[Path], object]]:
        panels = {
            layer: (steps, load / np.maximum(load.mean(1, keepdims=True), 1e-20))
            for layer, (steps, load) in loads(rows).items()
        }
        if not panels:
            return {}
        draw: Callable[[Path], object] = lambda path: plots.heat_maps(
            path, panels, title="Load of the experts", ylabel="load relative to uniform"
        )
        return {"experts.png": draw}

    def sections(self, rows: Rows) -> list[str]:
        table = summary(rows)
        if not table:
            return []
        words = (
            "Of the last logged batch; load relative to uniform, entropy of the load in nats; dead: "
            "no token in the last quarter of the log."
        )
        return [
            f"## Experts\n\n{tables.markdown_table(table, list(table[0]))}",
            f"{words}\n",
            "![Load of the experts](experts.png)\n",
        ]


def _dead(rows: Rows) -> dict[str, list[int]]:
    """Returns layer -> its dead experts."""
    return {layer: dead(load) for layer, (_, load) in loads(rows).items()}
