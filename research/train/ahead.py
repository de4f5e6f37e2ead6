"""Which programs a run will surely need: they are compiled in the background, in the order of need, before data are
touched."""

import dataclasses
from typing import Any

import numpy as np

from research.train.evaluation import Evaluator
from research.train.programs import Programs
from research.train.setup import Setup
from research.train.update import teaches, weighs

LOOK_AHEAD = 50
"""Updates whose draws are looked at: a sub-network that is drawn later is compiled when it is."""


def compile_ahead(config: dict[str, Any], setup: Setup, programs: Programs, evaluator: Evaluator, step: int) -> None:
    """Starts compiling what a run needs that goes on at `step`."""
    params, stats = dict(programs.full.params), dict(programs.full.stats)
    bare = dataclasses.replace(programs.state_shapes, stats={})
    update = ("update", "", bare, params, np.int32(0), stats, stats)
    phases = list(dict.fromkeys(setup.phase(n) for n in range(len(setup.phases))))
    if config["nested"]["spread"]:
        batch, devices = setup.batch_shapes(config["data"]["batch_size"]), programs.mesh.size
        clock, places = np.zeros((devices, 3), np.uint32), np.zeros(devices, np.int32)
        for phase in phases:
            programs.prefetch("spread", "full", params, stats, params, batch, clock, places, phase=phase)
            programs.prefetch(*update, phase=phase)
    else:
        for i, ((name, distill, taught), parts) in enumerate(_drawn(setup, step).items()):
            batch = setup.batch_shapes(config["data"]["batch_size"] // parts // config["train"]["accumulate"])
            teacher = programs.outputs(batch) if distill else np.float32(0)
            args = (params, stats, params, batch, np.zeros(3, np.uint32), (np.float32(0), np.float32(0)), teacher)
            for phase in phases:
                programs.prefetch("gradient", name, *args, distill=distill, teaches=taught, phase=phase)
                if i == 0:
                    programs.prefetch(*update, phase=phase)
        if weighs(setup):
            programs.prefetch("weigh", "", (batch,) * config["train"]["accumulate"], np.float32(0))
    evaluator.prefetch(setup.order, params)


def _drawn(setup: Setup, step: int) -> dict[tuple[str, bool, bool], int]:
    """Returns (sub-network, whether it is distilled, whether it teaches) -> parts of its batch, of the draws that come
    next."""
    seen: dict[tuple[str, bool, bool], int] = {}
    for later in range(step, min(setup.total, step + LOOK_AHEAD)):
        draws = setup.draw(later)
        for draw in draws:
            seen.setdefault((draw.name, draw.distill, teaches(draw, draws)), draw.parts)
    return seen
