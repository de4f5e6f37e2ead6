"""What a run's folder tells, as it is read: journals of one object of numbers a line, the report, the environment."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.errors import UserError
from research.files import printable, read_json, read_json_lines

SUBNET_COLUMNS = ("name", "value", "params", "flops", "latency_ms", "peak_memory_bytes")
RUN_FACTS = ("updates", "wall_s", "train_flops")
"""Numbers that the report of every run of ours has."""
REMEDY = "start the training again, which writes it anew"


def read_journal(path: str | os.PathLike) -> tuple[list[dict[str, Any]], int]:
    """Returns (the whole records of a journal, the number of lines that are none); no file: none.

    A last line without its end, cut by a kill, is left out and not counted.

    Raises:
      UserError: the file cannot be read.
    """
    rows, damaged = read_json_lines(path, ("step",))
    whole = [row for row in rows if _is_record(row)]
    return whole, damaged + len(rows) - len(whole)


def _is_record(row: dict[str, Any]) -> bool:
    step = row["step"]
    return isinstance(step, int) and not isinstance(step, bool) and step >= 0 and all(map(_is_number, row.values()))


def _is_number(value: Any) -> bool:
    """Whether a value is a number, null in place of NaN, or a list of them."""
    return value is None or isinstance(value, int | float) or (isinstance(value, list) and all(map(_is_number, value)))


def load_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The whole records of metrics.jsonl; none where there is no such file.

    Raises:
      UserError: the file cannot be read.
    """
    return read_journal(Path(workdir) / "metrics.jsonl")[0]


def read_report(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """The report.json of a run of ours; None where there is none yet, or a damaged one, which the same training writes
    anew."""
    try:
        report = load_report(Path(workdir))
    except UserError:
        return None
    return report if all(report.get(key) is not None for key in RUN_FACTS) else None


def read_environment(workdir: Path) -> Mapping[str, Any]:
    """What environment.json tells; nothing where it is missing or damaged, for the next start of the run writes it
    anew."""
    try:
        return mapping(read_json(workdir / "environment.json"))
    except UserError:
        return {}


def mapping(value: Any) -> Mapping[str, Any]:
    """Returns a value that is a mapping, nothing in place of any other."""
    return value if isinstance(value, Mapping) else {}


def check_report(report: Any) -> None:
    """Raises ValueError unless a report has its metric, sub-networks with names and values, and numbers where numbers
    belong."""
    if (
        not isinstance(report, Mapping)
        or not isinstance(report.get("metric"), str)
        or not isinstance(report.get("subnets"), list)
    ):
        found = sorted(report) if isinstance(report, Mapping) else type(report).__name__
        raise ValueError(f"a report needs 'metric' (a name) and 'subnets' (a list); this one has {found}")
    for subnet in report["subnets"]:
        if not isinstance(subnet, Mapping) or not isinstance(subnet.get("name"), str) or "value" not in subnet:
            found = sorted(subnet) if isinstance(subnet, Mapping) else type(subnet).__name__
            raise ValueError(f"a sub-network of a report needs 'name' and 'value'; this one has {found}")
        if wrong := [key for key in SUBNET_COLUMNS[1:] if not isinstance(subnet.get(key), int | float | None)]:
            raise ValueError(f"{wrong[0]!r} of a sub-network of a report is no number")
    if not all(isinstance(report.get(key), int | float | None) for key in RUN_FACTS):
        raise ValueError(f"one of {', '.join(RUN_FACTS)} of a report is no number")
    names = [subnet["name"] for subnet in report["subnets"]]
    if len(set(names)) < len(names):
        raise ValueError(f"two sub-networks of a report carry one name: {sorted(names)}")


def load_report(workdir: Path) -> dict[str, Any]:
    """Returns the report.json of a run, or raises UserError: none there, or a damaged one."""
    path = workdir / "report.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no report.json: the run has not finished, or this is not a run directory")
    report = read_json(path, ("metric", "subnets"), REMEDY)
    try:
        check_report(report)
    except ValueError as error:
        raise UserError(f"{path}: {printable(error, 300)}") from None
    if not report["subnets"]:
        raise UserError(f"{path} has no sub-networks; {REMEDY}")
    return report
