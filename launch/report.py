"""Tables and plots of one run or across runs: each run a column, joined by the networks' names.

    python -m launch.report --workdir=runs/quickstart
    python -m launch.report --workdir="many-in-one=runs/sorted,alone=runs/alone/*" --out=runs/compare
    python -m launch.report --workdir="mamba=runs/mqar/64/model.pattern=mamba_*,gla=runs/mqar/64/model.pattern=gla_*" \\
        --x=state --out=runs/mqar

A run that was trained alone as config.model.subnet counts as that sub-network. `LABEL=PATTERN` joins several runs in
one column.
"""

import glob
import os
from collections.abc import Sequence

from absl import flags

from launch import common, outputs
from research.files import printable, user_path

_WORKDIR = flags.DEFINE_multi_string(
    "workdir", [], "Directories of runs, repeatable or separated by commas; LABEL=PATTERN joins several as one."
)
_X = flags.DEFINE_string(
    "x",
    None,
    "Draw the full networks against this: state, params, flops, or a field of the recipe such as data.options.length.",
)
_OUT = outputs.output_flag(
    "out", outputs.Place.FOLDER, "Folder for compare.md, compare.csv, compare.png and curves.png."
)


def _runs(texts: Sequence[str]) -> dict[str, list[str]]:
    """Returns label -> directories; what is there as a whole is not split, be it at commas, equals signs or
    brackets."""
    from research.errors import UserError

    runs: dict[str, list[str]] = {}
    for text in texts:
        whole = _found(text) or _found(text.partition("=")[2])
        for part in [text] if whole else text.split(","):
            label, _, pattern = part.partition("=")
            found, name = (_found(part), part) if _found(part) else (_found(pattern), label)
            if not found:
                raise UserError(f"--workdir: no directory matches {printable(pattern or part)}")
            runs.setdefault(name, []).extend(found)
    return runs


def _found(pattern: str) -> list[str]:
    path = str(user_path(pattern)) if pattern else ""
    return [path] if os.path.isdir(path) else sorted(glob.glob(path))


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
