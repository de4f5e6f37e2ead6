"""Trains a recipe with several processes on this machine, and watches over them.

    python -m launch.local --processes=2 --config=configs/quickstart.py --workdir=runs/two
    python -m launch.local --processes=2 --devices=4 --config=configs/fashion_fast.py --workdir=runs/eight \\
        --config.mesh.fsdp=2

Every process is `launch.train` with the same recipe; together they make the batches and the numbers of one process.
Process 0 prints; what the others say, and all that libraries print, goes to WORKDIR/processes/N.log. When one dies, the
others, which would wait for it for ever, are ended and the cause is told in one line; --restarts=N starts all again
from the last checkpoint. SIGTERM, Ctrl-C and a closed terminal save and stop; a second Ctrl-C ends at once. Exit code
as of `launch.train`; 1 when a process was killed or crashed.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

from absl import flags

from launch import common, outputs
from research import stopping
from research.files import make_folder, open_anew

_CONFIG = common.path_flag("config", None, "Recipe: FILE.py or FILE.py:ARG.")
_WORKDIR = outputs.output_flag(
    "workdir", outputs.Place.RUN, "Directory of the run; made when missing, resumed when not."
)
_PROCESSES = flags.DEFINE_integer("processes", 2, "How many processes.", lower_bound=1)
_DEVICES = flags.DEFINE_integer(
    "devices", 1, "Simulated devices of each process, on a machine without accelerators.", lower_bound=1
)
_RESTARTS = flags.DEFINE_integer(
    "restarts", 0, "How often all are started again after one of them was killed or crashed.", lower_bound=0
)
_GRACE = flags.DEFINE_float("grace_s", 120.0, "Seconds that processes have to save when they are told to stop.")

CRASHED = 1
POLL_S = 0.1


@dataclass
class Ended:
    """How a process came to its end."""

    index: int
    code: int  # as of subprocess: negative is a signal

    def told(self, count: int, log: str) -> str:
        """Returns the cause in one line."""
        who = f"process {self.index} of {count}"
        if self.code < 0:
            name = signal.Signals(-self.code).name
            return f"{who} was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; see {log}"
        return f"{who} crashed with exit code {self.code}; see {log}"


class Supervisor:
    """Starts the processes, waits, and ends all of them when one is lost."""

    def __init__(self, command: list[str], workdir: str, count: int, devices: int):
        self.command, self.count, self.devices = command, count, devices
        self.folder = os.path.join(workdir, "processes")
        self.running: dict[int, subprocess.Popen] = {}
        self.stopped = 0.0  # when a signal came
        os.makedirs(workdir, exist_ok=True)
        make_folder(self.folder)

    def log(self, index: int) -> str:
        return os.path.join(self.folder, f"{index}.log")

    def _stop(self, *_) -> None:
        self.stopped = self.stopped or time.monotonic()
        for process in list(self.running.values()):
            process.terminate()

    def listen(self) -> None:
        """Has what stops this process stop the others."""
        with stopping.listening() as stop:  # as `common.run` does, to the end of the process
            stop.heed()
            stop.forward, stop.last = self._stop, self._end_all
            if stop:
                self.stopped = time.monotonic()

    def run(self) -> list[Ended]:
        """Trains once; returns how the processes ended, the first to end first."""
        port = _free_port()
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(self.devices)}
        with contextlib.ExitStack() as files:
            for i in range(self.count):
                log = files.enter_context(open_anew(self.log(i)))
                more = (
                    [f"--processes={self.count}", f"--process={i}", f"--coordinator=localhost:{port}"]
                    if self.count > 1
                    else []
                )
                out = None if i == 0 else log
                process = subprocess.Popen([*self.command, *more], stdout=out, stderr=log, env=environment)
                self.running[i] = process
                if self.count <= len(cores):
                    common.pin(process, cores[i :: self.count])
            if self.stopped:  # a signal came before they were known
                self._stop()
            try:
                return self._watch()
            finally:
                self._end_all()

    def _watch(self) -> list[Ended]:
        ended: list[Ended] = []
        while self.running:
            time.sleep(POLL_S)
            for i, process in list(self.running.items()):
                code = process.poll()
                if code is not None:
                    del self.running[i]
                    ended.append(Ended(i, code))
            lost = any(end.code not in (0, common.STOPPED) for end in ended)
            late = self.stopped and time.monotonic() - self.stopped > _GRACE.value
            if lost or late:  # what is not saved by now cannot be: a save needs every process
                break
        return ended

    def _end_all(self) -> None:
        for process in self.running.values():
            process.kill()
        for process in self.running.values():
            process.wait()
        self.running = {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _mistake(log: str) -> str:
    """Returns the last `error: ...` line of a log, "" where there is none."""
    with open(log, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.startswith("error: ")]
    return lines[-1] if lines else ""


def main(overrides: dict[str, str]) -> int:
    from launch import config as recipe
    from research.errors import UserError

    if not _CONFIG.value or not _WORKDIR.value:
        raise UserError(
            "--config and --workdir are needed, e.g. --processes=2 --config=configs/quickstart.py --workdir=runs/two"
        )
    recipe.load(_CONFIG.value, overrides, _WORKDIR.value)  # mistakes show before anything starts
    command = [sys.executable, "-m", "launch.train", f"--config={_CONFIG.value}", f"--workdir={_WORKDIR.value}"]
    command += [f"--config.{field}={value}" for field, value in overrides.items()]
    supervisor = Supervisor(command, _WORKDIR.value, _PROCESSES.value, _DEVICES.value)
    supervisor.listen()
    if supervisor.stopped:
        print("stopped before anything was started; start the same command again to begin", flush=True)
        return common.STOPPED
    for attempt in range(_RESTARTS.value + 1):
        ended = supervisor.run()
        lost = next((end for end in ended if end.code not in (0, common.STOPPED)), None)
        if lost is None:
            if len(ended) < _PROCESSES.value:
                print(
                    f"not every process had stopped {_GRACE.value:g} s after they were told to; "
                    "the last completed save counts",
                    file=sys.stderr,
                )
                return CRASHED
            return max(end.code for end in ended)
        if (
            supervisor.stopped and lost.code == -signal.SIGTERM
        ):  # it had not come so far as to listen, so nothing was trained
            print("stopped before every process had begun; start the same command again to begin", flush=True)
            return common.STOPPED
        if lost.code == common.USER_ERROR and (mistake := _mistake(supervisor.log(lost.index))):
            print(mistake, file=sys.stderr)
            return common.USER_ERROR
        again = attempt < _RESTARTS.value and not supervisor.stopped
        what = (
            "starting again from the last checkpoint"
            if again
            else "start the same command again to continue from the last checkpoint"
        )
        print(
            f"error: {lost.told(_PROCESSES.value, supervisor.log(lost.index))}; the others were ended, {what}",
            file=sys.stderr,
            flush=True,
        )
        if not again:
            break
    return CRASHED


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv, trains=True)
