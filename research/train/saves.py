"""The checkpoints of a run as its loop sees them: which step is on disk, and a last save that is not given up."""

import contextlib
from collections.abc import Callable
from typing import Any

from research.errors import UserError
from research.train import processes
from research.train.checkpoint import Checkpoints

TRIES = 9
"""How often the last save is tried while the clock jumps."""


class Saves:
    """Saves into `checkpoints`; `step` is the last one that was started, -1 without one."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints, self.step = checkpoints, -1

    def start(self, step: int, state: Any, run: dict[str, Any]) -> None:
        """Starts saving, see `Checkpoints.save`."""
        self.checkpoints.save(step, state, run)
        self.step = step

    def done(self, step: int) -> bool:
        """Whether a step is on disk, everywhere; waits for a save that is under way, which may yet be given up."""
        return self.step == step and processes.everywhere(self.checkpoints.wait())

    def surely(self, step: int, save: Callable[[], None]) -> None:
        """The last save of a process: there is no next one that would make up for it.

        Args:
          save: starts it.
        """
        for _ in range(TRIES):
            save()
            if self.done(step):
                return
        raise UserError(
            f"the state could not be saved in {TRIES} tries, because the clock keeps jumping; {self.safe()}"
        )

    def safe(self) -> str:
        """Returns what a run that ends here continues from; waits for a save that is under way."""
        with contextlib.suppress(UserError):
            self.checkpoints.wait()
        return self.on_disk()

    def on_disk(self) -> str:
        """Returns the newest step that is on disk, in words."""
        steps = self.checkpoints.steps()
        where = f"last good checkpoint: step {steps[-1]} in {self.checkpoints.folder}" if steps else ""
        return where or "no checkpoint was written yet"

    def newest(self) -> int:
        """Returns the newest step that is on disk, 0 without one."""
        return max(self.checkpoints.steps(), default=0)
