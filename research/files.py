"""How files are read and written: damaged ones are told in a line, outputs are whole or not there, links are not
followed when writing.

Standard library only. Whatever reads a file that somebody else may have touched, or writes one that somebody may read,
goes through here.
"""

import contextlib
import json
import math
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from research.errors import UserError

PathLike = str | os.PathLike
LARGEST_TEXT = 2**30
"""Bytes of the largest text file that is read whole."""
RUN_FILES = (
    "config.json",
    "environment.json",
    "layout.json",
    "data.json",
    "status.json",
    "lock",
    "metrics.jsonl",
    "timings.jsonl",
    "tokenizer.json",
    "report.json",
    "report.md",
    "pareto.png",
    "experts.png",
    "error.txt",
    "slurm.log",
    "model.safetensors",
)
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""By which a folder is known to hold a model, ours or another's."""
RUN_FOLDERS = ("checkpoints", "statistics", "tensorboard", "profile", "processes", "customised")
"""What a run owns in its directory; a model.safetensors there would make it look like a stand-alone model."""


def printable(text: Any, limit: int = 80) -> str:
    """Returns foreign text for a message: control characters escaped, at most `limit` characters."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in str(text)[: limit + 1]
    )
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def user_path(path: PathLike) -> Path:
    """Returns a path as a user writes it, with a leading `~` or `~name` as that home folder.

    Raises:
      UserError: nobody knows where that home is, as in a container without a user name: a folder called `~` is never
        made.
    """
    text = os.fspath(path)
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text and not os.path.lexists(text):
        raise UserError(
            f"{printable(text)}: the home folder is not known; set HOME, give the whole path, or ./{printable(text)}"
        )
    return Path(expanded)


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def check_regular(path: PathLike, remedy: str = "") -> None:
    """Raises UserError unless a path leads to a regular file, links resolved: reading a pipe or a device may never
    end."""
    more = f"; {remedy}" if remedy else ""
    try:
        if not Path(path).is_file():
            raise UserError(
                f"{printable(path, 300)} is {'not a regular file' if os.path.lexists(path) else 'missing'}{more}"
            )
    except (OSError, ValueError) as error:  # ValueError: a name that holds NUL
        raise UserError(f"cannot read {printable(path, 300)}: {_reason(error)}{more}") from None


MOST_SWELLING, SMALL = 100, 2**26
"""How many times larger than itself a compressed file may become, where the result is more than so many bytes."""


def check_zip(path: PathLike, remedy: str = "") -> None:
    """Raises UserError unless a file is a zip archive whose contents, as its directory tells their sizes, do not fill
    the memory.

    What reads an entry stops at the size that the directory tells.
    """
    check_regular(path, remedy)
    more = f"; {remedy}" if remedy else ""
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(info.file_size for info in archive.infolist())
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or no zip archive ({printable(error)}){more}") from None
    if claimed > max(SMALL, MOST_SWELLING * os.path.getsize(path)):
        raise UserError(
            f"{path} claims {claimed:,} bytes in a file of {os.path.getsize(path):,}: damaged, "
            f"or made to fill the memory{more}"
        )


# -- reading ---------------------------------------------------------------------------------------------------------


def read_text(path: PathLike, remedy: str = "") -> str:
    """Returns a file's text, which must be UTF-8.

    Args:
      remedy: what the user can do, added to the message.

    Raises:
      UserError: no regular file, not readable, too large, or not UTF-8.
    """
    path, more = Path(path), f"; {remedy}" if remedy else ""
    try:
        if not path.is_file():
            raise UserError(f"{path} is {'not a regular file' if path.exists() else 'missing'}{more}")
        if path.stat().st_size > LARGEST_TEXT:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, more than {LARGEST_TEXT:,}{more}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: byte {error.start} is no UTF-8{more}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that holds NUL
        raise UserError(f"cannot read {path}: {_reason(error)}{more}") from None


def parse_json(text: str, where: str, keys: Sequence[str] = (), remedy: str = "") -> Any:
    """Returns what a JSON text holds.

    Args:
      where: what the message calls the text.
      keys: keys that it must have, as an object; () takes any value.
      remedy: as `read_text`.

    Raises:
      UserError: it is no JSON, nested too deeply, no object or without one of the keys.
    """
    more = f"; {remedy}" if remedy else ""
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{where} is damaged: it is nested too deeply{more}") from None
    except ValueError as error:
        raise UserError(f"{where} is damaged: {printable(error)}{more}") from None
    if keys and not isinstance(value, dict):
        raise UserError(f"{where} is damaged: it holds a {type(value).__name__}, not an object{more}")
    if absent := [key for key in keys if key not in value]:
        raise UserError(f"{where} is damaged: {absent[0]!r} is missing{more}")
    return value


def read_json(path: PathLike, keys: Sequence[str] = (), remedy: str = "") -> Any:
    """Returns what a JSON file holds; arguments and errors as `read_text` and `parse_json`."""
    return parse_json(read_text(path, remedy), str(path), keys, remedy)


def read_json_lines(path: PathLike, keys: Sequence[str] = ()) -> tuple[list[dict[str, Any]], int]:
    """Returns (the objects of a file of one JSON object a line, the number of lines that are none).

    A last line without its end, cut by a kill, is left out and not counted. No file: no lines.

    Args:
      keys: keys that a line must have to count as whole.

    Raises:
      UserError: the file cannot be read.
    """
    path, rows, damaged = Path(path), [], 0
    if not path.exists():
        return [], 0
    try:
        lines = path.read_bytes().split(b"\n") if path.is_file() else None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if lines is None:
        raise UserError(f"{path} is not a regular file")
    for line in lines[:-1]:
        try:
            row = parse_json(line.decode(), "line", keys)
        except (UserError, UnicodeDecodeError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


# -- writing ---------------------------------------------------------------------------------------------------------


def replace_file(path: PathLike, write: Callable[[str], Any]) -> None:
    """Calls `write(temporary path)` and moves the result to `path` in one step; a link at `path` is replaced, not
    followed.

    Raises:
      UserError: the folder cannot be written.
    """
    path = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(os.fspath(path)))), os.path.basename(path))
    try:
        handle, temp = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path))
        os.close(handle)
        try:
            write(temp)
            with open(temp, "rb+") as f:
                os.fsync(f.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temp, 0o666 & ~umask)
            os.replace(temp, path)
        finally:
            if os.path.exists(temp):
                os.unlink(temp)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


@contextlib.contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """For writes to files that are open: what the system refuses there is told of `path`, which it does not name
    itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file as UTF-8, whole or not at all; errors as `replace_file`."""

    def write(temp: str) -> None:
        with open(temp, "w", encoding="utf-8", newline="") as file:
            file.write(text)

    replace_file(path, write)


def strict_json(value: Any) -> Any:
    """Returns a value with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict_json(inner) for key, inner in value.items()}
    return [strict_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def dump_json(value: Any, **options: Any) -> str:
    """Returns a value as JSON that every parser reads, keys sorted."""
    return json.dumps(strict_json(value), sort_keys=True, allow_nan=False, **options)


def write_json(path: PathLike, value: Any) -> None:
    """Writes JSON, whole or not at all: a reader sees the old file or the new one; errors as `replace_file`."""
    write_text(path, dump_json(value, indent=2) + "\n")


def open_for_append(path: PathLike) -> IO[str]:
    """Opens a text file for appending, made when missing.

    Raises:
      UserError: a link lies there, which writing would follow, or no regular file, or it cannot be opened.
    """
    return _open(path, os.O_APPEND)


def open_anew(path: PathLike) -> IO[str]:
    """Opens a text file that others watch while it is written, such as a log, and empties it; errors as
    `open_for_append`."""
    return _open(path, os.O_TRUNC)


def _open(path: PathLike, flag: int) -> IO[str]:
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe without a reader must not hold us up
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | flag | safe, 0o666)
    except OSError as error:
        if os.path.islink(path):
            raise UserError(
                f"{path} is a link, which is not written through; put the file itself in its place"
            ) from None
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"cannot write {path}: it is not a regular file")
    return os.fdopen(handle, "w", encoding="utf-8")


