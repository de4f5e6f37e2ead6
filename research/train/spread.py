"""Different sub-networks on different devices in one program: every group of devices trains its own on its rows, and
one update follows.

A step of the sorted scheme trains its networks one after the other, each on all devices; spread, it is one program
whose branches hold no
collectives: each device takes the branch of its network, and only gradients and statistics are summed. The numbers are
  those of the steps
one after the other, but for what looks across the rows of a batch: batch norm, losses of routers and mixing see a
device's own rows.
"""

from collections.abc import Callable, Mapping, Sequence
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
from research.nested.schemes import Draw
from research.train.processes import place_whole


def check(config: dict[str, Any], mesh: Any) -> None:
    """Raises UserError where the config asks for spreading and the rest does not fit."""
    nested, train = config["nested"], config["train"]
    if not nested["spread"]:
        return
    whole = [axis for axis, size in mesh.shape.items() if size > 1 and axis != "data"]
    if nested["scheme"] != "sorted":
        raise UserError(
            f"nested.spread gives every network a part of the batch, nested.scheme={nested['scheme']!r} does not; valid: sorted"
        )
    if whole:
        raise UserError(f"nested.spread trains whole networks on single devices; set mesh.{whole[0]}=1")
    if train["accumulate"] > 1 or mesh.shape["data"] % nested["count"]:
        raise UserError(
            f"nested.spread divides {mesh.shape['data']} devices among nested.count={nested['count']} networks, with train.accumulate=1; "
            "choose a count that divides them"
        )


def program(
    branches: Sequence[Callable],
    mesh: Any,
    count: int,
    reduce: str,
    weight: Callable[[Any], Array | None],
    model: Abstract,
    full: int,
) -> Callable:
    """Returns program(params, stats, grads, batch, clock, place) -> (grads, statistics, (metrics of every device, their
    shares)).

    A network's loss is the mean over what the task counts on all of its devices. Statistics are those of the devices
    that train the full
    network: sums are added up, the rest is their mean; where there is none they stay.

    Args:
      branches: of each network, its gradient program (see `Programs`).
      mesh: all of whose devices lie along `data`.
      count: networks of an update.
      reduce: "mean" or "sum" of their losses.
      weight: what the task counts in a batch; None where all devices have the same.
      model: of the full network.
      full: its place among the branches.
    """
    rows, everywhere, devices = PartitionSpec(BATCH_AXES), PartitionSpec(), mesh.size
    each = 1 / count if reduce == "mean" else 1.0

    def branch(gradient: Callable) -> Callable:
        def run(params, stats, batch, clock, scale):
            zeros = jax.tree.map(jnp.zeros_like, params)
            new, after, metrics, _ = gradient(params, stats, zeros, batch, clock, scale, jnp.float32(0))
            return new, after, {k: jnp.reshape(v, (1,)) for k, v in metrics.items() if k != "experts"}

        return run

    def own(params, stats, batch, clock, place):
        share, layers = _share(weight(batch), count, devices), jnp.float32(each * count / devices)
        scale = (layers if weight(batch) is None else share * jnp.float32(each), layers)
        new, after, metrics = jax.lax.switch(
            place[0], [branch(gradient) for gradient in branches], params, stats, batch, clock[0], scale
        )
        moved = _moved(stats, after, place[0] == full, model)
        return jax.lax.psum(new, BATCH_AXES), moved, metrics, jnp.reshape(share, (1,))

    def whole(params, stats, grads, batch, clock, place):
        results = (everywhere, everywhere, rows, rows)
        run = jax.shard_map(
            own, mesh=mesh, in_specs=(everywhere, everywhere, rows, rows, rows), out_specs=results, check_vma=False
        )
        new, stats, metrics, shares = run(params, stats, batch, clock, place)
        gather = lambda m: jax.lax.with_sharding_constraint(m, NamedSharding(mesh, everywhere))  # noqa: E731
        return jax.tree.map(jnp.add, grads, new), stats, jax.tree.map(gather, (metrics, shares))

    return whole


def _share(weight: Array | None, count: int, devices: int) -> Float[Array, ""]:
    """A device's share in the loss of its network, by what the task counts in its rows."""
    if weight is None:
        return jnp.float32(count / devices)
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


def places(programs: Any, step: int, draws: Sequence[Draw]) -> tuple[jax.Array, jax.Array]:
    """Returns (clock [D, 3] of every device, the place [D] of its network), on the devices of `Programs`."""
    devices = np.arange(programs.mesh.size, dtype=np.uint32)
    clock = np.stack([np.full_like(devices, step), devices, devices], 1)
    return place_whole(clock, programs.batch_sharding), place_whole(
        programs.spread_places(draws), programs.batch_sharding
    )


def per_network(
    losses: tuple[Mapping[str, np.ndarray], np.ndarray], draws: Sequence[Draw]
) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Returns (name, means over its devices) of each draw, from the numbers and the shares of all devices."""
    metrics, shares = losses
    means = {k: (np.asarray(v, np.float64) * shares).reshape(len(draws), -1).sum(1) for k, v in metrics.items()}
    return [(draw.name, {k: v[i] for k, v in means.items()}) for i, draw in enumerate(draws)]
