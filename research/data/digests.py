"""Digests of data, by which a run notices that what lies at its path is not what it was trained on."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

_CHUNK = 1 << 24
_ENDS = 1 << 20
"""Bytes at either end of a large file that count."""
_EXAMPLES = 64
"""Examples that stand for those of a source that makes them."""


class Gathers(Protocol):
    """A source, see `research.data.source.Source`."""

    def __len__(self) -> int: ...

    def gather(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, np.ndarray]: ...


def of_arrays(*arrays: np.ndarray) -> str:
    """Returns the SHA-256 of types, shapes and bytes."""
    sha = hashlib.sha256()
    for array in arrays:
        flat = np.ascontiguousarray(array).reshape(-1)
        sha.update(f"{flat.dtype.str}{array.shape}".encode())
        for start in range(0, len(flat), _CHUNK):
            sha.update(flat[start : start + _CHUNK].view(np.uint8).data)
    return sha.hexdigest()


def of_files(paths: Iterable[str | os.PathLike[str]]) -> str:
    """Returns the SHA-256 of names, sizes, and the content of files up to a bound: of larger ones both ends count."""
    sha = hashlib.sha256()
    for path in sorted(map(Path, paths)):
        size = path.stat().st_size
        sha.update(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            sha.update(file.read(_ENDS))
            if size > _ENDS:
                file.seek(max(size - _ENDS, _ENDS))
                sha.update(file.read())
    return sha.hexdigest()


def of_examples(source: Gathers) -> str:
    """Returns the SHA-256 of some examples of a source that makes them, evenly apart, and of their number.

    Of floats the shape alone counts: their last bits are the processor's, and what they depend on is in the config.
    """
    count = len(source)
    block = source.gather(np.unique(np.linspace(0, count - 1, min(count, _EXAMPLES)).astype(np.int64))) if count else {}
    arrays = (block[name] for name in sorted(block))
    return of_arrays(np.array([count]), *(np.array(a.shape) if a.dtype.kind == "f" else a for a in arrays))
