"""`nested.execution=parallel`: different sub-networks on different devices in one program; every group of devices
trains its own on its rows, and one update follows.

Where the networks of an update are trained one after the other, each uses all devices; in parallel it is one program
whose branches hold no collectives: each device takes the branch of its network, and only gradients and statistics are
summed. The numbers are those of one after the other, but for what looks across the rows of a batch: batch norm, losses
of routers and mixing see a device's local shard of the batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from research.errors import UserError
from research.modules.axes import StatKind
from research.modules.mesh import BATCH_AXES
from research.modules.state import Abstract, Arrays
from research.nested.draws import Draw
from research.tasks.base import Batch
from research.train.gradient import Gradient
from research.train.layout import Shapes, structs
from research.train.methods import Methods
from research.train.processes import place_whole
from research.train.programs import Programs
from research.train.sections import RunConfig
from research.train.state import Gradients, Held, Microbatch, Rows

_Made = tuple[Arrays, Arrays, Arrays]
"""(gradients, statistics, numbers) of a network on a device."""


def check(config: RunConfig, methods: Methods, draws: Sequence[Draw], mesh: Any) -> None:
    """Judges whether the networks of an update can be trained in parallel.

    Raises:
      UserError: they do not each have a microbatch of their own, or the rest does not fit.
    """
    whole = [axis for axis, size in mesh.shape.items() if size > 1 and axis != "data"]
    count = len(draws)
    if count < 2 or any((draw.microbatch, draw.microbatches) != (k, count) for k, draw in enumerate(draws)):
        raise UserError(
            f"nested.execution=parallel trains networks that have a microbatch each, which methods="
            f"{methods.names} does not give; valid: methods with 'sorted'"
        )
    if len(methods.streams()) > 1:
        raise UserError("nested.execution=parallel takes one stream of batches; choose nested.execution=sliced")
    if whole:
        raise UserError(f"nested.execution=parallel trains whole networks on single devices; set mesh.{whole[0]}=1")
    if config.train.accumulate > 1 or mesh.shape["data"] % count:
        raise UserError(
            f"nested.execution=parallel divides {mesh.shape['data']} devices among {count} networks of an update, with "
            "train.accumulate=1; choose a count that divides them"
        )


@dataclass(frozen=True)
class Parallel:
    """Adds the gradients of all networks of an update: (held, grads, rows) -> `Gradients`.

    A network's loss is the mean over what the task counts on all of its devices. Statistics are those of the devices
    that train the full network: sums are added up, the rest is their mean; where there is none they stay.

    Attributes:
      names: of the networks that devices may train.
      batch: shapes of the whole batch.
      count: networks of an update.
      mean: whether their losses are averaged, else summed.
      phase: of the update.
    """

    names: tuple[str, ...]
    batch: Shapes
    count: int
    mean: bool
    phase: str = "all"
    title = "parallel gradient"

    def rarely(self, programs: Programs) -> bool:
        del programs
        return False

    def lower(self, programs: Programs) -> jax.stages.Lowered:
        layout, devices = programs.layout, programs.mesh.size
        program = jax.jit(
            self.program(programs),
            in_shardings=(programs.held_shardings(), layout.params, Rows(layout.batch, layout.batch, layout.batch)),
            out_shardings=Gradients(layout.params, layout.stats, layout.replicated, None),
            donate_argnums=(1,),
        )
        clock, place = (
            jax.ShapeDtypeStruct((devices, 4), np.uint32),
            jax.ShapeDtypeStruct((devices,), np.int32),
        )
        grads = dict(programs.full.params)
        with jax.set_mesh(layout.mesh):
            return program.lower(programs.held_shapes(), grads, Rows(structs(self.batch), clock, place))

    def parts(self, programs: Programs) -> tuple[Gradient, ...]:
        """Returns the gradient of each network, one of which a device computes on its rows."""
        stream = programs.phases[self.phase].streams[0]
        return tuple(Gradient(name, ((stream, self.batch),), self.phase) for name in self.names)

    def program(self, programs: Programs) -> Callable[..., Any]:
        """Returns the function, over the whole mesh."""
        mesh, model, devices, task = programs.mesh, programs.full, programs.mesh.size, programs.task
        cut, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
        each = 1 / self.count if self.mean else 1.0
        full = self.names.index(programs.layout.canonical("full"))
        stream = programs.phases[self.phase].streams[0]
        gradients = [gradient.program(programs) for gradient in self.parts(programs)]

        def branch(gradient: Callable[..., Gradients]) -> Callable[..., _Made]:
            def run(held: Held, batch: Batch, clock: Array, scale: tuple[Array, Array]) -> _Made:
                zeros = jax.tree.map(jnp.zeros_like, held.params)
                found = gradient(held, zeros, Microbatch({stream: batch}, clock, scale, jnp.float32(0)))
                measured = {k: jnp.reshape(v, (1,)) for k, v in found.measured.items() if k != "logged"}
                return found.grads, found.stats, measured

            return run

        def own(held: Held, batch: Batch, clock: Array, place: Array) -> tuple[Arrays, Arrays, Arrays, Array]:
            weight = task.weight(batch)
            share, layers = _share(weight, self.count, devices), jnp.float32(each * self.count / devices)
            scale = (layers if weight is None else share * jnp.float32(each), layers)
            branches = [branch(gradient) for gradient in gradients]
            new, after, measured = jax.lax.switch(place[0], branches, held, batch, clock[0], scale)
            moved = _moved(held.stats, after, place[0] == full, model)
            return jax.lax.psum(new, BATCH_AXES), moved, measured, jnp.reshape(share, (1,))

        def whole(held: Held, grads: Arrays, rows: Rows) -> Gradients:
            run: Callable[..., tuple[Arrays, Arrays, Arrays, Array]] = jax.shard_map(
                own,
                mesh=mesh,
                in_specs=(everywhere, cut, cut, cut),
                out_specs=(everywhere, everywhere, cut, cut),
                check_vma=False,
            )
            new, stats, measured, shares = run(held, rows.batch, rows.clock, rows.place)
            gather: Callable[[Array], Array] = lambda m: jax.lax.with_sharding_constraint(
                m, NamedSharding(mesh, everywhere)
            )
            logged = {name: stats[name] for name in model.stats_of(StatKind.LOG)}
            numbers = (*jax.tree.map(gather, (measured, shares)), logged)
            return Gradients(jax.tree.map(jnp.add, grads, new), stats, numbers, None)

        return whole


def _share(weight: Array | None, count: int, devices: int) -> Float[Array, ""]:
    """A device's share in the loss of its network, by what the task counts in its rows."""
    if weight is None:
        alone: Array = jnp.float32(count / devices)
        return alone
    group = jax.lax.axis_index(BATCH_AXES) * count // devices
    weight = jnp.asarray(weight, jnp.float32)
    total = jax.lax.psum(weight * jax.nn.one_hot(group, count), BATCH_AXES)[group]
    return weight / jnp.maximum(total, 1e-20)


