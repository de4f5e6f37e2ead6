"""Tables and plots of one run or across runs: each run a column, joined by the networks' names.

    python -m launch.report --workdir=runs/quickstart
    python -m launch.report --workdir="many-in-one=runs/sorted,alone=runs/alone/*" --out=runs/compare
    python -m launch.report --workdir="mamba=runs/mqar/mamba*,gla=runs/mqar/gla*" --x=state --out=runs/mqar

A run that was trained alone as config.model.subnet counts as that sub-network. `LABEL=PATTERN` joins several
runs in one column.
"""

import glob

from absl import flags

from launch import common

_WORKDIR = flags.DEFINE_string("workdir", None, "Directories of runs, separated by commas; LABEL=PATTERN joins several as one.")
_X = flags.DEFINE_string(
    "x", None, "Draw the full networks against this: state, params, flops, or a field of the recipe such as data.options.length."
)
_OUT = flags.DEFINE_string("out", None, "Folder for compare.md, compare.csv, compare.png and curves.png.")


def _runs(text: str) -> dict[str, list[str]]:
    from research.errors import UserError

    runs: dict[str, list[str]] = {}
    for part in text.split(","):
        label, _, pattern = part.rpartition("=")
        found = sorted(glob.glob(pattern))
        if not found:
            raise UserError(f"--workdir: no directory matches {pattern!r}")
        runs.setdefault(label or pattern, []).extend(found)
    return runs


def main() -> int:
    from research.errors import UserError

    if not _WORKDIR.value:
        raise UserError("--workdir is needed: directories of runs, separated by commas")

    from research.report import run_card

    runs = _runs(_WORKDIR.value)
    result = run_card.against(runs, _X.value, out=_OUT.value) if _X.value else run_card.compare(runs, out=_OUT.value)
    print(result["markdown"])
    for plot in result["plots"]:
        print(f"plot: {plot}")
    return 0


if __name__ == "__main__":
    common.run(main)
