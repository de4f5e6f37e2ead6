"""Different sub-networks on different devices in one program: every group of devices trains its own on its rows, and one update follows.

A step of the sorted scheme trains its networks one after the other, each on all devices; spread, it is one program whose branches hold no
collectives: each device takes the branch of its network, and only the gradients are summed. The numbers are those of the steps
one after the other, but for what looks across the rows of a batch: batch norm and mixing see a device's own rows, and running statistics stay.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from research.errors import UserError
from research.modules.mesh import BATCH_AXES
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


def program(branches: Sequence[Callable], mesh: Any, share: float) -> Callable:
    """Returns program(params, stats, grads, batch, clock, place) -> (grads, metrics of every device).

    Args:
      branches: of each network, its gradient program (see `Programs`).
      mesh: all of whose devices lie along `data`.
      share: factor of a device's gradients in the sum.
    """
    rows = PartitionSpec(BATCH_AXES)

    def branch(gradient: Callable) -> Callable:
        def run(params, stats, batch, clock):
            new, _, metrics, _ = gradient(
                params, stats, jax.tree.map(jnp.zeros_like, params), batch, clock, jnp.float32(share), jnp.float32(0)
            )
            return new, {k: jnp.reshape(v, (1,)) for k, v in metrics.items() if k != "experts"}

        return run

    def own(params, stats, batch, clock, place):
        new, metrics = jax.lax.switch(place[0], [branch(gradient) for gradient in branches], params, stats, batch, clock[0])
        return jax.lax.psum(new, BATCH_AXES), metrics

    def whole(params, stats, grads, batch, clock, place):
        everywhere = PartitionSpec()
        run = jax.shard_map(
            own, mesh=mesh, in_specs=(everywhere, everywhere, rows, rows, rows), out_specs=(everywhere, rows), check_vma=False
        )
        new, metrics = run(params, stats, batch, clock, place)
        metrics = jax.tree.map(lambda m: jax.lax.with_sharding_constraint(m, NamedSharding(mesh, everywhere)), metrics)
        return jax.tree.map(jnp.add, grads, new), metrics

    return whole


def places(programs: Any, step: int, draws: Sequence[Draw]) -> tuple[jax.Array, jax.Array]:
    """Returns (clock [D, 3] of every device, the place [D] of its network), on the devices of `Programs`."""
    devices = np.arange(programs.mesh.size, dtype=np.uint32)
    clock = np.stack([np.full_like(devices, step), devices, devices], 1)
    return place_whole(clock, programs.batch_sharding), place_whole(programs.spread_places(draws), programs.batch_sharding)


def per_network(metrics: Mapping[str, np.ndarray], draws: Sequence[Draw]) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Returns (name, means over its devices) of each draw, from the numbers of all devices."""
    means = {k: np.asarray(v).reshape(len(draws), -1).mean(1) for k, v in metrics.items()}
    return [(draw.name, {k: v[i] for k, v in means.items()}) for i, draw in enumerate(draws)]
