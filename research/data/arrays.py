"""Labelled images of the user's own: arrays in memory, or one .npz file of NumPy that holds them."""

import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np

from research.data.kinds import IMAGE
from research.data.registry import register
from research.data.source import ArraySource, arrays_to_sources
from research.errors import UserError
from research.files import check_regular, check_zip, printable, user_path

KEYS = ("train_image", "train_label", "test_image", "test_label")
HELD_OUT = ("validation_image", "validation_label")
HOW = f"numpy.savez(FILE, {', '.join(f'{key}=...' for key in KEYS)})"


@register("arrays", IMAGE, ready=False)
def load_arrays(
    *,
    data_dir: str | None = None,
    file: str = "",
    train: tuple[Any, ...] = (),
    test: tuple[Any, ...] = (),
    num_classes: int | None = None,
) -> tuple[ArraySource, ...]:
    """Returns the sources (train, test), or (train, validation, test) of a file that holds validation examples.

    Args:
      data_dir: folder of `file`, or None where that is a whole path.
      file: a .npz with `train_image`, `train_label`, `test_image`, `test_label` and, if wanted, `validation_image` and
        `validation_label`: uint8 or float images [N, H, W] or [N, H, W, C], whole numbers from 0 as labels [N].
      train, test: pairs (images, labels) in place of a file, from Python.
      num_classes: None: the largest label + 1.

    Raises:
      UserError: neither or both are given, a file that cannot be read or lacks an array, or arrays that are not as
        said.
    """
    if bool(file) == bool(train or test):
        raise UserError(
            f"data set 'arrays' needs data.options.file=FILE.npz (from Python: train and test instead), made by {HOW}"
        )
    if not file:
        if len(train) != 2 or len(test) != 2:
            raise UserError("data set 'arrays': train and test must both be pairs (images, labels)")
        return arrays_to_sources("arrays", train, test, num_classes)
    path = user_path(data_dir or ".") / user_path(file)
    held = _read(path)
    pairs = {
        split: (held[f"{split}_image"], held[f"{split}_label"])
        for split in ("train", "validation", "test")
        if f"{split}_image" in held
    }
    if "validation" not in pairs:
        return arrays_to_sources("arrays", pairs["train"], pairs["test"], num_classes)
    if num_classes is None:
        labels = [np.asarray(label) for _, label in pairs.values()]
        num_classes = 1 + max((int(label.max(initial=0)) for label in labels if label.dtype.kind in "iu"), default=0)
    train_source, test_source = arrays_to_sources("arrays", pairs["train"], pairs["test"], num_classes)
    return (
        train_source,
        arrays_to_sources("arrays", pairs["train"], pairs["validation"], num_classes, ("train", "validation"))[1],
        test_source,
    )


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a file, all of `KEYS` among them; pickled objects are never loaded."""
    check_regular(path, f"make it by {HOW}")
    try:
        data = np.load(path, allow_pickle=False)
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise UserError(f"{path} holds one array without a name; make it by {HOW}")
        check_zip(path, f"make it by {HOW}")
        with data:
            found = list(data.files)
            wanted = (*KEYS, *(HELD_OUT if set(HELD_OUT) & set(found) else ()))
            if missing := [key for key in wanted if key not in found]:
                raise UserError(
                    f"{path} lacks {', '.join(missing)}; it holds {printable(', '.join(found)) or 'nothing'}"
                )
            return {key: _array(data, key, path) for key in wanted}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError) as error:
        raise UserError(f"{path} cannot be read as .npz: {printable(error)}; make it by {HOW}") from None


def _array(data: np.lib.npyio.NpzFile, key: str, path: pathlib.Path) -> np.ndarray:
    try:
        return data[key]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise UserError(
            f"{path}: {key} holds Python objects, which are not loaded; make it an array of numbers"
        ) from None
