"""Whether a directory holds the result that a command asks for: commands that train only what is missing go by this
alone."""

import os
from pathlib import Path
from typing import Any

from research.errors import UserError
from research.files import read_json
from research.report.reading import read_report
from research.train.config import differences
from research.train.method_registry import find
from research.train.rundir import read_config
from research.train.used import ignored

OF_REPORT = ("latency", "latency_batches", "test")
"""Fields of the section `report` that decide what a report holds."""


def measured_by(config: dict[str, Any]) -> dict[str, Any]:
    """Returns what decides what a report of a resolved config holds: fields of `report`, and methods that change the
    report alone with their options."""
    methods = {f"method.{name}": config["method"][name] for name in config["methods"] if find(name).reports}
    return methods | {f"report.{field}": config["report"][field] for field in OF_REPORT}


def finished(workdir: str | os.PathLike[str], config: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the report of the run of a config in a directory; None where it has not ended, and training is to start
    or continue.

    A report that is damaged, or asks for other measurements, counts as none: training continues at its end and makes it
    anew.

    Args:
      config: resolved.

    Raises:
      UserError: the directory holds a run of another config.
    """
    folder = Path(workdir)
    if not (folder / "config.json").is_file():
        return None
    old = read_config(folder)
    if changed := differences(old, config, ignored=ignored(old, config)):
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"{workdir} holds a run of another config ({changed[0]}{more}); give another --workdir, or delete it"
        )
    if measured_by(old) != measured_by(config):
        return None
    try:
        report = read_report(folder)
        status = (
            read_json(folder / "status.json", ("state",))
            if (folder / "status.json").exists()
            else {"state": "finished"}
        )
    except UserError:
        return None
    whole = (folder / "pareto.png").is_file()  # older versions wrote it after the report
    return report if report and whole and status["state"] == "finished" and report["subnets"] else None
