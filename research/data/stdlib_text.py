"""The source text of Python's own standard library: real text that every machine has, without a network.

Python versions differ in it, so a run records which text it saw: the digest of its sources, and `manifest()`.
"""

import hashlib
import os
import pathlib
import platform
import re
import sysconfig
from typing import Any

from research.data.kinds import TOKENS
from research.data.registry import register
from research.data.splits import SPLITS, path_digest, path_split, split_bounds
from research.data.text import text_sources
from research.data.tokens import TokenSource
from research.errors import UserError

_SPLIT = (0.9, 0.05)
# Packages of others, tests, and what the build of this one interpreter wrote.
_LEFT_OUT = re.compile(r"site-packages|dist-packages|__pycache__|tests?|idle_test|config-.*|_sysconfigdata.*")


def manifest() -> dict[str, Any]:
    """Which files there are: plain data.

    Returns:
      `{"python": version, "digest": SHA-256 over all entries, "bytes": sum, "files": [{"path", "bytes", "sha256",
      "split"}]}`, sorted by relative path.
    """
    files = []
    for path, data in read_files().items():
        files.append(
            {
                "path": path,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "split": path_split(path, _SPLIT),
            }
        )
    lines = "".join(f"{file['sha256']}  {file['path']}\n" for file in files)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return {
        "python": platform.python_version(),
        "digest": digest,
        "bytes": sum(file["bytes"] for file in files),
        "files": files,
    }


@register("stdlib_text", TOKENS)
def load_stdlib_text(
    *,
    length: int = 256,
    tokenizer: str = "bytes",
    max_bytes: int | None = None,
    shift: bool = True,
    seed: int = 0,
) -> dict[str, TokenSource]:
    """The `.py` files of the standard library as documents, in the order of their relative paths.

    Without tests, packages of others and files that are not UTF-8. A hash of the relative path alone decides the split
    of a file, about 90 %, 5 % and 5 %.

    Args:
      length: tokens of an example.
      tokenizer: 'bytes' or 'chars'.
      max_bytes: for small runs, at most so many bytes of text, in the proportions of the splits: files in the order of
        their hashes, the last one of each split cut short.
      shift: whether the training windows differ between epochs, see `TokenSource`.
      seed: keys these shifts.

    Raises:
      UserError: this Python has no such files, or `max_bytes` leaves too little for one example.
    """
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"stdlib_text: max_bytes={max_bytes} must be at least 1.")
    splits: dict[str, dict[str, bytes]] = {split: {} for split in SPLITS}
    for path, data in read_files().items():
        splits[path_split(path, _SPLIT)][path] = data
    if max_bytes is not None:
        first, second = split_bounds(_SPLIT)
        shares = dict(zip(SPLITS, (first, second - first, 1 - second), strict=True))
        splits = {split: _first_bytes(files, round(shares[split] * max_bytes)) for split, files in splits.items()}
    texts = {split: [data.decode(errors="ignore") for data in files.values()] for split, files in splits.items()}
    return text_sources(
        "stdlib_text", texts, length=length, tokenizer=tokenizer, documents=True, shift=shift, seed=seed
    )


def read_files() -> dict[str, bytes]:
    """The contents of the files by relative path, sorted."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _LEFT_OUT.fullmatch(name)]
        for name in names:
            path = pathlib.Path(place, name)
            if name.endswith(".py") and not _LEFT_OUT.fullmatch(name) and _is_utf8(data := path.read_bytes()):
                found[path.relative_to(root).as_posix()] = data
    if not found:
        raise UserError(
            f"stdlib_text: this Python's standard library, {root}, holds no .py files; "
            "use another Python or the data set 'text'."
        )
    return dict(sorted(found.items()))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _first_bytes(files: dict[str, bytes], budget: int) -> dict[str, bytes]:
    """Files in the order of the hash of their paths until `budget` bytes are taken, given back in their old order."""
    taken = {}
    for path in sorted(files, key=path_digest):
        taken[path] = files[path][:budget]
        budget -= len(taken[path])
    return {path: taken[path] for path in files}
