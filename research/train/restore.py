"""Reading checkpoints, which changes nothing: also on a read-only disk, also beside a training that saves and deletes
steps meanwhile."""

import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
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
OPTIMIZER = "opt_state"
"""Name of the branch of a state that only training reads."""
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


@dataclass(frozen=True)
class Wanted:
    """What a checkpoint is asked for.

    Attributes:
      shapes, shardings: of the state.
      others: (names of) branches that it may hold as well, and that are not read.
      former: branch -> where earlier versions kept it.
    """

    shapes: Any
    shardings: Any
    others: Collection[tuple[str, ...]] = ()
    former: Mapping[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)

    def as_saved(self, saved: Collection[tuple[str, ...]]) -> tuple[Any, Any, dict[tuple[str, ...], tuple[str, ...]]]:
        """Returns (shapes, shardings, branches that lie elsewhere) as a checkpoint of these paths has them."""
        moved = {new: old for new, old in self.former.items() if any(path[: len(old)] == old for path in saved)}
        shapes, shardings = self.shapes, self.shardings
        for new, old in moved.items():
            shapes, shardings = (_moved(tree, new, old) for tree in (shapes, shardings))
        return shapes, shardings, moved


def _moved(tree: dict[str, Any], source: tuple[str, ...], target: tuple[str, ...]) -> dict[str, Any]:
    """Returns a tree of dictionaries with a branch moved from one path to another."""
    out: dict[str, Any] = _copied(tree)
    parents = [out]
    for key in source[:-1]:
        parents.append(parents[-1].get(key, {}))
    if source[-1] not in parents[-1]:
        return out
    value, place = parents[-1].pop(source[-1]), out
    for parent, key in reversed(list(zip(parents, source[:-1], strict=False))):
        if not parent[key]:
            del parent[key]  # a branch without arrays is in no file
    for key in target[:-1]:
        place = place.setdefault(key, {})
    place[target[-1]] = value
    return out


def _copied(tree: Any) -> Any:
    return {k: _copied(v) for k, v in tree.items()} if type(tree) is dict else tree


def about(folder: Path, step: int) -> dict[str, Any]:
    """Returns what a step holds beside the state.

    Raises:
      UserError: it cannot be read.
    """
    import orbax.checkpoint as ocp

    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler("state", "run")) as checkpointer:
            found = checkpointer.restore(
                folder.absolute() / str(step), args=ocp.args.Composite(run=ocp.args.JsonRestore())
            )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {step} in {folder} cannot be read: {' '.join(str(error).split())[:200]}") from None
    run: dict[str, Any] = found["run"]
    return run


def restore(folder: Path, step: int, wanted: Wanted) -> tuple[Any, dict[str, Any]]:
    """Returns (state, run) of a step, each array placed by its sharding.

    Args:
      folder: where step folders lie.

    Raises:
      UserError: the checkpoint does not have the arrays of this config.
    """
    import orbax.checkpoint as ocp
    from etils import epath  # orbax's own

    where = f"checkpoint {step} in {folder}"
    try:
        files = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder.absolute() / str(step) / "state"))
        saved = _by_path(files.tree)
        shapes, shardings, moved = wanted.as_saved(saved)
        target = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(target, restore_args=arguments, partial_restore=True),
            run=ocp.args.JsonRestore(),
        )
        _check(saved, _by_path(target), wanted.others, where)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler("state", "run")) as checkpointer:
            out = checkpointer.restore(folder.absolute() / str(step), args=items)
    except (ValueError, KeyError, TypeError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{where} does not fit this config: {first}") from None
    state = out["state"]
    for new, old in moved.items():
        state = _moved(state, old, new)
    return state, out["run"]


def _by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    """Returns the arrays of a tree by the names on the way to them, which files have too."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}


def _check(
    saved: Mapping[tuple[str, ...], Any],
    wanted: Mapping[tuple[str, ...], Any],
    others: Collection[tuple[str, ...]],
    where: str,
) -> None:
    """Raises UserError, which names the first array that a checkpoint lacks, has too much or in another shape."""
    read = {path: array for path, array in saved.items() if not any(path[: len(other)] == other for other in others)}
    problems = [(path, "it lacks") for path in wanted if path not in read] + [
        (path, "it holds") for path in read if path not in wanted
    ]
    problems += [
        (path, f"it holds {tuple(read[path].shape)}, needed is {tuple(array.shape)}, of")
        for path, array in wanted.items()
        if path in read and tuple(read[path].shape) != tuple(array.shape)
    ]
    if not problems:
        return
    problems.sort(key=lambda problem: problem[0][0] == OPTIMIZER)  # the network first
    path, what = problems[0]
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    name = "/".join(path)
    if path[0] == OPTIMIZER:
        raise UserError(
            f"the optimizer's state in {where} does not fit (an earlier version saved it: {what} {name}{more}): the "
            "run can be evaluated and "
            "extracted but not resumed; start anew from it by --config.train.init_from and another --workdir"
        )
    raise UserError(
        f"{where} does not fit this config: {what} {name}{more}; open it with the version that saved it (git in "
        "environment.json), and with its own files (--plugin in the command there) as they were"
    )


def restore_newest(
    folder: Path, wanted: Callable[[Mapping[str, Any]], Wanted], say: Callable[[str], None]
) -> tuple[int, Any, dict[str, Any]]:
    """Returns (step, state, run) of the newest step whose every byte is as it was written.

    Args:
      folder: as of `restore`.
      wanted: returns what a step is asked for, from what it holds beside the state.
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
            raise UserError(
                f"no whole step is in {folder} yet; wait for the first save, or train it (python -m launch.train)"
            )
        try:
            state, run = restore(folder, step, wanted(about(folder, step)))
        except Exception:
            if fault(folder / str(step), step) is None:
                raise
            continue  # deleted while it was read
        if fault(folder / str(step), step) is None:
            for line in damaged:
                say(line)
            return step, state, run
    raise UserError(
        f"every step in {folder} vanished while it was read: the training there saves and deletes faster; try again"
    )


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
    """What is damaged for good: what the training deletes is gone, or its manifest soon is, when it is looked for
    again."""
    still = set(whole_steps(folder)) if faults else set()
    return [f"checkpoint {step} is not used: {problem}" for step, problem in faults.items() if step in still]
