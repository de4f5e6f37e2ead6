"""Runs a recipe for every combination of some fields' values, each in a directory of its own, and tabulates the results.

    python -m launch.sweep --config=configs/mqar.py --grid=model.pattern=mamba,gla,attention --grid=model.dim=32,64 --workdir=runs/mqar

Runs that have finished are not repeated: the same command again goes on. The table, with every network's value, state size
and time, lies in OUT as sweep.md and sweep.csv; `--x` draws the values against a size (see launch.report), a line for
each value of the first field.
"""

import itertools
import os
from pathlib import Path

from absl import flags

from launch import common

_CONFIG = flags.DEFINE_string("config", None, "Recipe: FILE.py or FILE.py:ARG.")
_GRID = flags.DEFINE_multi_string(
    "grid", [], "FIELD=VALUE,VALUE,... of the recipe, or arg=... for its argument; ';' between values that hold commas. Repeatable."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory under which each run gets its own.")
_OUT = flags.DEFINE_string("out", None, "Folder for the table and the plot; default --workdir.")
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


def _load(recipe, overrides: dict[str, str], point: dict[str, str]) -> dict:
    fields = {field: value for field, value in point.items() if field != "arg"}
    return recipe.load(f"{_CONFIG.value}:{point['arg']}" if "arg" in point else _CONFIG.value, {**overrides, **fields})


def main(overrides: dict[str, str]) -> int:
    from launch import config as recipe
    from launch.terminal import Terminal
    from research.errors import UserError

    if not _CONFIG.value or not _WORKDIR.value or not _GRID.value:
        raise UserError(
            "--config, --grid and --workdir are needed, e.g. --config=configs/mqar.py --grid=model.dim=32,64 --workdir=runs/mqar"
        )
    grid = axes(_GRID.value)
    points = [dict(zip((field for field, _ in grid), values, strict=True)) for values in itertools.product(*(v for _, v in grid))]
    configs = [_load(recipe, overrides, point) for point in points]

    from research.report import machine, run_card, tables
    from research.train.loop import Preempted, train

    rows, groups = [], {}
    for i, (point, config) in enumerate(zip(points, configs, strict=True)):
        name = "_".join(value.replace(" ", "-") for value in point.values())
        workdir = os.path.join(_WORKDIR.value, name)
        report = run_card.read_report(workdir)
        print(f"[{i + 1}/{len(points)}] {', '.join(f'{k}={v}' for k, v in point.items())}: {workdir}", flush=True)
        if report is None:
            try:
                report = train(config, workdir, Terminal())
            except Preempted as stop:
                print(f"stopped by SIGTERM at step {stop.step}; start the same command again to go on", flush=True)
                os._exit(common.STOPPED)
        full = report["subnets"][0]
        costs = {key: full[key] for key in ("params", "state", "flops") if key in full}
        rows.append({**point, **costs, "value": full["value"], "updates": report["updates"], "wall_s": report["wall_s"]})
        groups.setdefault(point[grid[0][0]], []).append(workdir)
    print(f"\n{report['metric']} of {len(rows)} runs")
    print(tables.text_table(rows, list(rows[0])))
    out = Path(_OUT.value or _WORKDIR.value)
    out.mkdir(parents=True, exist_ok=True)
    command = machine.command_line()
    tables.write_csv(out / "sweep.csv", rows, command=command)
    text = f'Made by `{command}`: {report["metric"]} as "value".\n\n{tables.markdown_table(rows, list(rows[0]))}'
    (out / "sweep.md").write_text(text, encoding="utf-8")
    drawn = run_card.against(groups, _X.value, out=out)
    print(f"table: {out}/sweep.md, plot: {drawn['plots'][0]}")
    return 0


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv)
