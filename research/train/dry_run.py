"""What a run would be, without training: shapes, parameters, FLOPs, memory, programs to compile, an estimate of the
time."""

import math
from dataclasses import dataclass
from typing import Any

from research.modules.state import abstract
from research.report import machine
from research.train import costs
from research.train.evaluation import Evaluator
from research.train.gradient import Gradient
from research.train.plan import activation_bytes, held_bytes
from research.train.supervised import LOOK_AHEAD, Supervised

USUAL_MFU = 0.25
"""Share of the rate of matrix products that training reaches, as the estimate of the time takes it."""


@dataclass(frozen=True)
class Foreseen:
    """What `foresee` found; bytes are of one device.

    Attributes:
      inputs: entry of a batch -> its shape and type.
      networks: name, parameters and FLOPs of one example's forward pass.
      updates: of the run.
      bytes: what -> how many.
      programs: titles of the programs that are compiled.
      flops: of training, all devices together.
      floor_s: seconds at the rate of matrix products.
    """

    inputs: dict[str, str]
    networks: list[dict[str, Any]]
    updates: int
    bytes: dict[str, int]
    programs: list[str]
    flops: float
    floor_s: float

    @property
    def estimate_s(self) -> float:
        """Seconds of training at `USUAL_MFU`, without compiling, evaluating and saving."""
        return self.floor_s / USUAL_MFU


def foresee(learner: Supervised) -> Foreseen:
    """Looks at the updates of a run that come first, without compiling or running anything."""
    setup, programs = learner.setup, learner.programs
    wanted = list(dict.fromkeys(learner.needed(0)))
    evaluator = Evaluator(setup, programs)
    wanted += [program for name in setup.order for program in evaluator.needed(name)]
    micro = setup.config.data.batch_size // setup.microbatches
    batch = setup.batch_shapes(micro)
    gradient = next((program for program in wanted if isinstance(program, Gradient)), None)
    found = held_bytes(programs, batch, max(len(phase.streams) for phase in setup.phases))
    if gradient is not None:
        found["activations (estimate)"] = activation_bytes(programs, gradient, micro)
    ahead = min(setup.total, LOOK_AHEAD)
    flops = sum(learner.flops_of(draw) for step in range(ahead) for draw in setup.draw(step)) / ahead * setup.total
    return Foreseen(
        inputs={k: f"{v.dtype}{list(v.shape)}" for k, v in setup.batch_shapes(micro).items()},
        networks=[_network(name, setup.space.configs[name]) for name in setup.order],
        updates=setup.total,
        bytes=found,
        programs=[program.title for program in wanted],
        flops=flops,
        floor_s=flops / machine.gemm_rate() / math.prod(programs.mesh.devices.shape),
    )


def _network(name: str, config: Any) -> dict[str, Any]:
    return {"name": name, "params": abstract(config).num_params(), "flops": costs.forward_flops(config)}
