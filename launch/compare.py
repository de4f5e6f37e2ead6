"""Trains a recipe many-in-one and each of its networks alone, with the same total training FLOPs, and compares them.

    python -m launch.compare --config=configs/fashion_unireplknet_sandwich.py --workdir=runs/fashion --out=results/fashion

The recipe takes `alone=NAME` as its argument. Every network trained alone sees the same number of examples, chosen so
that all of them together cost the FLOPs of the many-in-one run: shared in proportion to size. Runs that are already
finished under --workdir are not repeated; a stopped one goes on.
"""

import os
import subprocess
import sys

from launch import common, outputs
from research.files import write_text

_CONFIG = common.path_flag("config", None, "Recipe FILE.py that takes alone=NAME.")
_WORKDIR = outputs.output_flag("workdir", outputs.Place.FOLDER, "Directory under which the runs lie: together, alone_NAME.")
_OUT = outputs.output_flag("out", outputs.Place.FOLDER, "Folder for compare.csv, compare.md and compare.png.")


def _train(config: str, workdir: str, overrides: dict[str, str]) -> None:
    """Trains in a process of its own, so that each run's wall time starts from nothing."""
    from research.errors import UserError

    command = [sys.executable, "-m", "launch.train", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.{k}={v}" for k, v in overrides.items()]
    code = subprocess.run(command).returncode
    if code:
        raise UserError(f"{' '.join(command[1:])} ended with exit code {code}")


def main(overrides: dict[str, str]) -> int:
    from launch import config as recipe
    from research.errors import UserError

    if not _CONFIG.value or not _WORKDIR.value:
        raise UserError("--config and --workdir are needed")

    from research.report import run_card, tables
    from research.report.machine import command_line
    from research.search.comparison import alone_updates, join
    from research.train.setup import make_setup

    together = os.path.join(_WORKDIR.value, "together")
    if run_card.read_report(together) is None:
        _train(_CONFIG.value, together, overrides)
    setup = make_setup(recipe.load(_CONFIG.value, overrides))
    updates = alone_updates(setup)
    alone = {}
    for name in setup.order:
        workdir = os.path.join(_WORKDIR.value, f"alone_{name}")
        if run_card.read_report(workdir) is None:
            _train(f"{_CONFIG.value}:alone={name}", workdir, {**overrides, "train.duration": str(updates)})
        alone[name] = run_card.read_report(workdir)
    whole = run_card.read_report(together)
    rows = join(whole, alone)
    means = [sum(r[k] for r in rows) / len(rows) for k in ("together", "alone")]
    spent, seconds = sum(r["train_flops"] for r in alone.values()), sum(r["wall_s"] for r in alone.values())
    facts = [
        f"mean over {len(rows)} networks: together {100 * means[0]:.2f} %, alone {100 * means[1]:.2f} %",
        f"training FLOPs: together {whole['train_flops']:.4g}, alone {spent:.4g} in all; {updates} updates each alone",
        f"wall time with compiling: together {whole['wall_s']:.0f} s, alone {seconds:.0f} s in all",
    ]
    print("\n".join([tables.text_table(rows, list(rows[0])), *facts]))
    if _OUT.value:
        os.makedirs(_OUT.value, exist_ok=True)
        tables.write_csv(os.path.join(_OUT.value, "compare.csv"), rows, command=command_line())
        table = tables.markdown_table([{**r, **{k: f"{100 * r[k]:.2f} %" for k in ("together", "alone")}} for r in rows], list(rows[0]))
        text = "\n".join([f"Made by `{command_line()}`.\n", table, *(f"* {fact}" for fact in facts)]) + "\n"
        write_text(os.path.join(_OUT.value, "compare.md"), text)
        run_card.plot_comparison(os.path.join(_OUT.value, "compare.png"), rows, "test accuracy")
    return 0 if means[0] >= means[1] else 1


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv)
