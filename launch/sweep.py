"""Runs a recipe for every combination of some fields' values, each in a directory of its own, and tabulates the results.

    python -m launch.sweep --config=configs/mqar.py --grid=model.pattern=mamba,gla,attention --grid=model.dim=32,64 --workdir=runs/mqar

Each run is a process of `launch.train`; `--jobs=2` trains two at a time, each on its own part of the cores, and their
lines go to WORKDIR/NAME.log. Runs that have finished are not repeated: the same command again goes on. The table, with every
network's value, state size and time, lies in OUT as sweep.md and sweep.csv; `--x` draws the values against a size (see
launch.report), a line for each value of the first field.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from absl import flags

from launch import common, outputs
from research import stopping
from research.files import open_anew, write_text

_CONFIG = common.path_flag("config", None, "Recipe: FILE.py or FILE.py:ARG.")
_GRID = flags.DEFINE_multi_string(
    "grid", [], "FIELD=VALUE,VALUE,... of the recipe, or arg=... for its argument; ';' between values that hold commas. Repeatable."
)
_WORKDIR = outputs.output_flag("workdir", outputs.Place.FOLDER, "Directory under which each run gets its own.")
_OUT = outputs.output_flag("out", outputs.Place.FOLDER, "Folder for the table and the plot; default --workdir.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time, each on its own part of the cores.", lower_bound=1)
_X = flags.DEFINE_string("x", "state", "What the plot sets the values against.")


def axes(texts: list[str]) -> list[tuple[str, list[str]]]:
    """Reads --grid: [(field, values)]."""
    from research.errors import UserError

    out = []
    for text in texts:
        field, _, values = text.partition("=")
        if not field or not values:
            raise UserError(f"--grid={text} is no FIELD=VALUE,VALUE,...; e.g. --grid=model.dim=32,64")
        out.append((field, values.split(";" if ";" in values else ",")))
    return out


def over_seeds(rows: list[dict]) -> list[dict]:
    """Returns a row for the runs that differ in nothing but the seed: means, and "+- KEY", the largest distance; [] without seeds."""
    groups: dict[tuple, list[dict]] = {}
    fields = [field for field, _ in axes(_GRID.value) if field != "seed"]
    for row in rows:
        groups.setdefault(tuple(row[field] for field in fields), []).append(row)
    if "seed" not in rows[0]:
        return []
    out = []
    for place, group in groups.items():
        mean = dict(zip(fields, place, strict=True)) | {"seeds": len(group)}
        for key in (key for key in group[0] if key not in (*fields, "seed", "updates")):
            values = [float(row[key]) for row in group]
            mean[key] = sum(values) / len(values)
            if key not in ("params", "flops", "state", "wall_s"):
                mean[f"+- {key}"] = max(abs(value - mean[key]) for value in values)
        out.append(mean)
    return out


def _columns(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _arguments(overrides: dict[str, str], point: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Returns --config and the fields to set for one combination."""
    fields = {field: value for field, value in point.items() if field != "arg"}
    return f"{_CONFIG.value}:{point['arg']}" if "arg" in point else _CONFIG.value, {**overrides, **fields}


class _Jobs:
    """Processes that train, so many at a time, each slot on its own cores where the system can pin."""

    def __init__(self, jobs: int):
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.pinned = 1 < jobs <= len(cores)
        self.parallel = jobs > 1
        self.slots: SimpleQueue = SimpleQueue()
        for i in range(jobs):
            self.slots.put(cores[i::jobs])
        self.running: set[subprocess.Popen] = set()
        with stopping.listening() as stop:  # as `common.run` does, to the end of the process
            self.stop, stop.forward = stop, self._stop

    def _stop(self, *_) -> None:
        for process in list(self.running):  # they save and leave
            process.terminate()

    def train(self, config: str, fields: dict[str, str], workdir: str) -> int:
        """Trains in a free slot and returns the exit code."""
        cores = self.slots.get()
        command = [sys.executable, "-m", "launch.train", f"--config={config}", f"--workdir={workdir}"]
        command += [f"--config.{field}={value}" for field, value in fields.items()]
        try:
            if self.stop:
                return common.STOPPED
            if not self.parallel:
                return self._wait(subprocess.Popen(command), cores)
            with open_anew(f"{workdir}.log") as log:
                return self._wait(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), cores)
        finally:
            self.slots.put(cores)

    def _wait(self, process: subprocess.Popen, cores: list[int]) -> int:
        self.running.add(process)
        if self.pinned:
            common.pin(process, cores)
        try:
            code = process.wait()
            return common.STOPPED if self.stop and code == -signal.SIGTERM else code  # it had not come so far as to listen
        finally:
            self.running.discard(process)


