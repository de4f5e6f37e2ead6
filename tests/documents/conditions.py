"""Under which conditions the committed results were made, as a table: seeds, updates, examples, training FLOPs, wall
time, choices.

    python -m tests.documents.conditions            # writes results/conditions.csv and conditions.md; make conditions

Updates, examples and FLOPs follow from the recipes, wall times from the results' own files (seconds of each run, or of
all runs together where only that was kept); what was chosen, and on which split, is what is known of it.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import config as recipe
from research.report import tables
from research.report.provenance import UNKNOWN
from research.search.comparison import run_flops
from research.train.setup import make_setup

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    """One committed result: its folder, the recipes of its arms, its seeds, where its seconds stand, what changed since
    it was made."""

    folder: str
    recipes: tuple[str, ...]
    seeds: int = 1
    wall: str = "seeds.csv"
    since: str = ""


DECAY = "weight decay no longer reaches biases, gains and constants"

RESULTS = (
    Result("quickstart", ("quickstart",), 3),
    Result(
        "fashion",
        ("fashion_unireplknet_sandwich",),
        wall="",
    ),
    Result("fashion_fast", ("fashion_fast",)),
    Result("lm_quickstart", ("lm_quickstart",)),
    Result("sandwich_lm", ("sandwich_lm",)),
    Result("wide_deep", ("wide_deep:1", "wide_deep:2", "wide_deep:4", "wide_deep:8"), wall="sweep.csv"),
    Result("hybrid", ("hybrid",), wall="sweep.csv", since=DECAY),
    Result("pixel_sequences", ("pixel_sequences",), since=DECAY),
    Result(
        "mqar/64",
        ("mqar:64x4", "mqar:64x16"),
        wall="sweep.csv",
    ),
    Result(
        "mqar/128",
        ("mqar:128x8", "mqar:128x32"),
        wall="sweep.csv",
    ),
    Result("selective_copying", ("selective_copying:smallx16",), wall="sweep.csv", since=DECAY),
    Result("in_context_linear", ("in_context_linear",), wall=""),
    *(
        Result(f"in_context_boolean/{f}", (f"in_context_boolean:{f}",), wall="")
        for f in ("conjunction", "dnf", "parity", "sparse_parity")
    ),
    Result("moe_lm", ("moe_lm:dense", "moe_lm:moe"), 3, wall="sweep.csv"),
    Result("fashion_vmoe", ("fashion_vmoe:dense", "fashion_vmoe:moe"), 3, wall="sweep.csv", since=DECAY),
    Result(
        "advmoe",
        ("fashion_advmoe:dense", "fashion_advmoe:small", "fashion_advmoe:joint", "fashion_advmoe:alternate"),
        3,
        wall="sweep.csv",
    ),
    Result(
        "domain_encoder",
        ("domain_encoder:dense", "domain_encoder:domain"),
        3,
        wall="sweep.csv",
        since="loss symmetric in place of mnr_plus, which for unit vectors is the same but for near copies",
    ),
    Result("counting", ("counting",)),
    Result("customise", ("customise",), wall=""),
)


def facts(result: Result, data_dir: str = "") -> dict[str, Any]:
    """Returns updates, examples an update, training FLOPs and choices of a run of each of a result's recipes, in the
    order of the recipes.

    Args:
      result: which.
      data_dir: folder of data that are not embedded.
    """
    out: dict[str, list[str]] = {"updates": [], "examples": [], "train_flops": [], "chosen": []}
    for name in result.recipes:
        overrides = {"data.dir": data_dir} if data_dir and "fashion" in name else {}
        file, _, arg = name.partition(":")
        setup = make_setup(recipe.load(f"{ROOT}/configs/{file}.py{':' * bool(arg)}{arg}", overrides))
        out["chosen"].append(setup.config.report.chosen or UNKNOWN)
        out["updates"].append(str(setup.total))
        out["examples"].append(str(setup.config.data.batch_size))
        out["train_flops"].append(f"{setup.task.work * setup.methods.work() * run_flops(setup):.3g}")
    return {key: "; ".join(dict.fromkeys(values)) for key, values in out.items()}


def wall(result: Result) -> str:
    """Returns the seconds of a result's runs, least to most."""
    if not result.wall:
        return "in its page"
    with open(ROOT / "results" / result.folder / result.wall, newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    seconds = sorted(float(row["wall_s"]) for row in rows)
    return f"{seconds[0]:.0f}" if len(seconds) == 1 else f"{seconds[0]:.0f} to {seconds[-1]:.0f}"


def row(result: Result, data_dir: str = "") -> dict[str, Any]:
    """Returns a row of the table."""
    names = ", ".join(
        f"configs/{name.split(':')[0]}.py" + (f":{name.split(':')[1]}" if ":" in name else "")
        for name in result.recipes
    )
    return {
        "result": result.folder,
        "recipes": names,
        "seeds": result.seeds,
        **facts(result, data_dir),
        "wall_s": wall(result),
        "changed_since": result.since,
    }


def main() -> None:
    import sys

    data_dir = sys.argv[1] if len(sys.argv) > 1 else ""
    rows = [row(result, data_dir) for result in RESULTS]
    tables.write_csv(
        ROOT / "results/conditions.csv", rows, command="python -m tests.documents.conditions [FOLDER of Fashion-MNIST]"
    )
    text = (
        "Made by `python -m tests.documents.conditions`. "
        "Several recipes with different figures have them in their order, separated by semicolons.\n\n"
    )
    (ROOT / "results/conditions.md").write_text(text + tables.markdown_table(rows, list(rows[0])), encoding="utf-8")


if __name__ == "__main__":
    main()
