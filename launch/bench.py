"""Measures what the loop adds to the bare jitted step: both, interleaved, in one run.

    python -m launch.bench --config=configs/quickstart.py
    python -m launch.bench --config=configs/quickstart.py --config.nested.scheme=full --steps=200 --csv=results/loop_overhead.csv

An update of the loop takes the batch from the pipeline, places it, runs the gradient programs and the update program, and
reads the metrics of the update before. The bare step runs the same programs on a batch that is already in place.
"""

import tempfile

from absl import flags

from launch import common

_CONFIG = flags.DEFINE_string("config", None, "Recipe whose step is measured.")
_STEPS = flags.DEFINE_integer("steps", 100, "Updates of each kind to time.", lower_bound=3)
_CSV = flags.DEFINE_string("csv", None, "CSV file to write beside the table.")


class _Quiet:
    def say(self, line: str) -> None:
        print(line)

    def progress(self, done: int, total: int, text: str) -> None:
        pass


def main(overrides: dict[str, str]) -> int:
    from launch import config as recipe
    from research.errors import UserError

    if not _CONFIG.value:
        raise UserError("--config is needed, e.g. --config=configs/quickstart.py")

    from research.report import tables
    from research.report.machine import command_line
    from research.train.overhead import loop_overhead

    config = recipe.load(_CONFIG.value, {**overrides, "train.duration": str(2 * _STEPS.value + 100), "optim.warmup": "0"})
    with tempfile.TemporaryDirectory() as workdir:
        rows, added = loop_overhead(config, _STEPS.value, workdir, _Quiet())
    print(tables.text_table(rows, ["what", "median_ms", "p95_ms"]))
    print(f"the loop adds {100 * added:.1f} % at the median of {_STEPS.value} neighbouring pairs")
    if _CSV.value:
        tables.write_csv(_CSV.value, [{**row, "added_percent": 100 * added} for row in rows], command=command_line())
    return 0


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv)
