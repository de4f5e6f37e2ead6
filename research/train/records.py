"""What a run tells of an update: the line of metrics.jsonl, and the line that the terminal shows."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.models.base import ModelConfig
from research.modules.axes import role
from research.modules.state import abstract
from research.report.reading import read_journal


def of_update(
    losses: Sequence[tuple[str, Mapping[str, Any]]], measured: Mapping[str, Any], config: ModelConfig
) -> dict[str, Any]:
    """Returns the numbers of an update: means over its sub-networks, the loss of each (the mean, where it is drawn more
    than once), norms, and what layers log of themselves.

    Args:
      losses: (sub-network, its numbers) of every draw, on the host.
      measured: of the update program, on the host: "lr", "grad_norm", "finite", maybe "norms".
      config: of the full network.
    """
    named = {name: [v["loss"] for other, v in losses if other == name] for name, _ in losses}
    record: dict[str, Any] = {"loss": float(np.mean([v["loss"] for _, v in losses]))}
    record |= {k: float(np.mean([v[k] for _, v in losses])) for k in losses[0][1] if k not in ("loss", "logged")}
    record |= {"lr": float(measured["lr"]), "grad_norm": float(measured["grad_norm"])}
    record |= {f"loss/{name}": float(np.mean(values)) for name, values in named.items()}
    record |= {f"norm/{name}": float(value) for name, value in measured.get("norms", {}).items()}
    for values in (v["logged"] for _, v in losses if "logged" in v):
        record |= logged(config, values)
    if not measured["finite"]:
        record["skipped"] = 1
    return record


def logged(config: ModelConfig, values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns {"HEADING/LAYER/NAME": number or list} of the statistics that a network's modules declare for the log.

    Args:
      config: of the network; its `layer_labels` says what layers are called.
      values: of the statistics of kind LOG, on the host; those of stacked layers have an axis of layers in front.
    """
    full = abstract(config)
    out: dict[str, Any] = {}
    for name, value in values.items():
        log, path = full.logs[name], name.rpartition("/")[0]
        depth = sum(role(axis) == "layers" for axis in full.axes[name])
        labels = config.layer_labels(path, value.shape[:depth])
        for label, own in zip(labels, value.reshape(-1, *value.shape[depth:]).tolist(), strict=True):
            entries = {log.names: own} if isinstance(log.names, str) else dict(zip(log.names, own, strict=True))
            where = f"{log.heading}/{label}"
            if any(f"{where}/{entry}" in out for entry in entries):  # another module of the layer has these names
                where = f"{where}/{path}"
            out |= {f"{where}/{entry}": number for entry, number in entries.items()}
    return out


def evaluations(folder: Path, metric: str) -> dict[int, list[float]]:
    """Returns step -> the full network's values of a metric on validation, one for each evaluation that metrics.jsonl
    tells of."""
    key = f"validation/{metric}/full"
    found: dict[int, list[float]] = {}
    for row in read_journal(folder / "metrics.jsonl")[0]:
        if key in row and not isinstance(row[key], list):
            found.setdefault(row["step"], []).append(math.nan if row[key] is None else float(row[key]))
    return found


def progress(
    record: Mapping[str, float],
    headings: Mapping[str, str],
    rate: float,
    unit: str,
    mfu: float,
    eta: float,
    sure: bool = True,
) -> str:
    """Returns the line of the terminal.

    Args:
      record: of an update.
      headings: which of its numbers are shown beside the loss, and what they are called.
      rate: in `unit` a second.
      mfu: as a fraction.
      eta: in seconds.
      sure: whether it is measured without programs that compile beside.
    """
    measured = "".join(f"{text} {record[key]:.3f}  " for key, text in headings.items() if key in record)
    return (
        f"loss {record['loss']:.4f}  {measured}lr {record['lr']:.2e}  {rate:,.0f} {unit}/s  "
        f"MFU {100 * mfu:.1f} %  ETA {int(eta) // 60}:{int(eta) % 60:02d}{'' if sure else ' (rough)'}"
    )
