"""The flags by which several processes, on one machine or many, become one run."""

import os
import signal
from typing import Any

from absl import flags

from research import stopping
from research.errors import UserError

_PROCESSES = flags.DEFINE_integer("processes", 1, "Processes of the run, on all machines together.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", 0, "Which of them this is, from 0.", lower_bound=0)
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, the same for all.")
_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed", False, "Take the three flags above from the cluster: TPU pod slices, Slurm, Kubernetes, Open MPI."
)
_PEER_TIMEOUT = flags.DEFINE_integer(
    "peer_timeout_s", 100, "Seconds without a sign of life after which a process counts as dead."
)


def listen() -> None:
    """Where the run has other processes a signal only sets a flag from here on: they wait for this one, which must not
    end alone."""
    if _PROCESSES.value > 1 or _DISTRIBUTED.value:
        with stopping.listening() as stop:  # as `common.run` does, to the end of the process
            stop.heed()


def connect() -> bool:
    """Makes this process one of the run's, before JAX touches a device; returns whether it is the one that prints.

    Raises:
      UserError: flags that do not fit together, or peers that cannot be reached.
    """
    count, index = _PROCESSES.value, _PROCESS.value
    if count == 1 and not _DISTRIBUTED.value:
        return True
    if index >= count and not _DISTRIBUTED.value:
        raise UserError(f"--process={index} of --processes={count}; valid: 0..{count - 1}")
    if not _COORDINATOR.value and not _DISTRIBUTED.value:
        raise UserError(
            "--processes needs --coordinator=HOST:PORT, the address of process 0 (or --distributed inside a cluster)"
        )
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    import jax

    given: dict[str, Any] = (
        {}
        if _DISTRIBUTED.value
        else {"coordinator_address": _COORDINATOR.value, "num_processes": count, "process_id": index}
    )
    try:
        jax.distributed.initialize(
            **given,
            heartbeat_timeout_seconds=_PEER_TIMEOUT.value,
            initialization_timeout=300,
            shutdown_timeout_seconds=60,
        )
    except (RuntimeError, ValueError) as error:
        where = "the cluster" if _DISTRIBUTED.value else _COORDINATOR.value
        raise UserError(f"cannot join the run at {where}: {str(error).strip().splitlines()[0][:160]}") from None
    if jax.process_count() == 1:  # JAX listens to SIGTERM now, and asks nobody
        with stopping.listening() as stop:
            stop.take_back(signal.SIGTERM)
    return jax.process_index() == 0
