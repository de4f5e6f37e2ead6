"""Texts of a user's own as files: what cannot be read is named with its place, what is left out is said, and nothing
else is lost.

A text keeps its line ends as they are; a byte order mark at its start is no part of it. A NUL is no text: a file that
holds one is binary, or in an encoding of two bytes.
"""

import codecs
import fnmatch
import os
import pathlib
import warnings
from collections.abc import Iterable, Sequence

from research.errors import Notice, UserError
from research.files import printable

LARGEST_CORPUS = 2**32
"""Bytes of the texts that are read into memory; larger ones belong in token files."""
_BOM = "\ufeff"


def check_encoding(name: str) -> None:
    """Raises UserError unless a name is that of an encoding of texts that Python knows."""
    try:
        known = codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):
        known = False
    if not known:
        raise UserError(
            f"encoding={printable(name)} is not known; valid: utf-8, utf-16, latin-1, "
            "cp1252 and others of Python's codecs"
        )


def decode_text(data: bytes, encoding: str = "utf-8") -> str:
    """Returns the text of a file's bytes, line ends as they are, without a byte order mark.

    Raises:
      UserError: what is wrong with the bytes and where, without the file's name.
    """
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start} is no {encoding.upper()}") from None
    text = text.removeprefix(_BOM)
    if (place := text.find("\0")) >= 0:
        raise UserError(f"character {place} is NUL: binary, or another encoding")
    return text


REMEDY = "convert or remove them, give their encoding (such as encoding=latin-1), or choose files by pattern=*.txt"


def read_file(path: pathlib.Path, encoding: str = "utf-8", remedy: str = REMEDY) -> str:
    """Returns the text of one file; errors as `read_files`."""
    (text,) = read_files([path], path.parent, encoding, remedy)
    return text


def read_files(
    paths: Iterable[pathlib.Path], folder: pathlib.Path, encoding: str = "utf-8", remedy: str = REMEDY
) -> list[str]:
    """Returns the texts of files, read in their order.

    Args:
      folder: what the names in messages are relative to.
      encoding: of all files.
      remedy: what the user can do, for messages.

    Raises:
      UserError: names the files that cannot be read, up to three, and their number; or together they are too large for
        memory.
    """
    check_encoding(encoding)
    texts, bad, paths = [], [], list(paths)
    size = sum(path.stat().st_size for path in paths if path.is_file())
    if size > LARGEST_CORPUS:
        raise UserError(
            f"{folder}: {size:,} bytes of text, more than {LARGEST_CORPUS:,}; "
            "write token files (data set token_file) instead"
        )
    for path in paths:
        try:
            if not path.is_file():  # reading a pipe or a device may never end
                raise UserError(
                    "not a regular file" if path.exists() else "a broken link" if path.is_symlink() else "missing"
                )
            texts.append(decode_text(path.read_bytes(), encoding))
        except OSError as error:
            bad.append(f"{_named(path, folder)} ({error.strerror})")
        except UserError as error:
            bad.append(f"{_named(path, folder)} ({error})")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        count = f"{len(bad)} of {len(paths)} files" if len(paths) > 1 else "a file"
        raise UserError(
            f"{folder}: {count} cannot be read as {encoding.upper()} text: {', '.join(bad[:3])}{more};\n{remedy}"
        )
    return texts


def _named(path: pathlib.Path, folder: pathlib.Path) -> str:
    return printable(os.path.relpath(path, folder), 120)


def list_files(folder: pathlib.Path, pattern: str = "") -> list[str]:
    """Returns the relative paths of a folder's files, sorted; hidden ones are left out, which a `Notice` says.

    Links to folders are followed, each folder once, under its own name if it lies in `folder` too.

    Args:
      pattern: shell patterns of names, separated by commas; "" for all.
    """
    patterns = [part.strip() for part in pattern.split(",")] if pattern else ["*"]
    found: list[str] = []
    hidden: list[str] = []
    linked: list[pathlib.Path] = []
    seen = set()

    def walk(start: pathlib.Path) -> None:
        for place, folders, names in os.walk(start):
            real = os.path.realpath(place)
            if real in seen:
                folders[:] = []
                continue
            seen.add(real)
            hidden.extend(name for name in (*folders, *names) if name.startswith("."))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            linked.extend(pathlib.Path(place, name) for name in folders if os.path.islink(os.path.join(place, name)))
            chosen = [
                name
                for name in names
                if not name.startswith(".") and any(fnmatch.fnmatch(name, part) for part in patterns)
            ]
            found.extend(pathlib.Path(place, name).relative_to(folder).as_posix() for name in chosen)

    walk(folder)
    while linked:
        walk(linked.pop(0))
    say_left_out(str(folder), {"hidden": hidden})
    return sorted(found)


def say_left_out(where: str, names: dict[str, Sequence[str]]) -> None:
    """Says which files of a data set are not part of it.

    Args:
      where: what the message calls the data set.
      names: why -> which.
    """
    for why, those in names.items():
        if those:
            shown = ", ".join(printable(name, 60) for name in sorted(those)[:3])
            more = f" and {len(those) - 3} more" if len(those) > 3 else ""
            warnings.warn(f"{where}: {len(those)} {why} left out: {shown}{more}", Notice, stacklevel=2)
