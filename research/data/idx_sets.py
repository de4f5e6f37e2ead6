"""Data sets of images in IDX files: MNIST, Fashion-MNIST and any other, whole or reduced."""

import dataclasses
import functools
import pathlib
import shutil

import numpy as np

from research.data import idx
from research.data.kinds import IMAGE
from research.data.registry import register
from research.data.source import ArraySource, arrays_to_sources, keyed_permutation
from research.errors import UserError
from research.files import replace_file, user_path

_SUBSET_STREAM = 0x50B5
"""Second word of the Philox key, so that no two uses of one seed share a stream."""


def prepare(name: str, folder: pathlib.Path | None, data_dir: str | None) -> str:
    """Copies the IDX files of a folder to where training finds them, and returns a sentence that says where they lie.

    Args:
      name: of the data set.
      folder: with the files; None: they must lie in their place already.
      data_dir: the place; None: the first of the usual ones.

    Raises:
      UserError: missing or damaged files.
    """
    if folder is None:
        place = idx.find_folder(name, data_dir)
        return f"{name} lies in {place}: {_counts(idx.read_folder(place))}."
    counts = _counts(idx.read_folder(folder))
    target = user_path(data_dir) if data_dir else idx.usual_folders(name)[0]
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        for kind in ("images", "labels"):
            path = idx.find_file(folder, split, kind)
            if path.resolve() != (target / path.name).resolve():
                replace_file(target / path.name, functools.partial(shutil.copyfile, path))
    return f"{name} lies in {target}: {counts}."


def _counts(arrays: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    return ", ".join(f"{len(labels)} {split}" for split, (_, labels) in arrays.items())


@register("idx", IMAGE, ready=False)
def load_idx(
    *, data_dir: str | None = None, num_classes: int | None = None, average: int = 1, train_examples: int = 0
) -> tuple[ArraySource, ArraySource]:
    """A folder with four IDX files, given by `data_dir`; `average` and `train_examples` as in `reduced`."""
    if data_dir is None:
        raise UserError(
            "Data set 'idx' needs data_dir: the folder with the four IDX files (train-images-idx3-ubyte and so on, "
            ".gz or not)."
        )
    return reduced(*_sources("idx", pathlib.Path(data_dir), num_classes), average, train_examples)


@register("fashion_mnist", IMAGE, ready=False, prepare=prepare)
def load_fashion_mnist(
    *, data_dir: str | None = None, average: int = 1, train_examples: int = 0
) -> tuple[ArraySource, ArraySource]:
    return reduced(*_sources("fashion_mnist", idx.find_folder("fashion_mnist", data_dir), 10), average, train_examples)


@register("mnist", IMAGE, ready=False, prepare=prepare)
def load_mnist(
    *, data_dir: str | None = None, average: int = 1, train_examples: int = 0
) -> tuple[ArraySource, ArraySource]:
    return reduced(*_sources("mnist", idx.find_folder("mnist", data_dir), 10), average, train_examples)


def _sources(name: str, folder: pathlib.Path, num_classes: int | None) -> tuple[ArraySource, ArraySource]:
    arrays = idx.read_folder(folder)
    return arrays_to_sources(name, arrays["train"], arrays["test"], num_classes)


def reduced(
    train: ArraySource, test: ArraySource, average: int, train_examples: int
) -> tuple[ArraySource, ArraySource]:
    """Returns smaller data sets of uint8 images.

    Args:
      average: side of the blocks of pixels of which each image keeps the rounded mean; 1: the images as they are.
      train_examples: how many of the training examples stay, the first of a fixed permutation, in their order; 0: all.
        Validation examples are taken from these.

    Raises:
      UserError: blocks that do not divide the images, or more examples than there are.
    """
    height, width, _ = train.image_shape
    if average < 1 or height % average or width % average:
        raise UserError(
            f"{train.name}: average={average} does not divide images of {height}x{width}; give a divisor of both."
        )
    if not 0 <= train_examples <= len(train):
        raise UserError(f"{train.name}: train_examples={train_examples}; there are {len(train)} (0: all).")
    if average > 1:
        train, test = (dataclasses.replace(s, images=_averaged(s.images, average)) for s in (train, test))
    if train_examples:
        train = train.subset(np.sort(keyed_permutation(len(train), 0, _SUBSET_STREAM)[:train_examples]), train.name)
    return train, test


def _averaged(images: np.ndarray, side: int) -> np.ndarray:
    count, height, width, channels = images.shape
    blocks = images.reshape(count, height // side, side, width // side, side, channels)
    averaged: np.ndarray = np.round(blocks.mean((2, 4), dtype=np.float32)).astype(np.uint8)
    return averaged
