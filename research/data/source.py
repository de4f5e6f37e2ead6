"""What a data source is, and sources of images over arrays in memory.

A source holds examples that are addressed by index and read a block at a time.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int, UInt8

from research.data import digests
from research.data.tokenizers import Tokenizer
from research.errors import UserError

Images = UInt8[np.ndarray, "N H W C"] | Float[np.ndarray, "N H W C"]

_UINT64 = (1 << 64) - 1


class Source:
    """Examples addressed by index, of any kind. What has no default raises here.

    Attributes:
      name: for messages and run cards.
    """

    name: str

    @property
    def digest(self) -> str:
        """SHA-256 of the examples, or of what they are read from: another one where they have changed."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def gather(
        self, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"] | None = None
    ) -> dict[str, np.ndarray]:
        """The block of the examples at `indices`: name -> array whose first axis is the example's.

        `epochs` says which pass over the data each example belongs to; a source may vary with it (windows of a text
        that start elsewhere in each pass), as a pure function. None: for evaluation.
        """
        raise NotImplementedError

    def facts(self) -> Mapping[str, Any]:
        """Returns what tasks ask of the source beside the sizes of its examples, by name: numbers, texts, None, and
        sequences or mappings of them. A run keeps those of its training examples, and tasks are given them alone."""
        return {}

    def vocabulary(self) -> Tokenizer | None:
        """Returns what makes text of tokens, which a run keeps; None where examples are no text."""
        return None


class Told:
    """A source as tasks know it, also where a run is opened without its data: its name and its facts, as attributes.

    Args:
      facts: name -> value, "name" among them.
    """

    def __init__(self, facts: Mapping[str, Any]):
        self._facts = dict(facts)

    def __getattr__(self, name: str) -> Any:
        """Returns a fact.

        Raises:
          UserError: the source does not tell it.
        """
        if name.startswith("_"):  # of protocols such as copying; an attribute is asked for before there is any
            raise AttributeError(name)
        if name not in self._facts:
            raise UserError(
                f"{self._facts['name']} tells no {name!r}, which is asked of it; return it from `facts` of the source"
            )
        return self._facts[name]


class LabelledImages(Source):
    """Images with one label each; validation examples can be taken from them.

    Attributes:
      labels: whole numbers from 0.
      num_classes: labels are below it.
    """

    labels: Int[np.ndarray, " N"]
    num_classes: int

    def facts(self) -> Mapping[str, Any]:
        return {"num_classes": self.num_classes}

    def subset(self, indices: Int[np.ndarray, " M"], name: str) -> Self:
        """The source that holds only the examples at `indices`, renumbered from 0."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ArraySource(LabelledImages):
    """A data set that lies in memory; images are uint8 in 0..255 or float32 in 0..1."""

    name: str
    images: Images
    labels: Int[np.ndarray, " N"]
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    @property
    def digest(self) -> str:
        return digests.of_arrays(self.images, self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(
        self, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"] | None = None
    ) -> dict[str, np.ndarray]:
        return {"image": self.images[indices], "label": self.labels[indices]}

    def subset(self, indices: Int[np.ndarray, " M"], name: str) -> Self:
        return dataclasses.replace(self, name=name, images=self.images[indices], labels=self.labels[indices])


def keyed_permutation(size: int, *key: int) -> Int[np.ndarray, " size"]:
    """The permutation of `range(size)` that belongs to a key of one or two integers.

    It sorts the raw words of Philox, which NumPy promises never to change, so it is the same in every version.
    """
    words = np.array([word & _UINT64 for word in (*key, 0)[:2]], np.uint64)
    return np.argsort(np.random.Philox(key=words).random_raw(size), kind="stable")


def arrays_to_sources(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    num_classes: int | None,
    splits: tuple[str, str] = ("train", "test"),
) -> tuple[ArraySource, ArraySource]:
    """Checks two pairs (images, labels) and makes sources of them, called `splits`; `num_classes` defaults to the
    largest label + 1."""
    pairs = {split: _checked_pair(f"{name}/{split}", *pair) for split, pair in zip(splits, (train, test), strict=True)}
    largest = max(int(labels.max(initial=-1)) for _, labels in pairs.values())
    num_classes = largest + 1 if num_classes is None else num_classes
    if largest >= num_classes:
        raise UserError(f"{name}: a label is {largest}, but num_classes={num_classes} allows 0..{num_classes - 1}.")
    shapes = [pair[0].shape[1:] for pair in pairs.values()]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{name}: {splits[0]} images are {shapes[0]} but {splits[1]} images are {shapes[1]}; make them equal."
        )
    train_source, test_source = (ArraySource(f"{name}/{s}", *pair, num_classes) for s, pair in pairs.items())
    return train_source, test_source


def _checked_pair(name: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.asarray(images), np.asarray(labels)
    images = images[..., None] if images.ndim == 3 else images
    images = images.astype(np.float32) if images.dtype.kind == "f" else images
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
        raise UserError(
            f"{name}: images are {images.dtype}{list(images.shape)}; wanted uint8 or float [N, H, W] or [N, H, W, C]."
        )
    if images.dtype == np.float32 and not np.isfinite(images).all():
        raise UserError(
            f"{name}: image {int(np.argmin(np.isfinite(images).all((1, 2, 3))))} holds a number that is not finite."
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise UserError(
            f"{name}: labels are {labels.dtype}{list(labels.shape)}; wanted integers, "
            f"one for each of {len(images)} images."
        )
    if len(labels) and labels.min() < 0:
        raise UserError(f"{name}: a label is {labels.min()}; labels count from 0.")
    return images, labels.astype(np.int32)
