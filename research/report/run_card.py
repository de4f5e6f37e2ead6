"""The run card: what a finished run leaves for people and machines, and the comparison of several runs.

`write_report` writes report.json, report.md and pareto.png (and the figures of `research.report.logs`) into a run's
directory; `compare` joins several directories. A report is a dict of plain values:

    {"metric": "accuracy", "subnets": [{"name", "value", "params", "flops", "latency_ms", "peak_memory_bytes"}, ...],
     "wall_s", "compile_s", "mfu", ...}

`metric` and the name and value of each sub-network are needed; the rest may be absent or None. Also understood:
"title", "command", "full" (name of the full network; by default the one with the most parameters), "higher_is_better"
(which every report of today says; of older ones it is read off the metric's name), "next" (commands that continue from
the run; by default those for its networks). Any other number or string is listed as a fact of the run.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.errors import UserError
from research.files import read_json, whole_folder, write_text
from research.report import plots, tables
from research.report.columns import higher_is_better
from research.report.logs import base as logs
from research.report.machine import command_line
from research.report.reading import (
    SUBNET_COLUMNS,
    check_report,
    load_metrics,
    load_report,
    mapping,
    read_environment,
    read_journal,
    read_report,
)

REPORT = "report.json"
FACT_NAMES = {"wall_s": "wall time", "compile_s": "of it compiling", "mfu": "model FLOPs utilisation"}

PathLike = str | os.PathLike

__all__ = ["against", "compare", "higher_is_better", "load_metrics", "plot_comparison", "read_report", "write_report"]


def write_report(workdir: PathLike, report: Mapping[str, Any]) -> list[Path]:
    """Writes report.json, pareto.png and report.md into `workdir`, all of them or none, and returns their paths.

    report.json appears last: where it is, the others are. The machine, date and commit come from environment.json
    there, and the command too unless the report has one.

    Raises:
      ValueError: the report lacks its metric, or a sub-network its name or value, or two carry one name.
      UserError: the files cannot be written.
    """
    workdir = Path(workdir)
    report = _plain(report)
    check_report(report)
    rows = load_metrics(workdir)
    figures, stale = logs.figures(rows)
    with whole_folder(workdir, REPORT, replaces=stale) as folder:
        cost_key = _cost_key(report["subnets"])
        plots.pareto_plot(
            folder / "pareto.png",
            {workdir.name: report["subnets"]},
            cost_key,
            title=_title(workdir, report),
            ylabel=report["metric"],
            full=_full(report),
            higher_is_better=higher_is_better(report),
        )
        for name, draw in figures.items():
            draw(folder / name)
        _write(folder / "report.md", _markdown(workdir, report, cost_key, rows))
        _write(folder / REPORT, json.dumps(report, indent=2, allow_nan=False) + "\n")
        names = [path.name for path in folder.iterdir()]
    return [workdir / name for name in sorted(names, key=lambda name: (name != REPORT, name))]


def _plain(value: Any) -> Any:
    """JSON values: arrays and NumPy scalars become numbers and lists, NaN and infinities None (JSON has neither)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _title(workdir: Path, report: Mapping[str, Any]) -> str:
    return report.get("title") or workdir.resolve().name


def _full(report: Mapping[str, Any]) -> str | None:
    """The full network's name: the report's word, else the sub-network with the most parameters."""
    if report.get("full"):
        return report["full"]
    sized = [subnet for subnet in report["subnets"] if tables.is_finite(subnet.get("params"))]
    return max(sized, key=lambda subnet: subnet["params"])["name"] if sized else None


def _cost_key(rows: Sequence[Mapping[str, Any]]) -> str:
    """FLOPs where any is known, else the first cost that is."""
    keys = ("flops", "params", "latency_ms", "peak_memory_bytes")
    return next((key for key in keys if any(tables.is_finite(row.get(key)) for row in rows)), "flops")


