"""Runs a recipe, over several seeds if asked, and judges it against its acceptance criteria.

    python -m launch.reproduce --config=configs/quickstart.py --seeds=0,1,2 --workdir=runs/reproduce

A recipe's `expect` holds {"NAME": [least, most]} or {"NAME": the worst that will do}, where NAME is one of: full (mean
value of the full network over the seeds), smallest_share (the least value of any network over the full one's, of all
seeds; for losses the full one's over theirs), smallest_flops (FLOPs of the cheapest network over the full one's),
networks, wall_s (longest run), dead_experts (of a mixture of experts, in all its layers, the most of any seed), and any
column of numbers of the report, also of evaluations of one's own (the full network's mean), such as accuracy, and
clean_accuracy (on the images attacked) and robust_ATTACK of the method `attacks`. Exit code 1: an acceptance criterion
is not met.
"""

import os
import shutil

from absl import flags

from launch import common, outputs
from research.files import replace_file, write_text

_CONFIG = common.path_flag("config", None, "Recipe: FILE.py or FILE.py:ARG.")
_WORKDIR = outputs.output_flag("workdir", outputs.Place.FOLDER, "Directory under which each seed gets its own run.")
_OUT = outputs.output_flag(
    "out",
    outputs.Place.FOLDER,
    "Folder for tables.md, criteria.csv, seeds.csv, networks.csv and the first seed's pareto.png; default --workdir.",
)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds to run.")


def main(overrides: dict[str, str]) -> int:
    from launch import config as recipe
    from launch.terminal import Terminal
    from research.errors import UserError

    if not _CONFIG.value or not _WORKDIR.value:
        raise UserError(
            "--config and --workdir are needed, e.g. --config=configs/quickstart.py --workdir=runs/reproduce"
        )

    from research.report import provenance, tables
    from research.report.machine import command_line
    from research.search.criteria import by_network, check_criteria, directions, judge, measures
    from research.train.columns import known_columns
    from research.train.loop import Preempted, train
    from research.train.results import finished
    from research.train.sections import RunConfig

    configs = {seed: recipe.load(_CONFIG.value, {**overrides, "seed": seed}) for seed in _SEEDS.value}
    workdirs = {seed: os.path.join(_WORKDIR.value, f"seed{seed}") for seed in configs}
    expect = next(iter(configs.values()))["expect"]
    check_criteria(expect, known_columns(RunConfig.of(next(iter(configs.values())))))
    found_before = {
        seed: finished(workdirs[seed], config) for seed, config in configs.items()
    }  # mistakes show before the first run
    reports = []
    for seed, config in configs.items():
        report = found_before[seed]
        print(f"seed {seed}: {workdirs[seed]}{': finished before' if report else ''}", flush=True)
        if report is None:
            try:
                report = train(config, workdirs[seed], Terminal())
            except Preempted as stop:
                common.stopped(stop)
        reports.append(report)
    found = measures(reports)
    rows = judge(found, expect, directions(reports))
    print(f"\n{_CONFIG.value}, seeds {', '.join(configs)}")
    print(tables.text_table(rows, ["criterion", "expected", "found", "met"]))
    per_seed = [
        {"seed": s, **{n["name"]: n["value"] for n in r["subnets"]}, "wall_s": r["wall_s"]}
        for s, r in zip(configs, reports, strict=True)
    ]
    print(tables.text_table(per_seed, list(per_seed[0])))
    out = _OUT.value or _WORKDIR.value
    os.makedirs(out, exist_ok=True)
    tables.write_csv(os.path.join(out, "criteria.csv"), rows, command=command_line())
    tables.write_csv(os.path.join(out, "seeds.csv"), per_seed, command=command_line())
    tables.write_csv(os.path.join(out, "networks.csv"), reports[0]["subnets"], command=command_line())
    networks = by_network(reports, list(configs))
    parts = [
        f"Made by `{command_line()}`; {provenance.line(reports, list(configs.values()))}.\n",
        tables.markdown_table(networks, list(networks[0])),
        tables.markdown_table(rows, ["criterion", "expected", "found", "met"]),
    ]
    write_text(os.path.join(out, "tables.md"), "\n".join(parts))
    if _OUT.value:
        plot = os.path.join(_WORKDIR.value, f"seed{next(iter(configs))}", "pareto.png")
        replace_file(os.path.join(out, "pareto.png"), lambda temp: shutil.copyfile(plot, temp))
    return 0 if all(row["met"] == "yes" for row in rows) else 1


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv, trains=True)
