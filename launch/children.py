"""Training in processes of their own, which end with the command that started them."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from queue import SimpleQueue

from launch import common
from research import stopping
from research.errors import UserError
from research.files import open_anew


class Children:
    """Processes of `launch.train`, so many at a time, each slot on its own cores where the system can pin."""

    def __init__(self, jobs: int = 1):
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.pinned = 1 < jobs <= len(cores)
        self.slots: SimpleQueue = SimpleQueue()
        for i in range(jobs):
            self.slots.put(cores[i::jobs])
        self.running: set[subprocess.Popen] = set()
        with stopping.listening() as stop:  # as `common.run` does, to the end of the process
            self.stop, stop.forward = stop, self._stop

    def _stop(self, *_) -> None:
        for process in list(self.running):  # they save and leave
            process.terminate()

    def train(self, config: str, workdir: str, fields: Mapping[str, str], log: str = "") -> int:
        """Trains in a free slot; returns the exit code, STOPPED where this process was told to stop.

        Args:
          config: recipe, FILE.py or FILE.py:ARG.
          fields: field -> text, of --config.FIELD.
          log: file for what it prints; "": where this process prints.
        """
        cores = self.slots.get()
        command = [sys.executable, "-m", "launch.train", f"--config={config}", f"--workdir={workdir}"]
        command += [f"--config.{field}={value}" for field, value in fields.items()] + common.plugin_flags()
        try:
            with self.stop.heeded():
                if self.stop:
                    return common.STOPPED
                if not log:
                    return self._wait(subprocess.Popen(command), cores)
                with open_anew(log) as file:
                    return self._wait(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT), cores)
        finally:
            self.slots.put(cores)

    def _wait(self, process: subprocess.Popen, cores: list[int]) -> int:
        self.running.add(process)
        if self.stop:  # a signal came before the process was known
            process.terminate()
        if self.pinned:
            common.pin(process, cores)
        try:
            code = process.wait()
            return (
                common.STOPPED if self.stop and code == -signal.SIGTERM else code
            )  # it had not come so far as to listen
        finally:
            self.running.discard(process)

    def train_alone(self, config: str, workdir: str, fields: Mapping[str, str]) -> None:
        """Trains, and ends this command where the process was told to stop.

        Raises:
          UserError: training failed.
        """
        code = self.train(config, workdir, fields)
        if code == common.STOPPED or self.stop:
            common.stopped(f"stopped by {self.stop.told or 'a signal'}; start the same command again to continue")
        if code:
            raise UserError(
                f"training --config={config} in {workdir} failed ({ending(code)}); what it said stands above"
            )


def ending(code: int) -> str:
    """Returns an exit code in words; negative ones are signals."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