def main(overrides: dict[str, str]) -> int:
    from launch import config as recipe
    from research.errors import UserError
    from research.train.config import differences
    from research.train.rundir import read_config

    if not _CONFIG.value or not _WORKDIR.value or not _GRID.value:
        raise UserError(
            "--config, --grid and --workdir are needed, e.g. --config=configs/mqar.py --grid=model.dim=32,64 --workdir=runs/mqar"
        )
    grid = axes(_GRID.value)
    points = [dict(zip((field for field, _ in grid), values, strict=True)) for values in itertools.product(*(v for _, v in grid))]
    arguments = [_arguments(overrides, point) for point in points]
    configs = [recipe.load(config, fields) for config, fields in arguments]  # mistakes show before the first run

    from research.report import machine, run_card, tables

    os.makedirs(_WORKDIR.value, exist_ok=True)
    workdirs = [os.path.join(_WORKDIR.value, "_".join(value.replace(" ", "-") for value in point.values())) for point in points]
    for workdir, config in zip(workdirs, configs, strict=True):
        if run_card.read_report(workdir) is not None and (changed := differences(read_config(workdir), config)):
            raise UserError(f"{workdir} holds a finished run of another config ({changed[0]}); give another --workdir, or delete it")
    jobs, start = _Jobs(_JOBS.value), time.monotonic()

    def run(i: int) -> int:
        config, fields = arguments[i]
        text = f"[{i + 1}/{len(points)}] {', '.join(f'{k}={v}' for k, v in points[i].items())}: {workdirs[i]}"
        if run_card.read_report(workdirs[i]) is not None:
            print(f"{text}: finished before", flush=True)
            return 0
        print(text, flush=True)
        return jobs.train(config, fields, workdirs[i])

    with ThreadPoolExecutor(_JOBS.value) as pool:
        codes = list(pool.map(run, range(len(points))))
    if common.STOPPED in codes:
        print(f"stopped by {jobs.stop.told or 'a signal'}; start the same command again to go on", flush=True)
        return common.STOPPED
    if failed := [workdir for workdir, code in zip(workdirs, codes, strict=True) if code]:
        hint = f"; what it said lies in {failed[0]}.log" if jobs.parallel else ""
        raise UserError(f"{len(failed)} of {len(points)} runs failed, the first is {failed[0]}{hint}")
    rows, groups = [], {}
    for point, workdir in zip(points, workdirs, strict=True):
        report = run_card.read_report(workdir)
        full = report["subnets"][0]
        costs = {key: full[key] for key in ("params", "state", "flops") if key in full}
        more = {key: full[key] for key in full if key.startswith(("validation_", "robust_")) or key in ("accuracy", "clean_accuracy")}
        more |= {key: report[key] for key in ("dead_experts",) if key in report}
        rows.append({**point, **costs, "value": full["value"], **more, "updates": report["updates"], "wall_s": report["wall_s"]})
        groups.setdefault(point[grid[0][0]], []).append(workdir)
    means = over_seeds(rows)
    summary = f"{len(rows)} runs, {time.monotonic() - start:.0f} s in all"
    print(f"\n{report['metric']} of {summary}")
    print(tables.text_table(rows, _columns(rows)))
    if means:
        print(tables.text_table(means, _columns(means)))
    out = Path(_OUT.value or _WORKDIR.value)
    out.mkdir(parents=True, exist_ok=True)
    command = machine.command_line()
    tables.write_csv(out / "sweep.csv", rows, command=command)
    text = f'Made by `{command}`: {summary}, {report["metric"]} as "value".\n\n{tables.markdown_table(rows, _columns(rows))}'
    if means:
        text += f"\nMeans over the seeds, and the largest distance from them.\n\n{tables.markdown_table(means, _columns(means))}"
    write_text(out / "sweep.md", text)
    drawn = run_card.against(groups, _X.value, out=out)
    print(f"table: {out}/sweep.md, plot: {drawn['plots'][0]}")
    return 0


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv, trains=True)