def _moved(before: Arrays, after: Arrays, is_full: Array, model: Abstract) -> Arrays:
    """The statistics after an update, of all devices."""
    number = jax.lax.psum(is_full.astype(jnp.float32), BATCH_AXES)
    out = dict(before)
    for name in model.stats_of(StatKind.MOMENT, StatKind.LOG, StatKind.LOSS, StatKind.SUM):
        total = jax.lax.psum(jnp.where(is_full, after[name], 0), BATCH_AXES)
        mean = total if model.stat_kinds[name] is StatKind.SUM else total / jnp.maximum(number, 1)
        out[name] = jnp.where(number > 0, mean.astype(total.dtype), before[name])
    return out


def places(programs: Programs, names: Sequence[str], step: int, draws: Sequence[Draw]) -> tuple[jax.Array, jax.Array]:
    """Returns (clock [D, 4] of every device, the place [D] of its network in `names`), on the devices.

    Consecutive devices hold the rows of one microbatch.
    """
    devices = np.arange(programs.mesh.size, dtype=np.uint32)
    draw = devices * len(draws) // len(devices)
    clock = np.stack([np.full_like(devices, step), devices, devices, draw], 1)
    own = [names.index(programs.layout.canonical(draw.name)) for draw in draws]
    place = np.repeat(np.array(own, np.int32), programs.mesh.size // len(draws))
    return place_whole(clock, programs.layout.batch), place_whole(place, programs.layout.batch)


def per_network(
    measured: tuple[Mapping[str, np.ndarray], np.ndarray, Mapping[str, np.ndarray]], draws: Sequence[Draw]
) -> list[tuple[str, dict[str, Any]]]:
    """Returns (name, means over its devices) of each draw, from the numbers and the shares of all devices; with what
    layers of the full network tell of themselves, once."""
    numbers, shares, logged = measured
    means = {k: (np.asarray(v, np.float64) * shares).reshape(len(draws), -1).sum(1) for k, v in numbers.items()}
    out: list[tuple[str, dict[str, Any]]] = [(d.name, {k: v[i] for k, v in means.items()}) for i, d in enumerate(draws)]
    for name, own in out:
        if name == "full":
            own["logged"] = logged
            break
    return out
