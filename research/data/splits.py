"""Which part of a corpus is training, validation and test: by place within one text, by the name of a file in a
folder."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from research.data.source import keyed_permutation
from research.errors import UserError

SPLITS = ("train", "validation", "test")

_SPLIT_STREAM = 0x5917
"""Second word of the Philox key, so that no two uses of one seed share a stream."""

_Sliced = TypeVar("_Sliced", str, np.ndarray)


def split_bounds(split: str | Sequence[float]) -> tuple[float, float]:
    """Where validation and test begin, in 0..1, for the parts of training and validation: '0.9,0.05' or (0.9, 0.05).

    The rest is test. Raises UserError for anything but two parts, the first above 0, of at most 1 in sum.
    """
    try:
        train, validation = map(float, split.split(",") if isinstance(split, str) else split)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"split={split!r} is not two numbers, the parts of training and validation: 0.9,0.05."
        ) from error
    # Sums of decimals such as 0.7 + 0.2 + 0.1 miss 1 by a rounding.
    end = round(train + validation, 9)
    if not (0 < train <= 1 and validation >= 0 and end <= 1):
        raise UserError(f"split={split!r} must be two parts, the first above 0, of at most 1 in sum; the rest is test.")
    return train, end


def contiguous_split(whole: _Sliced, split: str | Sequence[float]) -> dict[str, _Sliced]:
    """Cuts a text or an array into its first part (train), its next (validation) and the rest (test), rounded down."""
    first, second = (int(bound * len(whole)) for bound in split_bounds(split))
    return {"train": whole[:first], "validation": whole[first:second], "test": whole[second:]}


def path_split(relative_path: str, split: str | Sequence[float]) -> str:
    """The split that a file belongs to by a hash of its relative path: the same on every machine, whatever lies beside
    it."""
    place = path_digest(relative_path) / 2.0**256
    return SPLITS[sum(place >= bound for bound in split_bounds(split))]


def path_digest(relative_path: str) -> int:
    """SHA-256 of a relative path, as an integer."""
    return int.from_bytes(hashlib.sha256(relative_path.encode("utf-8", "surrogateescape")).digest(), "big")


def stratified_split(
    labels: Int[np.ndarray, " N"], count: int, seed: int
) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, " M"]]:
    """Splits `range(N)` into (kept, held out), both ascending, with `count` held out in proportion to the classes.

    Class c gives `count * N_c / N` examples rounded down; what is missing comes one each from the classes with the
    largest remainders (ties: the lower class first). Which examples a class gives is a permutation keyed by `seed`.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (count / max(len(labels), 1))
    quotas = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(quotas - exact, kind="stable")
    quotas[by_remainder[: count - quotas.sum()]] += 1
    order = keyed_permutation(len(labels), seed, _SPLIT_STREAM)
    ordered_labels = labels[order]
    by_class = [order[ordered_labels == c][:quota] for c, quota in zip(classes, quotas, strict=True)]
    held_out = np.sort(np.concatenate([np.empty(0, np.int64), *by_class]))
    return np.setdiff1d(np.arange(len(labels)), held_out, assume_unique=True), held_out
