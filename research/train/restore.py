"""Reading checkpoints, which changes nothing: also on a read-only disk, also beside a training that saves and deletes steps meanwhile."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from research.errors import UserError
from research.train import processes
from research.train.manifests import MANIFEST, fault

TRIES = 20
"""How often another step is taken where the one that is read vanishes, because the training has deleted it."""
PAUSE_S = 0.2
"""Seconds before it is looked again whether all steps are damaged."""
_STEP = re.compile(r"0|[1-9][0-9]*")


def step_of(path: Path) -> int | None:
    """Returns the step that a name in the folder of checkpoints stands for, None where it is another's."""
    return int(path.name) if _STEP.fullmatch(path.name) else None


def whole_steps(folder: Path) -> list[int]:
    """Returns the steps whose save has finished, oldest first; their bytes are not looked at. No folder: none."""
    try:
        paths = list(folder.iterdir())
    except OSError:
        return []
    return sorted(step for p in paths if (step := step_of(p)) is not None and (p / MANIFEST).is_file())


def restore(folder: Path, step: int, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
    """Returns (state, run) of a step, each array placed by `shardings`.

    Args:
      folder: where step folders lie.
      shapes: of the state.

    Raises:
      UserError: the checkpoint does not have the arrays of this config.
    """
    import orbax.checkpoint as ocp

    target = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(target), run=ocp.args.JsonRestore())
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler("state", "run")) as checkpointer:
            out = checkpointer.restore(folder.absolute() / str(step), args=items)
    except (ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise UserError(f"checkpoint {step} in {folder} does not fit this config: {first}") from None
    return out["state"], out["run"]


def restore_newest(folder: Path, shapes: Any, shardings: Any, say: Callable[[str], None]) -> tuple[int, Any, dict[str, Any]]:
    """Returns (step, state, run) of the newest step whose every byte is as it was written.

    Args:
      folder, shapes, shardings: as of `restore`.
      say: called with a line for each newer step that is damaged.

    Raises:
      UserError: no step is whole yet, or it does not fit the config.
    """
    before: list[str] = []
    for _ in range(TRIES if jax.process_count() == 1 else 1):
        step, damaged = _newest_valid(folder)
        step = processes.agree(step)
        if step < 0:
            if damaged and damaged != before and jax.process_count() == 1:
                before = damaged  # or they are being deleted while the next one is sealed: look again
                time.sleep(PAUSE_S)
                continue
            if damaged:
                raise UserError(f"no step in {folder} is whole: {'; '.join(damaged[:3])}")
            raise UserError(f"no whole step is in {folder} yet; wait for the first save, or train it (python -m launch.train)")
        try:
            state, run = restore(folder, step, shapes, shardings)
        except Exception:
            if fault(folder / str(step), step) is None:
                raise
            continue  # deleted while it was read
        if fault(folder / str(step), step) is None:
            for line in damaged:
                say(line)
            return step, state, run
    raise UserError(f"every step in {folder} vanished while it was read: the training there saves and deletes faster; try again")


def _newest_valid(folder: Path) -> tuple[int, list[str]]:
    """Returns the newest step that is whole, -1 without one, and a line for each newer step that stays and is not."""
    faults: dict[int, str] = {}
    for step in reversed(whole_steps(folder)):
        problem = fault(folder / str(step), step)
        if problem is None:
            return step, _lines(folder, faults)
        faults[step] = problem
    return -1, _lines(folder, faults)


def _lines(folder: Path, faults: dict[int, str]) -> list[str]:
    """What is damaged for good: what the training deletes is gone, or its manifest soon is, when it is looked for again."""
    still = set(whole_steps(folder)) if faults else set()
    return [f"checkpoint {step} is not used: {problem}" for step, problem in faults.items() if step in still]
