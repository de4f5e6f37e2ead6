"""A run directory explains itself: config, environment, metrics, timings, TensorBoard events.

`metrics.jsonl` holds what must be the same in a repeated run, one JSON object a line with "step";
`timings.jsonl` what cannot be. Both are cut back to the restored step on resume.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from research.errors import UserError
from research.files import dump_json, write_json
from research.train import config as run_config
from research.train.used import ignored


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """Returns the resolved config of a run; fields that are newer than the run have their defaults.

    Raises:
      UserError: the folder holds no run.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} holds no run (no config.json); give the --workdir of a training run")
    try:
        return run_config.with_defaults(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); restore it from environment.json's command or start anew") from None


def _lock(folder: Path) -> Any:
    """Returns an open file that holds the folder's lock, which the system frees when the process ends in any way.

    Raises:
      UserError: another process trains here.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    file = (folder / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(f"{folder} is in use by process {holder}, which trains there; wait for it, or use another --workdir") from None
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


class RunDir:
    """One run's folder; of several processes one writes, the others have objects that do nothing.

    Args:
      writes: whether this process is the one that writes.

    Raises:
      UserError: the folder holds a run of another config, or cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike, config: dict[str, Any], environment: dict[str, Any], writes: bool = True):
        self.path, self.writes = Path(workdir), writes
        self._files: dict[str, Any] = {}
        self._board: Any = None
        self._lock: Any = None
        if "://" in str(workdir):
            raise UserError(f"workdir {workdir} is an address, not a folder; mount the bucket or volume and give the folder")
        if not writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create workdir {workdir}: {error.strerror}; choose another --workdir") from None
        self._lock = _lock(self.path)
        existing = self.path / "config.json"
        if existing.exists():
            old = read_config(self.path)
            changed = run_config.differences(old, config, ignored=ignored(old, config))
            if changed:
                more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                raise UserError(f"{workdir} holds a run of another config ({changed[0]}{more}); use another --workdir")
        else:
            strangers = [p.name for p in self.path.iterdir()]
            if "checkpoints" in strangers:
                raise UserError(f"{workdir} has checkpoints but no config.json; use another --workdir")
        write_json(existing, config)
        write_json(self.path / "environment.json", environment)

    def cut_back(self, step: int) -> None:
        """Drops lines of later steps than `step` (they are about to be made again) and half-written last lines."""
        for name in ("metrics.jsonl", "timings.jsonl"):
            path = self.path / name
            if not self.writes or not path.exists():
                continue
            kept = []
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError):
                    continue
            temporary = path.with_name(name + ".tmp")
            temporary.write_text("".join(kept))
            os.replace(temporary, path)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl and to the TensorBoard events."""
        if not self.writes:
            return
        self._append("metrics.jsonl", {"step": step, **values})
        if self._board is None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
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
            self._files[name] = (self.path / name).open("a")
        self._files[name].write(dump_json(record) + "\n")
        self._files[name].flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None
