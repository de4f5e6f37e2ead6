"""What the loop adds to the bare jitted step: both, interleaved, in one run."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from research.train.learner import Reporter
from research.train.loop import Run
from research.train.state import Leaves, State, Updated, due
from research.train.supervised import Supervised
from research.train.turns import Ready
from research.train.update import Update

WARM_UP = 20
SAVES, BETWEEN_SAVES = 9, 5


def loop_overhead(
    config: dict[str, Any], steps: int, workdir: str, reporter: Reporter
) -> tuple[list[dict[str, Any]], float]:
    """Times `steps` updates of the loop and as many bare ones, in turns.

    An update of the loop takes the batch from the pipeline, places it, runs the gradient programs and the update
    program, and reads the metrics of the update before. The bare one runs the same programs on the same batch, already
    in place. Then some checkpoints are saved, a few updates apart: how long the loop waits before it may continue.

    Returns:
      (a row for each with median and 95th percentile in ms, median over neighbouring pairs of loop / bare - 1).
    """
    run = Run(config, workdir, reporter)
    learner = run.learner
    assert isinstance(learner, Supervised)
    run.begin(learner.initial(reporter.say))
    run.journal.log_every = 10**9
    batches, grads, pending = learner.batches(0), learner.programs.zero_grads(), None
    looped: list[float] = []
    bare: list[float] = []
    for i in range(steps + WARM_UP):
        start = time.perf_counter()
        batch = next(batches)
        run.state, numbers = learner.update(run.step, run.state, batch)
        run.step += 1
        run.journal.read(pending)
        pending = (run.step, numbers)
        jax.block_until_ready(run.state.params)
        middle = time.perf_counter()
        inputs = learner.execution.ready(run.step, batch, learner.setup.draw(run.step))
        jax.block_until_ready([given for _, given in inputs])
        again = time.perf_counter()
        run.state, grads = _bare_update(learner, inputs, run.state, run.step, grads)
        jax.block_until_ready(run.state.params)
        if i >= WARM_UP:
            looped.append(1e3 * (middle - start))
            bare.append(1e3 * (time.perf_counter() - again))
    blocked = []
    for _ in range(SAVES):
        start = time.perf_counter()
        run.save()
        blocked.append(1e3 * (time.perf_counter() - start))
        for _ in range(BETWEEN_SAVES):
            run.state, _ = learner.update(run.step, run.state, next(batches))
            run.step += 1
        jax.block_until_ready(run.state.params)
    run.closing.close()
    rows = [
        {"what": what, "median_ms": float(np.median(times)), "p95_ms": float(np.percentile(times, 95))}
        for what, times in (("bare jitted step", bare), ("update of the loop", looped), ("blocked by a save", blocked))
    ]
    # Neighbours run the same sub-networks, so their ratio is free of the draw.
    return rows, float(np.median(np.array(looped) / np.array(bare))) - 1


def _bare_update(learner: Supervised, inputs: Sequence[Ready], state: State, step: int, grads: Leaves) -> Any:
    """The state after the programs of an update, and the buffer of gradients."""
    programs = learner.programs
    for program, given in inputs:
        grads = programs.get(program)(programs.held(state), grads, given).grads
    bare, *rest = due(state, np.int32(step), state.stats)
    updated: Updated = programs.get(Update(learner.setup.phase(step).name))(bare, grads, *rest)
    return updated.state, updated.grads
