"""Measures what the loop adds to the bare jitted step: both, interleaved, in one run.

    python -m launch.bench --config=configs/quickstart.py
    python -m launch.bench --config=configs/quickstart.py --config.nested.scheme=full --steps=200 --csv=results/loop_overhead.csv

An update of the loop takes the batch from the pipeline, places it, runs the gradient programs and the update program, and
reads the metrics of the update before. The bare step runs the same programs on a batch that is already in place.
"""

import tempfile
import time
from typing import Any

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

    import jax
    import numpy as np

    from research.report import tables
    from research.report.machine import command_line
    from research.train.loop import Clock, Run

    steps = _STEPS.value
    config = recipe.load(_CONFIG.value, {**overrides, "train.duration": str(4 * steps), "optim.warmup": "0"})
    with tempfile.TemporaryDirectory() as workdir:
        run = Run(config, workdir, _Quiet())
        run.step, run.state, run.clock, run._first = 0, run.programs.init_state(), Clock(), 0
        batches, grads, pending = run.setup.batches(0), run.programs.zero_grads(), None
        looped: list[float] = []
        bare: list[float] = []
        batch: Any = None
        draws: Any = None
        for i in range(2 * steps + 20):
            with_loop = i % 2 == 0
            if not with_loop:
                placed = [run.bare_inputs(batch, draws)]  # the same sub-networks and sizes as the update before
            start = time.perf_counter()
            if with_loop:
                batch, draws = next(batches), run.setup.draw(run.step)
                grads, metrics = run._update(batch, draws, grads)
                run.step += 1
                run._read(pending, 10**9)
                pending = (run.step, draws, metrics)
            else:
                grads = run.bare_update(placed[0], grads)
            jax.block_until_ready(run.state.params)
            if i >= 20:
                (looped if with_loop else bare).append(1e3 * (time.perf_counter() - start))
        run.programs.close()
        run.rundir.close()
    rows = [
        {"what": "bare jitted step", "median_ms": float(np.median(bare)), "p95_ms": float(np.percentile(bare, 95))},
        {"what": "update of the loop", "median_ms": float(np.median(looped)), "p95_ms": float(np.percentile(looped, 95))},
    ]
    # Neighbours draw the same sub-networks, so their ratio is free of the draw.
    added = float(np.median(np.array(looped[: len(bare)]) / np.array(bare[: len(looped)]))) - 1
    print(tables.text_table(rows, ["what", "median_ms", "p95_ms"]))
    print(f"the loop adds {100 * added:.1f} % at the median of {len(bare)} neighbouring pairs")
    if _CSV.value:
        tables.write_csv(_CSV.value, [{**row, "added_percent": 100 * added} for row in rows], command=command_line())
    return 0


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv)
