"""Runs a recipe for every combination of some fields' values, each in a directory of its own, and tabulates the
results.

    python -m launch.sweep --config=configs/mqar.py --grid=model.pattern=mamba,gla,attention --grid=model.dim=32,64 \\
        --workdir=runs/mqar

Each run is a process of `launch.train` in WORKDIR/FIELD=VALUE_FIELD=VALUE; `--jobs=2` trains two at a time, each on its
own part of the cores, and their lines go to WORKDIR/FIELD=VALUE.log. Runs that have finished are not repeated: the same
command again continues. The table lies in OUT as sweep.md and sweep.csv, over the seeds too where the grid has several;
`--x` draws the values against a size (see launch.report), a line for each value of the first field. A run that fails is
a line with its reason; exit code 1 then.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import flags

from launch import common, outputs
from launch.children import Children, ending

_CONFIG = common.path_flag("config", None, "Recipe: FILE.py or FILE.py:ARG.")
_GRID = flags.DEFINE_multi_string(
    "grid",
    [],
    "FIELD=VALUE,VALUE,... of the recipe, or arg=... for its argument; ';' between values that hold commas. "
    "Repeatable.",
)
_WORKDIR = outputs.output_flag("workdir", outputs.Place.FOLDER, "Directory under which each run gets its own.")
_OUT = outputs.output_flag("out", outputs.Place.FOLDER, "Folder for the table and the plot; default --workdir.")
_COLUMNS = flags.DEFINE_list("columns", [], "Further columns of the reports, of numbers, e.g. latency_ms.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time, each on its own part of the cores.", lower_bound=1)
_X = flags.DEFINE_string(
    "x", None, "What the plot sets the values against; default the grid's first field of numbers, else params."
)


def _arguments(overrides: dict[str, str], point: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Returns --config and the fields to set for one combination."""
    fields = {field: value for field, value in point.items() if field != "arg"}
    return f"{_CONFIG.value}:{point['arg']}" if "arg" in point else _CONFIG.value, {**overrides, **fields}


def _train(points: list[dict[str, str]], workdirs: list[str], arguments: list, configs: list) -> list[int]:
    """Trains what has not finished yet and returns the exit codes."""
    from research.train.results import finished

    done = [finished(workdir, config) is not None for workdir, config in zip(workdirs, configs, strict=True)]
    children = Children(_JOBS.value)

    def run(i: int) -> int:
        text = f"[{i + 1}/{len(points)}] {', '.join(f'{k}={v}' for k, v in points[i].items())}: {workdirs[i]}"
        print(f"{text}: finished before" if done[i] else text, flush=True)
        config, fields = arguments[i]
        return (
            0
            if done[i]
            else children.train(config, workdirs[i], fields, f"{workdirs[i]}.log" if _JOBS.value > 1 else "")
        )

    with children.stop.heeded(), ThreadPoolExecutor(_JOBS.value) as pool:
        codes = list(pool.map(run, range(len(points))))
    if common.STOPPED in codes or children.stop:
        common.stopped(f"stopped by {children.stop.told or 'a signal'}; start the same command again to continue")
    return codes


def _reason(workdir: str, code: int) -> str:
    """Why a run ended without a result, in one line: as it told itself, else its exit code."""
    from research.errors import UserError
    from research.files import printable, read_json, read_text

    log, said = f"{workdir}.log", []
    if _JOBS.value > 1:
        said = [line for line in read_text(log).splitlines() if line.startswith("error: ")]
    if said:
        return printable(said[-1].removeprefix("error: "), 300)
    try:
        return printable(read_json(Path(workdir) / "status.json")["error"], 300)
    except (UserError, KeyError, TypeError):
        return f"{ending(code)}{f', see {log}' if _JOBS.value > 1 else ''}" if code else "no whole report"