def make_folder(path: PathLike) -> Path:
    """Makes a folder, with those above it, where there is none, and returns it.

    Raises:
      UserError: a link or a file lies there, or it cannot be made.
    """
    if os.path.islink(path):
        raise UserError(f"{path} is a link, which is not written through; put the folder itself in its place")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from None
    return Path(path)


def make_linked_folder(path: PathLike) -> Path:
    """As `make_folder`, but where a link lies there that somebody has put to a folder, for instance on another disk,
    returns that folder.

    Raises:
      UserError: the link leads nowhere or into another run, or the folder cannot be made.
    """
    if not os.path.islink(path):
        return make_folder(path)
    real = Path(os.path.realpath(path))
    if not real.is_dir():
        raise UserError(f"{path} is a link to {real}, where no folder is; mount its disk, or put the folder back there")
    _check_outside_runs(real, path, "the link ")
    return real


@contextlib.contextmanager
def whole_folder(folder: PathLike, last: str, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """Yields a folder to write files into, which then appear in `folder` together; where the body fails, `folder` stays
    as it was.

    A kill in the middle of the moves leaves `folder` without the file `last`, never with files of two writings that
    look whole: readers must refuse a folder without it.

    Args:
      folder: made when missing; other files in it stay.
      last: name of the file that says that the folder is whole.
      replaces: patterns of names that an earlier writing may have left, which are removed.

    Raises:
      UserError: the folder cannot be written.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for stale in target.glob(".writing.*"):  # of a writing that was killed
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".writing.", dir=target) as temp:
            yield Path(temp)
            written = sorted(path for path in Path(temp).iterdir() if path.name != last)
            (target / last).unlink(missing_ok=True)
            for path in (p for pattern in replaces for p in target.glob(pattern)):
                path.unlink()
            for path in [*written, Path(temp) / last]:
                os.replace(path, target / path.name)
    except OSError as error:
        raise UserError(f"cannot write the folder {folder}: {error.strerror}") from None


def check_output(out: PathLike, *reads: PathLike, flag: str = "--out") -> None:
    """Refuses an output that would overwrite what is read, or a run; links are resolved first.

    A new folder inside a run's directory is fine (runs/x/w50), the folders and files that the run itself owns are not.

    Args:
      out: the file or folder that a command is about to write.
      reads: files and folders that it reads.
      flag: what the message calls the output.

    Raises:
      UserError: `out` is one of `reads`, a folder that holds a run, or lies in what a run owns.
    """
    real = Path(os.path.realpath(out))
    for read in reads:
        source = Path(os.path.realpath(read))
        parts = (
            [Path(os.path.realpath(path)) for path in source.iterdir() if path.is_symlink()] if source.is_dir() else []
        )
        if (
            real == source
            or (source.is_file() and real == source.parent)
            or (real in source.parents and _holds_model(real))
        ):
            raise UserError(
                f"{flag}={out} is what is read ({read}) or holds it, and would be overwritten; give another one"
            )
        if (source.is_dir() and real.parent == source and real.is_file()) or any(
            real in (part, part.parent) for part in parts
        ):
            raise UserError(
                f"{flag}={out} is a file of what is read ({read}) or holds one, and would be overwritten; "
                "give another one"
            )
    if is_run(real):
        raise UserError(f"{flag}={out} is the directory of a run, whose files would be overwritten; give another one")
    _check_outside_runs(real, out, f"{flag}=")


def check_workdir(workdir: PathLike, flag: str = "--workdir") -> None:
    """Refuses to train in a folder that holds a model but no run, or in what a run owns; links are resolved first.

    Args:
      workdir: the directory of the run; one that holds a run already is fine.
      flag: what the message calls it.

    Raises:
      UserError: such a folder.
    """
    real = Path(os.path.realpath(workdir))
    if not is_run(real) and (found := next((name for name in MODEL_FILES if (real / name).exists()), None)):
        raise UserError(
            f"{flag}={workdir} holds a model ({found}), whose config.json would be overwritten; give another one"
        )
    _check_outside_runs(real, workdir, f"{flag}=")


def _check_outside_runs(real: Path, path: PathLike, flag: str) -> None:
    for parent in real.parents:
        own = real.relative_to(parent).parts
        if own[0] in (*RUN_FILES, *RUN_FOLDERS) and is_run(parent):
            raise UserError(f"{flag}{path} is part of the run in {parent}, which would be damaged; give another one")


def is_run(folder: PathLike) -> bool:
    """Whether a folder is the directory of a run, be it one that has just started."""
    folder = Path(folder)
    return (folder / "config.json").is_file() and (
        (folder / "checkpoints").is_dir() or (folder / "environment.json").is_file()
    )


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or is_run(folder)
