"""Several processes as one run: what is agreed on, who writes, and which rows of a batch are whose.

All processes run the same loop on the same numbers. The first one alone writes the run's files; checkpoints are written
by all together (orbax). With one process nothing here costs anything.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from research import stopping
from research.errors import UserError
from research.modules.mesh import BATCH_AXES
from research.stopping import Stop


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(value: int) -> int:
    """Returns the first process's value, everywhere."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def texts(own: str) -> list[str]:
    """Returns the text of every process, everywhere, by the index of the process."""
    if jax.process_count() == 1:
        return [own]
    from jax.experimental import multihost_utils

    letters = np.frombuffer(own.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(letters))))
    rows = multihost_utils.process_allgather(
        np.pad(letters, (0, int(sizes.max()) + 1 - len(letters)))
    )  # no row is empty
    return [bytes(row[:size]).decode() for row, size in zip(np.asarray(rows, np.uint8), sizes, strict=True)]


def same(own: str, what: str) -> None:
    """Raises RuntimeError unless a text is the same in every process."""
    if len(set(texts(own))) > 1:
        raise RuntimeError(f"{what} is not the same in every process")


def gathered(array: Any) -> Any:
    """Returns an array whole, also where its parts lie on devices of other processes. All processes must call it."""
    if jax.process_count() == 1:
        return jax.device_get(array)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)


def everywhere(value: bool) -> bool:
    """Returns whether it holds in every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.bool_(value))))


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """Yields what tells this process to stop, and has it stop all of several: JAX tells the others of SIGTERM, see
    `told_to_stop`."""
    if jax.process_count() == 1:
        with stopping.listening() as stop:
            yield stop
        return
    terminate: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with stopping.listening(leave=("SIGTERM",)) as stop:
        stop.heed()
        stop.forward = lambda number: terminate() if number != signal.SIGTERM else None
        if stop:
            terminate()
        yield stop


def told_to_stop(step: int) -> bool:
    """Whether some process got SIGTERM and this is the step that all of them reach: there they save and stop. Call at
    every step."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): this process holds the index-th of count equal parts of every batch.

    Processes whose devices hold the same rows (a tensor axis that spans them) have the same index.

    Raises:
      UserError: the rows of this process's devices are not such a part.
    """
    if jax.process_count() == 1:
        return 0, 1
    size = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    places = sharding.addressable_devices_indices_map((size,)).values()
    rows = sorted({index[0].indices(size)[0] for index in places if index is not None})
    if rows != list(range(rows[0], rows[0] + len(rows))) or size % len(rows) or rows[0] % len(rows):
        raise UserError(
            f"the mesh gives process {jax.process_index()} the rows {rows} of {size}: no equal part of the batch; "
            "reorder its axes"
        )
    return rows[0] // len(rows), size // len(rows)


def place_rows(batch: Mapping[str, np.ndarray], sharding: Sharding, count: int) -> dict[str, jax.Array]:
    """Puts this process's part, one of `count`, of every array of a batch on its devices."""
    if jax.process_count() == 1:
        placed: dict[str, jax.Array] = jax.device_put(dict(batch), sharding)  # less host time than the general call
        return placed
    put: Callable[..., jax.Array] = jax.make_array_from_process_local_data
    return {k: put(sharding, v, (count * v.shape[0], *v.shape[1:])) for k, v in batch.items()}


def place_whole(tree: Any, sharding: Sharding) -> Any:
    """Puts arrays that every process has in full where they belong."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(value: Any) -> jax.Array:
        host = np.asarray(value)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)
