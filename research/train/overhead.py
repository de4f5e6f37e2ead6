"""What the loop adds to the bare jitted step: both, interleaved, in one run."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from research.train.learner import Reporter
from research.train.loop import Run
from research.train.state import Microbatch, State, due
from research.train.supervised import Supervised
from research.train.turns import InTurn, microbatches, place, rows_of
from research.train.update import Update
from research.train.watch import Clock

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
    run.step, run.state, run.clock, run.first = 0, learner.initial(reporter.say), Clock(), 0
    run.journal.log_every = 10**9
    batches, pending = learner.batches(0), None
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
        inputs = _bare_inputs(learner, run.state, run.step, batch)
        again = time.perf_counter()
        run.state = _bare_update(learner, inputs, run.state, run.step)
        jax.block_until_ready(run.state.params)
        if i >= WARM_UP:
            looped.append(1e3 * (middle - start))
            bare.append(1e3 * (time.perf_counter() - again))
    blocked = []
    for _ in range(SAVES):
        start = time.perf_counter()
        run._save()
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


def _bare_inputs(learner: Supervised, state: State, step: int, batches: Any) -> list[tuple[Any, Microbatch]]:
    """Program and what it trains on, in place, for each draw and each of its microbatches."""
    programs, setup = learner.programs, learner.setup
    accumulate, draws, phase, out = setup.config.train.accumulate, setup.draw(step), setup.phase(step), []
    in_turn = InTurn(setup, programs)
    for order, draw in enumerate(draws):
        for micro, which in enumerate(microbatches(draw, accumulate)):
            cut = {name: rows_of(batches[name], *which) for name in phase.streams}
            placed = {name: place(batch, programs) for name, batch in cut.items()}
            clock = np.array([step, which[0], order * accumulate + micro], np.uint32)
            program = in_turn.program_of(draw, draws, phase, placed)
            shape = program.microbatch(programs).teacher
            where = programs.layout.batch if program.distill else programs.layout.replicated
            whole = jax.device_put((clock, (np.float32(1), np.float32(1))), programs.layout.replicated)
            teacher = jax.device_put(np.zeros(shape.shape, shape.dtype), where)
            out.append((programs.get(program), Microbatch(placed, whole[0], whole[1], teacher)))
    return out


def _bare_update(learner: Supervised, inputs: list[tuple[Any, Microbatch]], state: State, step: int) -> State:
    share = (np.float32(1.0 / len(inputs)),) * 2
    for program, microbatch in inputs:
        found = program(learner.programs.held(state), learner._grads, dataclasses.replace(microbatch, scale=share))
        learner._grads = found.grads
    bare, *rest = due(state, np.int32(step), state.stats)
    state, learner._grads, _ = learner.programs.get(Update(learner.setup.phase(step).name))(bare, learner._grads, *rest)
    return state
