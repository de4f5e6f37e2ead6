"""Runs `launch.train` with a fault built in: `python -m tests.faults.run FAULT STEP FLAGS...`.

clock: the time of day jumps three times a second, a day back or two days ahead. raises, stalls, nan: the batch of
update STEP does.
"""

import runpy
import sys
import time

import numpy as np


def clock(step: int) -> None:
    real, jumps = time.time, (0.0, -86400.0, 86400.0)
    time.time = lambda: real() + jumps[int(3 * time.monotonic()) % len(jumps)]


def broken(fault: str, step: int) -> None:
    from research.data import pipeline

    load = pipeline._load

    def faulty(*args):
        batch = load(*args)
        if int(args[-1]) != step:
            return batch
        if fault == "raises":
            raise OSError(5, "Input/output error", "shard-00007.array_record")
        if fault == "stalls":
            time.sleep(3600)
        return {k: np.full_like(v, np.nan) if v.dtype.kind == "f" else v for k, v in batch.items()}

    pipeline._load = faulty


if __name__ == "__main__":
    fault, step = sys.argv[1], int(sys.argv[2])
    if fault == "clock":
        clock(step)
    else:
        broken(fault, step)
    sys.argv = ["launch/train.py", *sys.argv[3:]]
    runpy.run_module("launch.train", run_name="__main__")
