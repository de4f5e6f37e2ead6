"""Trains a recipe on machines of a Slurm cluster.

    python -m launch.slurm --nodes=2 --gpus_per_node=8 --time=12:00:00 --config=configs/fashion_fast.py \\
        --workdir=runs/pod --dry_run
    python -m launch.slurm --nodes=2 --gpus_per_node=8 --time=12:00:00 --config=configs/fashion_fast.py \\
        --workdir=runs/pod

Renders a batch script and gives it to sbatch; --dry_run prints it. One process a GPU, one a machine where there are
none. Before the time limit, and when the job is preempted, the run saves and the job goes back to the queue, where it
continues from its checkpoint; so it does after a node has failed. When one process is lost, srun ends the others.
"""

import shlex

from absl import flags

from launch import common, remote

_NODES = flags.DEFINE_integer("nodes", 1, "Machines.", lower_bound=1)
_GPUS = flags.DEFINE_integer(
    "gpus_per_node", 0, "GPUs of each machine, with a process each; 0: one process on its cores.", lower_bound=0
)
_CPUS = flags.DEFINE_integer("cpus_per_task", 8, "Cores of each process.", lower_bound=1)
_TIME = flags.DEFINE_string("time", "24:00:00", "Time limit, as of sbatch.")
_PARTITION = flags.DEFINE_string("partition", "", "Partition.")
_ACCOUNT = flags.DEFINE_string("account", "", "Account.")
_SAVE_S = flags.DEFINE_integer(
    "save_s", 120, "Seconds before the time limit at which the run saves and stops.", lower_bound=10
)


def render(overrides: dict[str, str]) -> str:
    """Returns the batch script."""
    words = remote.command(overrides, remote.interpreter())
    options = {
        "job-name": remote.name(),
        "nodes": _NODES.value,
        "ntasks-per-node": max(_GPUS.value, 1),
        "cpus-per-task": _CPUS.value,
        "gpus-per-node": _GPUS.value or None,
        "time": _TIME.value,
        "partition": _PARTITION.value or None,
        "account": _ACCOUNT.value or None,
        "signal": f"TERM@{_SAVE_S.value}",
        "open-mode": "append",
        "output": f"{remote.WORKDIR.value}/slurm.log",
    }
    head = "".join(f"#SBATCH --{key}={value}\n" for key, value in options.items() if value is not None)
    return f"""#!/bin/bash
{head}#SBATCH --requeue

cd {shlex.quote(remote.root())} || exit 1
mkdir -p {shlex.quote(remote.WORKDIR.value)}
srun --kill-on-bad-exit=1 {remote.lines(words)}
code=$?
# The run was told to stop, and has saved: it continues when the queue lets it.
if [ "$code" -eq {common.STOPPED} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def main(overrides: dict[str, str]) -> int:
    import os

    text = render(overrides)
    if not remote.DRY_RUN.value:
        os.makedirs(remote.WORKDIR.value, exist_ok=True)  # sbatch opens the log before the script runs
    return remote.hand_over(text, ["sbatch"])


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv)
