"""Trains a recipe many-in-one and each of its networks alone, with the same total training FLOPs, and compares them.

    python -m launch.compare --config=configs/fashion_unireplknet_sandwich.py --workdir=runs/fashion \\
        --out=results/fashion

The recipe takes `alone=NAME` as its argument. Every network trained alone sees the same number of examples, chosen so
that all of them together cost the FLOPs of the many-in-one run: shared in proportion to size. Runs that are already
finished under --workdir are not repeated; a stopped one continues.
"""

import os
from typing import Any

from launch import common, outputs
from launch.children import Children
from research.files import write_text

_CONFIG = common.path_flag("config", None, "Recipe FILE.py that takes alone=NAME.")
_WORKDIR = outputs.output_flag(
    "workdir", outputs.Place.FOLDER, "Directory under which the runs lie: together, alone_NAME."
)
_OUT = outputs.output_flag("out", outputs.Place.FOLDER, "Folder for compare.csv, compare.md and compare.png.")


def main(overrides: dict[str, str]) -> int:
    from launch import config as recipe
    from research.errors import UserError

    if not _CONFIG.value or not _WORKDIR.value:
        raise UserError("--config and --workdir are needed")

    from research.report import columns, provenance, run_card, tables
    from research.report.machine import command_line
    from research.search.comparison import alone_updates, join
    from research.train.results import finished
    from research.train.setup import make_setup

    children, config = Children(), recipe.load(_CONFIG.value, overrides)

    def result(text: str, name: str, fields: dict[str, str]) -> dict[str, Any]:
        """The report of a run, trained in a process of its own where it is missing, so that its wall time starts from
        nothing."""
        workdir, own = os.path.join(_WORKDIR.value, name), recipe.load(text, fields)
        if finished(workdir, own) is None:
            children.train_alone(text, workdir, fields)
        report = finished(workdir, own)
        if report is None:
            raise UserError(f"{workdir} holds no whole report after training; start the same command again")
        return report

    setup = make_setup(config)
    updates = alone_updates(setup)
    # What says how networks are trained together says nothing of one alone.
    fields = {field: value for field, value in overrides.items() if not field.startswith("nested.")} | {
        "train.duration": str(updates)
    }
    for name in setup.order:
        recipe.load(f"{_CONFIG.value}:alone={name}", fields)  # mistakes show before the first run
    whole = result(_CONFIG.value, "together", overrides)
    alone = {name: result(f"{_CONFIG.value}:alone={name}", f"alone_{name}", fields) for name in setup.order}
    rows = join(whole, alone)
    means = [sum(r[k] for r in rows) / len(rows) for k in ("together", "alone")]
    metric, higher = whole["metric"], run_card.higher_is_better(whole)
    column = columns.declared(whole)[columns.VALUE]
    shown = lambda value: f"{column.shown(value, 2)}{' %' if column.percent else ''}"
    spent, seconds = sum(r["train_flops"] for r in alone.values()), sum(r["wall_s"] for r in alone.values())
    facts = [
        f"mean {metric} over {len(rows)} networks: together {shown(means[0])}, alone {shown(means[1])}",
        f"training FLOPs: together {whole['train_flops']:.4g}, alone {spent:.4g} in all",
        f"updates: together {whole['updates']:,}, each alone {updates:,}; equal FLOPs are not equal updates",
        f"1 seed; chosen: {config['report']['chosen'] or provenance.UNKNOWN}",
        f"wall time with compiling: together {whole['wall_s']:.0f} s, alone {seconds:.0f} s in all",
    ]
    print("\n".join([tables.text_table(rows, list(rows[0])), *facts]))
    if _OUT.value:
        os.makedirs(_OUT.value, exist_ok=True)
        tables.write_csv(os.path.join(_OUT.value, "compare.csv"), rows, command=command_line())
        table = tables.markdown_table(
            [{**r, **{k: shown(r[k]) for k in ("together", "alone")}} for r in rows], list(rows[0])
        )
        text = "\n".join([f"Made by `{command_line()}`.\n", table, *(f"* {fact}" for fact in facts)]) + "\n"
        write_text(os.path.join(_OUT.value, "compare.md"), text)
        run_card.plot_comparison(os.path.join(_OUT.value, "compare.png"), rows, metric)
    return 0 if (means[0] >= means[1] if higher else means[0] <= means[1]) else 1


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv, trains=True)
