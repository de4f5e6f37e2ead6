"""A run directory explains itself: config, environment, metrics, timings, TensorBoard events.

`metrics.jsonl` holds what must be the same in a repeated run, one JSON object a line with "step";
`timings.jsonl` what cannot be. Both are cut back to the restored step on resume.
"""

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from research.errors import Unregistered, UserError
from research.files import (
    check_workdir,
    dump_json,
    make_folder,
    naming,
    open_for_append,
    printable,
    read_json,
    write_json,
    write_text,
)
from research.optim.registry import known
from research.report.reading import read_journal
from research.train import config as run_config
from research.train.used import ignored

JOURNALS = ("metrics.jsonl", "timings.jsonl")


def read_config(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the resolved config of a run; fields that are newer than the run have their defaults.

    Raises:
      UserError: the folder holds no run, or its config is damaged.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no run (no config.json); give the --workdir of a training run")
    remedy = "restore it from environment.json's command or start anew"
    if (Path(workdir) / "model.safetensors").is_file():
        raise UserError(f"{workdir} holds a stand-alone network, no run; give the --workdir of a training run")
    given = read_json(path, ("model",), remedy)
    try:
        config = run_config.with_defaults(given)
        run_config.check(ml_collections.ConfigDict(config))
    except Unregistered as error:
        raise Unregistered(f"{path}: {error.args[0]}") from None
    except (UserError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged or of another version: {printable(error, 200)}; {remedy}") from None
    return config


def continues(workdir: str | os.PathLike[str], config: dict[str, Any]) -> bool:
    """Returns whether a run of this config is there to continue with.

    Args:
      config: resolved.
    """
    try:
        old = read_config(workdir)
    except UserError:
        return False
    return not run_config.differences(old, config, ignored=ignored(old, config))


def check_optimizer(workdir: str | os.PathLike[str], name: str) -> None:
    """Raises UserError where a run was trained by an optimizer of this name that is no longer there."""
    try:
        old = read_config(workdir)["optim"]["name"]
    except UserError:
        return
    if name == old and name not in known():
        raise UserError(
            f"{workdir} was trained by optim.name={name!r}, which is no longer there: the run can be evaluated and "
            "extracted but not resumed; "
            f"start anew from it by --config.train.init_from={workdir}, another optim.name and another --workdir"
        )


def _lock(folder: Path) -> Any:
    """Returns an open file that holds the folder's lock, which the system frees when the process ends in any way.

    Raises:
      UserError: another process trains here.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    file = open_for_append(folder / "lock")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        with contextlib.suppress(OSError):
            holder = printable((folder / "lock").read_text(errors="replace").strip(), 20) or "another process"
            raise UserError(
                f"{folder} is in use by process {holder}, which trains there; wait for it, or use another --workdir"
            ) from None
        raise UserError(
            f"{folder} is in use by another process, which trains there; wait for it, or use another --workdir"
        ) from None
    except OSError:  # a file system without locks
        return file
    with naming(folder / "lock"):
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
    return file


class RunDir:
    """One run's folder; of several processes one writes, the others have objects that do nothing.

    `lines` counts the lines of each journal.

    Args:
      writes: whether this process is the one that writes.

    Raises:
      UserError: the folder holds a run of another config, or cannot be written.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], config: dict[str, Any], environment: dict[str, Any], writes: bool = True
    ):
        self.path, self.writes = Path(workdir), writes
        self._files: dict[str, Any] = {}
        self._board: Any = None
        self._lock: Any = None
        self.lines = dict.fromkeys(JOURNALS, 0)
        if "://" in str(workdir):
            raise UserError(
                f"workdir {workdir} is an address, not a folder; mount the bucket or volume and give the folder"
            )
        if not writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create workdir {workdir}: {error.strerror}; choose another --workdir") from None
        self._lock = _lock(self.path)
        try:
            self._claim(config, environment)
        except BaseException:
            self.close()
            raise

    def _claim(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Makes the folder that of this config; nothing is written where it is another's that has trained."""
        check_workdir(self.path, flag="workdir")
        existing = self.path / "config.json"
        if existing.exists() and self._has_trained():
            old = read_config(self.path)
            changed = run_config.differences(old, config, ignored=ignored(old, config))
            if changed:
                more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                raise UserError(
                    f"{self.path} holds a run of another config ({changed[0]}{more}); use another --workdir"
                )
        elif not existing.exists() and os.path.lexists(self.path / "checkpoints"):
            raise UserError(f"{self.path} has checkpoints but no config.json; use another --workdir")
        write_json(existing, config)
        write_json(self.path / "environment.json", environment)

    def _has_trained(self) -> bool:
        """Whether the folder holds anything of a run; one that failed at its start does not keep it from being put
        right."""
        if any((self.path / name).exists() for name in JOURNALS):
            return True
        checkpoints = self.path / "checkpoints"
        return os.path.lexists(checkpoints) and not (checkpoints.is_dir() and not any(checkpoints.iterdir()))

    def cut_back(self, step: int, lines: Mapping[str, int] | None = None) -> list[str]:
        """Drops lines of later steps than `step` (they are about to be made again) and what is no whole line.

        Args:
          lines: how many lines of each file there were when the step was saved, where that is known.

        Returns:
          a line for humans for each file that was damaged or has lost lines.
        """
        said = []
        for name in JOURNALS if self.writes else ():
            path = self.path / name
            if os.path.islink(path):
                raise UserError(f"{path} is a link, which is not written through; put the file itself in its place")
            rows, damaged = read_journal(path)
            kept = [row for row in rows if row["step"] <= step]
            lost = max((lines or {}).get(name, 0) - len(kept), 0)
            if lost or damaged:
                ends = f"; {lost} of {lines[name]} lines up to step {step} are lost" if lines and lost else ""
                said.append(f"{path} was damaged: {damaged} lines are no whole records and were dropped{ends}")
            if path.exists():
                write_text(path, "".join(dump_json(row) + "\n" for row in kept))
            self.lines[name] = len(kept)
        return said

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl and to the TensorBoard events."""
        if not self.writes:
            return
        self._append("metrics.jsonl", {"step": step, **values})
        if self._board is None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(make_folder(self.path / "tensorboard")), purge_step=step)
        with naming(self.path / "tensorboard"):
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._board.add_scalar(name, value, step)

    def timings(self, step: int, values: dict[str, Any]) -> None:
        """Appends one line to timings.jsonl."""
        if self.writes:
            self._append("timings.jsonl", {"step": step, **values})

    def status(self, values: dict[str, Any]) -> None:
        """Renews status.json, which tells a watcher where the run is."""
        if self.writes:
            write_json(self.path / "status.json", values)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if name not in self._files:
            self._files[name] = open_for_append(self.path / name)
        with naming(self.path / name):
            self._files[name].write(dump_json(record) + "\n")
            self._files[name].flush()
        self.lines[name] += 1

    def close(self) -> None:
        files, self._files, board, self._board = self._files, {}, self._board, None
        try:
            for name, file in files.items():
                with naming(self.path / name):
                    file.close()
            if board is not None:
                with naming(self.path / "tensorboard"):
                    board.close()
        finally:
            if self._lock is not None:
                self._lock.close()
                self._lock = None
