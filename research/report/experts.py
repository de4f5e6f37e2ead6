"""Mixtures of experts in a report: the load of every expert over training as a heat map, the last numbers, and who is
dead.

Read from the rows of metrics.jsonl: "experts/LAYER/load" is a list, "experts/LAYER/NUMBER" a number.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PREFIX, LOAD = "experts/", "/load"
LAST = 0.25
"""Part of the logged lines, at its end, in which an expert without a single token is dead."""
LEAST = 3


def loads(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
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


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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
