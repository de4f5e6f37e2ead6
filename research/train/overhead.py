"""What the loop adds to the bare jitted step: both, interleaved, in one run."""

import time
from typing import Any

import jax
import numpy as np

from research.nested.schemes import Draw
from research.train.evaluation import place
from research.train.loop import Clock, Reporter, Run
from research.train.state import State
from research.train.update import part_of, teaches

WARM_UP = 20
SAVES, BETWEEN_SAVES = 9, 5


def loop_overhead(
    config: dict[str, Any], steps: int, workdir: str, reporter: Reporter
) -> tuple[list[dict[str, Any]], float]:
    """Times `steps` updates of the loop and as many bare ones, in turns.

    An update of the loop takes the batch from the pipeline, places it, runs the gradient programs and the update
    program, and reads the metrics of the update before. The bare one runs the same programs on the same batch, already
    in place. Then some checkpoints are saved, a few updates apart: how long the loop waits before it may go on.

    Returns:
      (a row for each with median and 95th percentile in ms, median over neighbouring pairs of loop / bare - 1).
    """
    run = Run(config, workdir, reporter)
    run.step, run.state, run.clock, run.first = 0, run.programs.init_state(), Clock(), 0
    run.journal.log_every = 10**9
    batches, grads, pending = run.setup.batches(0), run.programs.zero_grads(), None
    looped: list[float] = []
    bare: list[float] = []
    for i in range(steps + WARM_UP):
        start = time.perf_counter()
        batch, draws = next(batches), run.setup.draw(run.step)
        grads, metrics = run.update(batch, draws, grads)
        run.step += 1
        run.journal.read(pending)
        pending = (run.step, draws, metrics)
        jax.block_until_ready(run.state.params)
        middle = time.perf_counter()
        inputs = _bare_inputs(run, batch, draws)
        again = time.perf_counter()
        grads = _bare_update(run, inputs, grads)
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
            grads, _ = run.update(next(batches), run.setup.draw(run.step), grads)
            run.step += 1
        jax.block_until_ready(run.state.params)
    run.heart.close()
    run.checkpoints.close()
    run.programs.close()
    run.rundir.close()
    rows = [
        {"what": what, "median_ms": float(np.median(times)), "p95_ms": float(np.percentile(times, 95))}
        for what, times in (("bare jitted step", bare), ("update of the loop", looped), ("blocked by a save", blocked))
    ]
    # Neighbours run the same sub-networks, so their ratio is free of the draw.
    return rows, float(np.median(np.array(looped) / np.array(bare))) - 1


def _bare_inputs(run: Run, batch: dict[str, np.ndarray], draws: tuple[Draw, ...]) -> list[tuple[Any, ...]]:
    """Program, batch in place, clock and teacher for each part of the batch and each draw."""
    programs, accumulate, out = run.programs, run.config["train"]["accumulate"], []
    for order, draw in enumerate(draws):
        for micro in range(accumulate):
            slot = draw.part * accumulate + micro
            placed = place(part_of(batch, slot, draw.parts * accumulate), programs)
            clock = jax.device_put(
                np.array([run.step, slot, order * accumulate + micro], np.uint32), programs.replicated
            )
            shape = programs.outputs(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), placed))
            teacher = np.zeros(shape.shape, shape.dtype) if draw.distill else np.float32(0)
            teacher = jax.device_put(teacher, programs.batch_sharding if draw.distill else programs.replicated)
            args = (
                run.state.params,
                run.state.stats,
                programs.full.params,
                placed,
                clock,
                (np.float32(1), np.float32(1)),
                teacher,
            )
            which = {"distill": draw.distill, "teaches": teaches(draw, draws), "phase": run.setup.phase(run.step)}
            out.append((programs.get("gradient", draw.name, *args, **which), placed, clock, teacher))
    return out


def _bare_update(run: Run, inputs: list[tuple[Any, ...]], grads: Any) -> Any:
    share = (np.float32(1.0 / len(inputs)),) * 2
    for program, placed, clock, teacher in inputs:
        grads, _, _, _ = program(run.state.params, run.state.stats, grads, placed, clock, share, teacher)
    bare = State(run.state.params, {}, run.state.opt_state, run.state.ema)
    args = (bare, grads, np.int32(run.step), run.state.stats, run.state.stats)
    run.state, grads, _ = run.programs.get("update", "", *args, phase=run.setup.phase(run.step))(*args)
    return grads
