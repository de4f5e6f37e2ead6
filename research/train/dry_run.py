"""What a supervised run would be, without training: shapes, parameters, FLOPs, memory, programs and time."""

import math
from collections.abc import Sequence
from typing import Any

from research.modules.state import abstract
from research.report import machine
from research.train import costs
from research.train.compiler import Program
from research.train.learner import Foreseen
from research.train.plan import activation_bytes, held_bytes
from research.train.programs import Programs
from research.train.setup import Setup
from research.train.turns import Execution


def foresee(
    setup: Setup, programs: Programs, execution: Execution, wanted: Sequence[Program], flops: float
) -> Foreseen:
    """Returns what supervised training would be.

    Args:
      execution: of its updates.
      wanted: what is compiled.
      flops: of training, all devices together.
    """
    micro, draws = setup.config.data.batch_size // setup.microbatches, setup.draw(0)
    batch, first = setup.batch_shapes(micro), next(execution.gradient_programs(draws, setup.phase(0)))
    found = held_bytes(programs, batch, max(len(phase.streams) for phase in setup.phases))
    found["activations (estimate)"] = activation_bytes(programs, first, micro)
    return Foreseen(
        updates=setup.total,
        bytes=found,
        inputs={k: f"{v.dtype}{list(v.shape)}" for k, v in batch.items()},
        networks=[_network(name, setup.space.configs[name]) for name in setup.order],
        programs=[program.title for program in wanted],
        flops=flops,
        floor_s=flops / machine.gemm_rate() / math.prod(programs.mesh.devices.shape),
    )


def _network(name: str, config: Any) -> dict[str, Any]:
    return {"name": name, "params": abstract(config).num_params(), "flops": costs.forward_flops(config)}