def _markdown(workdir: Path, report: Mapping[str, Any], cost_key: str, rows: logs.Rows) -> str:
    environment = read_environment(workdir)
    command = report.get("command") or environment.get("command")
    better = "higher" if higher_is_better(report) else "lower"
    front = tables.pareto(report["subnets"], cost_key, "value", higher_is_better=better == "higher")
    columns = {key: tables.HEADINGS.get(key, key) for key in SUBNET_COLUMNS} | {"value": report["metric"]}
    sections = [f"# {_title(workdir, report)}\n", _facts(report, environment)]
    if command:
        sections.append(f"Made by\n\n    {command}\n")
    sections += [
        f"## Sub-networks\n\n{tables.markdown_table(report['subnets'], columns)}",
        f"{report['metric']}: {better} is better. FLOPs are of one example's forward pass, "
        "a multiply-add counted as two. "
        f"On the Pareto front ({plots.COST_LABELS[cost_key]}): "
        f"{', '.join(str(row['name']) for row in front) or 'none has both numbers'}.\n",
        f"![{report['metric']} against cost](pareto.png)\n",
        *filter(None, [_damaged_lines([workdir])]),
        *logs.sections(rows),
        _next_steps(workdir, report, front),
    ]
    return "\n".join(sections)


def _facts(report: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """A list of what ran where: the report's other numbers and strings, then the machine, versions and commit."""
    told = {"metric", "subnets", "title", "command", "full", "higher_is_better"}
    facts: dict[str, str | None] = {}
    for key, value in report.items():
        if key not in told and isinstance(value, (int, float, str)):
            shown = f"{100 * value:.1f} %" if key == "mfu" else tables.format_cell(key, value)
            facts[FACT_NAMES.get(key, key.replace("_", " "))] = shown
    if environment:
        devices, packages, git = (mapping(environment.get(key)) for key in ("devices", "packages", "git"))
        facts["date"] = environment.get("date")
        facts["devices"] = (
            f"{devices.get('count', '?')} x {devices.get('kind', '?')}, {environment.get('threads', '?')} threads"
        )
        facts["versions"] = (
            f"python {environment.get('python', '?')}, jax {packages.get('jax', '?')}, flax {packages.get('flax', '?')}"
        )
        if git.get("commit"):
            facts["commit"] = str(git["commit"]) + (
                " with local changes (environment.json holds them)" if git.get("dirty") else ""
            )
    return "".join(f"* {name}: {value}\n" for name, value in facts.items() if value is not None)


def _next_steps(workdir: Path, report: Mapping[str, Any], front: Sequence[Mapping[str, Any]]) -> str:
    """Commands that work on this run as they stand, with a budget and a name taken from its own front."""
    if "next" in report:
        return _commands(report["next"])
    lines = [f"python -m launch.evaluate --workdir={workdir} --subnet=all"]
    middle = front[len(front) // 2] if front else (report["subnets"] or [{"name": "full"}])[0]
    if tables.is_finite(middle.get("flops")):
        lines.append(f"python -m launch.select --workdir={workdir} --max_flops={middle['flops']}")
    lines.append(f"python -m launch.extract --workdir={workdir} --subnet='{middle['name']}' --out={workdir}-extracted")
    lines.append(f"python -m launch.report --workdir={workdir},OTHER_RUN")
    return _commands(lines)


def _commands(lines: Sequence[str]) -> str:
    return "## How to continue\n\n" + "".join(f"    {line}\n" for line in lines)


def compare(
    runs: Sequence[PathLike] | Mapping[str, PathLike | Sequence[PathLike]], out: PathLike | None = None
) -> dict[str, Any]:
    """Joins the sub-networks of several runs by name, one column a run.

    Args:
      runs: run directories, labelled by their names; or label to a directory, or to several whose sub-networks are
        united, e.g. {"many-in-one": "runs/all", "trained alone": ["runs/small", "runs/large"]}.
      out: folder for compare.md, compare.csv, compare.png and curves.png; by default nothing is written.

    Returns:
      "metric"; "runs", the labels; "rows", each with "name", "params", "flops" and a value by label; "markdown"; and
      "plots", the paths of the figures. Rows rise in cost. A name whose runs disagree on parameters or FLOPs has None
      there and is named in the markdown.

    Raises:
      UserError: a directory without a readable report.json, or runs with different metrics.
    """
    groups = _groups(runs)
    reports = {label: [load_report(workdir) for workdir in workdirs] for label, workdirs in groups.items()}
    metrics = {report["metric"]: label for label, several in reports.items() for report in several}
    if len(metrics) > 1:
        found = ", ".join(f"{metric} ({label})" for metric, label in metrics.items())
        raise UserError(f"these runs have different metrics and cannot share a table: {found}")
    metric = next(iter(metrics))
    series = {label: [row for report in several for row in report["subnets"]] for label, several in reports.items()}
    rows, unequal = _join(series)
    better = higher_is_better(next(iter(reports.values()))[0])
    markdown = _compare_markdown(metric, list(series), rows, unequal, better)
    markdown += _damaged_lines(workdir for workdirs in groups.values() for workdir in workdirs)
    result = {"metric": metric, "runs": list(series), "rows": rows, "markdown": markdown, "plots": []}
    if out is not None:
        full = _full(next(iter(reports.values()))[0])
        result["plots"] = _compare_plots(Path(out), metric, series, groups, better, full)
        links = "".join(f"\n![{path.stem}]({path.name})\n" for path in result["plots"])
        _write(Path(out) / "compare.md", markdown + links)
        tables.write_csv(Path(out) / "compare.csv", rows, command_line())
    return result


def against(
    runs: Sequence[PathLike] | Mapping[str, PathLike | Sequence[PathLike]], x: str, *, out: PathLike | None = None
) -> dict[str, Any]:
    """Sets the full networks of several runs against a size of theirs, a series a label.

    Args:
      runs: as in `compare`.
      x: a cost in the reports ("state", "params", ...) or a field of the runs' configs, dotted ("data.options.length").
      out: folder for against.md, against.csv and against.png; default the first run's parent.

    Raises:
      UserError: a run without a report, or one that does not have such a number.
    """
    groups = _groups(runs)
    series: dict[str, list[dict[str, Any]]] = {}
    metric = ""
    for label, workdirs in groups.items():
        for workdir in workdirs:
            report = load_report(workdir)
            metric = report["metric"]
            row = report["subnets"][0]
            place = row.get(x, _lookup(_config(workdir), x))
            if not tables.is_finite(place):
                raise UserError(
                    f"{workdir} has no number {x!r}; valid: "
                    f"{', '.join(k for k, v in row.items() if tables.is_finite(v))}, or CONFIG.FIELD"
                )
            series.setdefault(label, []).append(
                {"label": label, "name": workdir.name, x: place, "value": row["value"], "wall_s": report.get("wall_s")}
            )
    for rows in series.values():
        rows.sort(key=lambda row: row[x])
    rows = [row for group in series.values() for row in group]
    folder = Path(out) if out else next(iter(groups.values()))[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    markdown = f"# {metric} against {x}\n\n{tables.markdown_table(rows, ['label', 'name', x, 'value', 'wall_s'])}"
    _write(folder / "against.md", f"Made by `{command_line()}`.\n\n{markdown}")
    tables.write_csv(folder / "against.csv", rows, command=command_line())
    plot = plots.curves_plot(
        folder / "against.png",
        series,
        "value",
        step_key=x,
        title=f"{metric} against {x}",
        xlabel=x,
        ylabel=metric,
        log_x=True,
    )
    return {"metric": metric, "rows": rows, "markdown": markdown, "plots": [plot]}


def _config(workdir: Path) -> Any:
    return read_json(workdir / "config.json") if (workdir / "config.json").exists() else None


def _lookup(config: Any, field: str) -> Any:
    for part in field.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _groups(runs: Sequence[PathLike] | Mapping[str, PathLike | Sequence[PathLike]]) -> dict[str, list[Path]]:
    """Label to directories. Directories that share their last name are labelled by their whole path."""
    if isinstance(runs, Mapping):
        items = {label: [dirs] if isinstance(dirs, (str, os.PathLike)) else dirs for label, dirs in runs.items()}
        groups = {label: [Path(directory) for directory in dirs] for label, dirs in items.items()}
    else:
        paths = [Path(run) for run in runs]
        names = [path.resolve().name for path in paths]
        groups = {
            name if names.count(name) == 1 else str(path): [path] for name, path in zip(names, paths, strict=True)
        }
    if not groups or not all(groups.values()):
        raise UserError("nothing to compare: give at least one run directory, for every label")
    return groups


def _join(series: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows by name, and the names whose runs disagree on a cost that does not depend on the machine."""
    joined: dict[str, dict[str, Any]] = {}
    unequal: list[str] = []
    for label, rows in series.items():
        for row in rows:
            target = joined.setdefault(row["name"], {"name": row["name"], "params": None, "flops": None})
            for key in ("params", "flops"):
                cost = row.get(key)
                if None not in (target[key], cost) and target[key] != cost:
                    unequal.append(row["name"])
                target[key] = cost if target[key] is None else target[key]
            target[label] = row["value"]
    for name in unequal:
        joined[name] |= {"params": None, "flops": None}
    cost_key = _cost_key(list(joined.values()))
    rows = sorted(joined.values(), key=lambda row: math.inf if row[cost_key] is None else row[cost_key])
    return [{key: row.get(key) for key in ("name", "params", "flops", *series)} for row in rows], sorted(set(unequal))


def _compare_markdown(metric: str, labels: list[str], rows: list[dict], unequal: list[str], better: bool) -> str:
    columns = {key: tables.HEADINGS[key] for key in ("name", "params", "flops")} | {label: label for label in labels}
    text = f"# {metric} of {len(labels)} runs\n\n{tables.markdown_table(rows, columns)}"
    text += f"\n{metric}: {'higher' if better else 'lower'} is better.\n"
    if unequal:
        text += f"\nOne name, different networks (parameters or FLOPs differ between the runs): {', '.join(unequal)}.\n"
    return text


def _compare_plots(
    out: Path,
    metric: str,
    series: Mapping[str, Sequence[Mapping]],
    groups: Mapping[str, list[Path]],
    better: bool,
    full: str | None,
) -> list[Path]:
    cost_key = _cost_key([row for rows in series.values() for row in rows])
    title = f"{metric}: {' and '.join(series)}" if len(series) < 4 else f"{metric} of {len(series)} runs"
    made = [
        plots.pareto_plot(
            out / "compare.png", series, cost_key, title=title, ylabel=metric, full=full, higher_is_better=better
        )
    ]
    curves = {}
    for label, workdirs in groups.items():
        for workdir in workdirs:
            rows = load_metrics(workdir)
            if rows:
                curves[label if len(workdirs) == 1 else f"{label}: {workdir.name}"] = rows
    key = _curve_key(metric, [row for rows in curves.values() for row in rows])
    if key:
        made.append(plots.curves_plot(out / "curves.png", curves, key))
    return made


def _curve_key(metric: str, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The metric itself where it was logged, else the loss, else any key that ends in "loss"."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return next(
        (key for key in [metric, "loss"] if key in keys), next((key for key in keys if key.endswith("loss")), None)
    )


def _damaged_lines(workdirs: Iterable[PathLike]) -> str:
    """A remark on lines of metrics.jsonl that are left out; "" where all are whole."""
    counts = {Path(workdir): read_journal(Path(workdir) / "metrics.jsonl")[1] for workdir in workdirs}
    told = [f"{count} of {workdir / 'metrics.jsonl'}" for workdir, count in counts.items() if count]
    return f"\nDamaged lines, which are left out: {', '.join(told)}.\n" if told else ""


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def plot_comparison(path: PathLike, rows: Sequence[Mapping[str, Any]], metric: str) -> Path:
    """Draws the networks of `research.search.comparison.join` over FLOPs: trained together and alone."""
    series = {
        "many-in-one": [{**row, "value": row["together"]} for row in rows],
        "each alone, same FLOPs in all": [{**row, "value": row["alone"]} for row in rows],
    }
    return plots.pareto_plot(path, series, "flops", "value", title="One training run against many", ylabel=metric)
