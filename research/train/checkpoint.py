"""Checkpoints of the run that is being trained: orbax saves asynchronously; a SHA-256 manifest, written last, makes a
step exist.

Orbax alone restores flipped bits silently and takes an empty step folder for the latest. Here a step without a valid
manifest does not exist: it is moved to `checkpoints/rejected/` with a message, and the one before is used.
Only who holds the run's lock may make these objects, which clean up; whoever reads a run uses `restore.py`.
"""

import contextlib
import errno
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from research.errors import UserError
from research.files import make_folder, make_linked_folder
from research.train import processes, restore
from research.train.manifests import fault, write_manifest
from research.train.restore import step_of, whole_steps

PATIENCE_S = 120
"""Seconds after which a save that timed out is believed to have: orbax asks the time of day, which may jump."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where step folders lie; may be a link to another disk, but nothing below it.
      keep_last: how many of the newest stay; two at least, so that one is whole while the next is written.
      keep_every: steps divisible by it stay as well; 0 switches that off.
      keep_best: keeps the step with the best metric as well.
      metrics: step -> metric, where it is known; may change between saves, since a step is evaluated after its save.
      higher_is_better: whether the best is the largest.
      say: called with a line for humans when something is amiss.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        keep_best: bool = True,
        metrics: Mapping[int, float] | None = None,
        higher_is_better: bool = True,
        say: Callable[[str], None] = lambda _: None,
    ):
        import orbax.checkpoint as ocp

        self.folder, self._say, self._ocp = make_linked_folder(Path(folder).absolute()), say, ocp
        if processes.is_first():
            self._reject_invalid()
        processes.barrier("checkpoints are verified")
        policies = [
            ocp.checkpoint_managers.LatestN(max(keep_last, 2))
        ]  # orbax deletes the one before, when a new step has no manifest yet
        if keep_every:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        self._best = _Best({} if metrics is None else metrics, higher_is_better)
        if keep_best:
            policies.append(self._best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "run"))
        self._sealing: threading.Thread | None = None
        self._began = 0.0
        self._failure: BaseException | None = None
        self._gave_up = False

    def _reject_invalid(self) -> None:
        """Moves away what has the name of a step and is none. Other names are somebody else's."""
        for path in sorted(self.folder.iterdir()):
            step = step_of(path)
            problem = None if step is None else fault(path, step) if path.is_dir() else "it is no folder"
            if problem is None:
                continue
            target = make_folder(self.folder / "rejected") / path.name
            number = 0
            while os.path.lexists(target):
                number += 1
                target = target.with_name(f"{path.name}.{number}")
            os.rename(path, target)
            self._say(
                f"checkpoint {path.name} is not used: {problem}; moved to {target.relative_to(self.folder.parent)}"
            )

    def steps(self) -> list[int]:
        """Steps that exist, oldest first."""
        return whole_steps(self.folder)

    def save(self, step: int, state: Any, run: dict[str, Any]) -> None:
        """Starts saving; `run` is JSON. Waits for the save before it, raises what that one met.

        Raises:
          UserError: the disk is full or cannot be written.
        """
        self.wait()
        args = self._ocp.args
        items = args.Composite(state=args.StandardSave(state), run=args.JsonSave(run))
        self._began = time.monotonic()
        with self._disk_errors(step), self._late():
            self._manager.save(step, args=items, force=True)
        self._sealing = threading.Thread(target=self._seal, args=(step,), name="seal")
        self._sealing.start()

    @contextlib.contextmanager
    def _late(self) -> Iterator[None]:
        """Keeps what `wait` is to judge."""
        try:
            yield
        except OSError as error:
            if not self._is_late(error):
                raise
            self._failure = error

    def _is_late(self, error: BaseException) -> bool:
        """Whether a save ended only because orbax thought it late, or because one that was given up for that still
        writes in its folder."""
        return isinstance(error, TimeoutError) or (
            self._gave_up and isinstance(error, OSError) and error.errno == errno.ENOTEMPTY
        )

    def _seal(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            folder = self.folder / str(step)
            if folder.is_dir() and processes.is_first():
                write_manifest(folder, step)
        except BaseException as error:  # handed to the thread that calls wait()
            self._failure = error

    def wait(self) -> bool:
        """Waits until the last save is on disk with its manifest; False where it is not, because the clock jumped
        meanwhile.

        Raises:
          UserError: it could not be written.
        """
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            if self._is_late(failure) and time.monotonic() - self._began < PATIENCE_S:
                self._gave_up = True
                time.sleep(0.2)  # what still writes for the save before ends meanwhile
                self._say(
                    "a checkpoint was given up, because the clock jumped while it was written; the next one counts"
                )
                return False
            with self._disk_errors(None):
                raise failure
        return True

    def _disk_errors(self, step: int | None) -> "_DiskErrors":
        return _DiskErrors(self, step)

    def restore(self, step: int, wanted: restore.Wanted) -> tuple[Any, dict[str, Any]]:
        """Returns (state, run) of a step, each array placed by its sharding.

        Raises:
          UserError: the checkpoint does not have the arrays of this config.
        """
        return restore.restore(self.folder, step, wanted)

    def about(self, step: int) -> dict[str, Any]:
        """Returns what a step holds beside the state, see `Learner.describe`."""
        return restore.about(self.folder, step)

    def best_step(self) -> int | None:
        """Step with the best metric of those that exist, None without metrics."""
        return self._best.of(self.steps())

    def close(self) -> None:
        """Waits for the last save and ends.

        Raises:
          UserError: it could not be written.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def abandon(self) -> None:
        """Ends a save that is under way, well or not, where a run ends for another reason: its threads must not outlive
        the interpreter."""
        with contextlib.suppress(Exception):
            self.close()


class _Best:
    """A policy of orbax that preserves the step with the best metric, which it need not know when it saves it."""

    def __init__(self, metrics: Mapping[int, float], higher_is_better: bool):
        self.metrics, self.sign = metrics, 1 if higher_is_better else -1

    def of(self, steps: Sequence[int]) -> int | None:
        """Returns the best of some steps, the latest of equal ones."""
        known = [step for step in steps if math.isfinite(self.metrics.get(step, math.nan))]
        return max(known, key=lambda step: (self.sign * self.metrics[step], step), default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best = self.of([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]


class _DiskErrors:
    """Turns errors of the disk into one line that names what is still there."""

    def __init__(self, owner: Checkpoints, step: int | None):
        self.owner, self.step = owner, step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> Literal[False]:
        if error is None:
            return False
        text = str(error)
        known = next((row for row in REFUSALS if row[0] in text), None)
        if known is None and not isinstance(error, OSError | UserError):
            return False
        _, cause, remedy = known or ("", text.strip().splitlines()[0][:160], "Mend that")
        left = self.owner.steps()
        good = f"step {left[-1]} is safe" if left else "no earlier checkpoint exists"
        raise UserError(
            f"cannot save a checkpoint in {self.owner.folder}: {cause}; {good}. {remedy} and start again to continue"
        ) from None


REFUSALS = (
    ("space left", "no space left on the disk", "Free space"),
    ("Disk quota", "the disk quota is used up", "Free some of it"),
    ("Too many open files", "this process may not open more files", "Raise the limit (ulimit -n 4096)"),
    ("File too large", "a file would become larger than it may", "Raise the limit (ulimit -f unlimited)"),
    ("Permission denied", "permission denied", "Get the right to write there"),
    ("Read-only", "the disk is read-only", "Make it writable"),
    ("Cannot allocate memory", "memory ran out", "End other programs"),
    ("RESOURCE_EXHAUSTED", "memory ran out", "End other programs"),
)
"""What the text of an error has, be it of Python's or of the writers of orbax; what it means; what to do."""
