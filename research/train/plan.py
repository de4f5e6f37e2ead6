"""What a run would need on a mesh that need not exist: bytes a device, collectives of an update, and a floor of its
time.

Everything is lowered and compiled for simulated CPU devices; no array is made. Bytes of parameters, statistics,
optimizer and gradients are exact: those that the compiled programs take. Activations are an estimate of ours, what the
backward pass keeps of the forward one; the CPU compiler's own temporaries stand beside it, which differ: they hold the
backward pass's workspace and every copy that this backend makes, and it keeps bfloat16 products in float32. For the
same reason the collectives of a bfloat16 run appear in float32, twice the bytes of a chip's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal
from jax.sharding import PartitionSpec

from research.modules.mesh import BATCH_AXES
from research.nested.draws import Draw
from research.report.collectives import Collective, collectives
from research.report.roofline import Prediction, predict
from research.train import costs
from research.train.build import make_programs
from research.train.gradient import Gradient
from research.train.programs import Programs
from research.train.setup import Setup
from research.train.sharding import device_bytes
from research.train.state import Held, Microbatch
from research.train.turns import GradientProgram, make_execution
from research.train.update import Update


@dataclass(frozen=True)
class Plan:
    """What `plan` found; bytes are of one device.

    Attributes:
      devices: of the mesh.
      bytes: "parameters", "statistics", "optimizer", "methods", "brought" (networks that methods bring), "gradients",
        "batch" (of all streams of the phase).
      activations: estimate for one micro-batch.
      temporaries: program -> what the CPU compiler sets aside.
      arguments: program -> (bytes that the compiled program takes, bytes of the arrays by our own count; the rest, some
        numbers such as the step's, XLA leaves out where they are not used).
      collectives: program -> those of one run.
      runs: program -> how often an update runs it.
      flops: of an update, all devices together.
      traffic: bytes that one device reads and writes in an update, at least.
    """

    devices: int
    bytes: Mapping[str, int]
    activations: int
    temporaries: Mapping[str, int]
    arguments: Mapping[str, tuple[int, int]]
    collectives: Mapping[str, list[Collective]]
    runs: Mapping[str, int]
    flops: float
    traffic: float

    @property
    def total(self) -> int:
        return sum(self.bytes.values()) + self.activations

    def sent(self, slow_axes: tuple[str, ...] = ()) -> dict[bool, float]:
        """Returns bytes that one device sends in an update, by whether they cross one of `slow_axes` (the network
        between slices)."""
        out = {False: 0.0, True: 0.0}
        for program, found in self.collectives.items():
            for c in found:
                out[bool(set(c.axes) & set(slow_axes))] += c.sent * c.times * self.runs[program]
        return out

    def prediction(self, chip: str, slow_axes: tuple[str, ...] = ()) -> Prediction:
        """Returns the floor of an update's time on a chip."""
        return predict(chip, flops=self.flops / self.devices, memory_bytes=self.traffic, sent=self.sent(slow_axes))


def plan(setup: Setup) -> Plan:
    """Plans the updates of a run on the mesh of its config, over all (simulated) devices: of the full network, or of
    the networks that are trained in parallel."""
    programs = make_programs(setup)
    try:
        return _plan(setup, programs)
    finally:
        programs.close()


def _plan(setup: Setup, programs: Programs) -> Plan:
    config = setup.config
    micro = config.data.batch_size // setup.microbatches
    batch, phase = setup.batch_shapes(micro), setup.phase(0)
    execution = make_execution(setup, programs)
    draws = execution.planned()
    (gradient,) = execution.gradient_programs(draws, phase)
    params = dict(programs.full.params)
    held = held_bytes(programs, batch, len(phase.streams))
    state = held["parameters"] + held["statistics"] + held["optimizer"] + held["methods"]
    taken = {
        "gradient": sum(size for name, size in held.items() if name != "optimizer"),
        "update": state + held["gradients"],
    }
    compiled = {"gradient": programs.get(gradient), "update": programs.get(Update(phase.name))}
    memory = {name: program.memory_analysis() for name, program in compiled.items()}
    activations = activation_bytes(programs, gradient, micro)
    width = 2 if config.train.precision == "bfloat16" else 4
    weights = sum(math.prod(s.shape) for s in params.values())
    # The step reads the weights for the forward and the backward pass and reads and writes gradients, the update reads
    # and writes the state;
    # activations are written once and read once.
    per_run = 2 * weights * width / _shards(programs) + 2 * held["gradients"] + 2 * activations
    return Plan(
        devices=programs.mesh.size,
        bytes=held,
        activations=activations,
        temporaries={name: m.temp_size_in_bytes for name, m in memory.items()},
        arguments={name: (m.argument_size_in_bytes, taken[name]) for name, m in memory.items()},
        collectives={name: collectives(program.as_text(), programs.mesh) for name, program in compiled.items()},
        runs={"gradient": setup.microbatches, "update": 1},
        flops=sum(_flops(setup, draw) for draw in draws),
        traffic=per_run * setup.microbatches + 2 * state + 2 * held["gradients"],
    )


def _flops(setup: Setup, draw: Draw) -> float:
    """FLOPs of a network on all the microbatches of an update that it is planned for."""
    examples = setup.config.data.batch_size // draw.microbatches // setup.config.train.accumulate * setup.microbatches
    network = float(costs.training_flops(setup.space.configs[draw.name]))
    return network * setup.methods.work() * setup.task.work * examples


def held_bytes(programs: Programs, batch: Mapping[str, Any], streams: int) -> dict[str, int]:
    """Returns what an update holds -> its bytes on one device, see `Plan.bytes`.

    Args:
      batch: shapes of a microbatch of one stream.
      streams: whose microbatches a gradient program takes.
    """
    shapes, shardings, layout = programs.shapes, programs.shardings, programs.layout
    brought = programs.held_shapes().brought
    return {
        "parameters": device_bytes(shapes.params, shardings.params),
        "statistics": device_bytes(shapes.stats, shardings.stats),
        "optimizer": device_bytes(shapes.opt_state, shardings.opt_state),
        "methods": device_bytes(shapes.methods, shardings.methods),
        "brought": device_bytes(brought, programs.held_shardings().brought),
        "gradients": device_bytes(dict(programs.full.params), layout.params),
        "batch": streams * device_bytes(batch, jax.tree.map(lambda _: layout.batch, batch)),
    }


def _shards(programs: Programs) -> int:
    """Parts in which the products' weights stay cut while they are used; those cut over fsdp are gathered first."""
    shards: int = programs.mesh.shape["tensor"] * programs.mesh.shape["expert"]
    return shards


def activation_bytes(programs: Programs, program: GradientProgram, micro: int) -> int:
    """Returns about how many bytes the backward pass keeps of the forward one, on one device: of the network that keeps
    most, where devices train different ones.

    These are the residuals of JAX's linearization of a phase's objective, under the run's remat policy, of one
    microbatch; what is a parameter itself is not among them. Those of a batch are divided over the devices that divide
    the batch.
    """
    return max(_residual_bytes(programs, gradient, micro) for gradient in program.parts(programs))


def _residual_bytes(programs: Programs, gradient: Gradient, micro: int) -> int:
    def residuals(held: Held, microbatch: Microbatch) -> Any:
        loss = gradient.loss(programs, held, microbatch)
        return jax.vjp(lambda params: loss(params)[0], held.params)[1]

    shapes = (programs.held_shapes(), gradient.microbatch(programs))
    traced = jax.make_jaxpr(residuals)(*shapes).jaxpr
    given = set(traced.invars)
    kept = {var for var in traced.outvars if not isinstance(var, Literal)}
    total = 0
    for var in kept - given:
        shape, dtype = var.aval.shape, var.aval.dtype
        size = math.prod(shape) * (np.dtype(dtype).itemsize if np.issubdtype(dtype, np.generic) else 8)
        total += size // _batch_shards(shape, micro, programs)
    return total


def _batch_shards(shape: tuple[int, ...], micro: int, programs: Programs) -> int:
    """Devices over which an array with an axis of the batch (or of its tokens) is divided."""
    spec = PartitionSpec(BATCH_AXES)
    shards = math.prod(programs.mesh.shape[axis] for axis in spec[0])
    return shards if any(size and size % micro == 0 for size in shape) else 1