def _write(rows: list[dict[str, Any]], means: list[dict[str, Any]], metric: str, summary: str) -> Path:
    """Prints the tables and writes them as sweep.csv and sweep.md."""
    from research.files import write_text
    from research.report import machine, tables

    columns = lambda lines: list(dict.fromkeys(key for line in lines for key in line))
    print(f"\n{metric} of {summary}")
    out = Path(_OUT.value or _WORKDIR.value)
    out.mkdir(parents=True, exist_ok=True)
    command = machine.command_line()
    text = f'Made by `{command}`: {summary}; {metric} as "value".\n\n{tables.markdown_table(rows, columns(rows))}'
    print(tables.text_table(rows, columns(rows)))
    if means:
        print(tables.text_table(means, columns(means)))
        text += (
            "\nMeans over the seeds, and the largest distance from "
            f"them.\n\n{tables.markdown_table(means, columns(means))}"
        )
    tables.write_csv(out / "sweep.csv", rows, command=command)
    write_text(out / "sweep.md", text)
    return out


def main(overrides: dict[str, str]) -> int:
    from launch import config as recipe
    from research.errors import UserError

    if not _CONFIG.value or not _WORKDIR.value or not _GRID.value:
        raise UserError(
            "--config, --grid and --workdir are needed, e.g. "
            "--config=configs/mqar.py --grid=model.dim=32,64 --workdir=runs/mqar"
        )

    from research.report import provenance, run_card
    from research.search import sweep
    from research.train.results import finished

    grid = sweep.axes(_GRID.value)
    if both := [field for field, _ in grid if field in overrides]:
        raise UserError(f"--config.{both[0]} is in --grid too; leave one of them out")
    points, start = sweep.points(grid), time.monotonic()
    arguments = [_arguments(overrides, point) for point in points]
    configs = [recipe.load(config, fields) for config, fields in arguments]  # mistakes show before the first run
    workdirs = [os.path.join(_WORKDIR.value, sweep.folder_name(point)) for point in points]
    if twice := [workdir for workdir in workdirs if workdirs.count(workdir) > 1]:
        raise UserError(f"two points of the grid would share the folder {twice[0]}; leave one of them out")
    os.makedirs(_WORKDIR.value, exist_ok=True)
    for point, workdir in zip(points, workdirs, strict=True):
        former = os.path.join(_WORKDIR.value, sweep.former_name(point))
        if os.path.isdir(former) and not os.path.exists(workdir):
            print(
                f"note: {former} is named as earlier versions did and is not used; "
                f"rename it to {workdir} to keep its run",
                flush=True,
            )
    codes = _train(points, workdirs, arguments, configs)
    rows, failed, metric, reports, told = [], [], "value", [], []
    groups: dict[str, list[str]] = {}
    lines = next((field for field, _ in grid if field != "seed"), "seed")
    for point, workdir, config, code in zip(points, workdirs, configs, codes, strict=True):
        report = finished(workdir, config)
        if report is None or code:
            failed.append(workdir)
            rows.append({**point, "failed": _reason(workdir, code)})
            continue
        metric = report["metric"]
        reports.append(report)
        told.append(config)
        rows.append(sweep.row(point, report, _COLUMNS.value))
        groups.setdefault(point[lines], []).append(workdir)
    summary = f"{len(rows)} runs, {time.monotonic() - start:.0f} s in all" + (
        f", {len(failed)} of which failed" if failed else ""
    )
    if reports:
        summary += f"; {provenance.line(reports, told, len({config['seed'] for config in told}))}"
    out = _write(rows, sweep.over_seeds(rows, [field for field, _ in grid]), metric, summary)
    print(f"table: {out}/sweep.md", flush=True)
    try:
        print(
            f"plot: {run_card.against(groups, _X.value or sweep.default_x(grid), out=out)['plots'][0]}"
            if groups
            else "no plot: no result"
        )
    except UserError as error:
        print(f"no plot: {error}")
    if failed:
        print(f"{len(failed)} of {len(points)} runs failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv, trains=True)
