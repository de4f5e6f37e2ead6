"""Random-access data sources and the named data sets: `load_splits(name)` gives train, validation and test.

A source holds examples that are addressed by index and read a block at a time. The validation split is cut from the
training data; the test split is read as it is and never touched by anything else.
"""

import dataclasses
import difflib
import inspect
import pathlib
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int, UInt8

from research.data import idx
from research.errors import UserError

Images = UInt8[np.ndarray, "N H W C"] | Float[np.ndarray, "N H W C"]

_UINT64 = (1 << 64) - 1
# Second words of the Philox keys, so that no two uses of one seed share a stream.
_SPLIT_STREAM = 0x5917
_DIGITS_TEST_SEED, _DIGITS_TEST_EXAMPLES = 1797, 360


class Source(Protocol):
    """Labelled images addressed by index."""

    name: str
    num_classes: int

    @property
    def labels(self) -> Int[np.ndarray, " N"]: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    def __len__(self) -> int: ...

    def gather(self, indices: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """The block `{"image": [B, H, W, C], "label": [B]}` of the examples at `indices`."""
        ...

    def subset(self, indices: Int[np.ndarray, " M"], name: str) -> "Source":
        """The source that holds only the examples at `indices`, renumbered from 0."""
        ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A data set that lies in memory; images are uint8 in 0..255 or float32 in 0..1."""

    name: str
    images: Images
    labels: Int[np.ndarray, " N"]
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        return {"image": self.images[indices], "label": self.labels[indices]}

    def subset(self, indices: Int[np.ndarray, " M"], name: str) -> "ArraySource":
        return dataclasses.replace(self, name=name, images=self.images[indices], labels=self.labels[indices])


def keyed_permutation(size: int, *key: int) -> Int[np.ndarray, " size"]:
    """The permutation of `range(size)` that belongs to a key of one or two integers.

    It sorts the raw words of Philox, which NumPy promises never to change, so it is the same in every version.
    """
    words = np.array([word & _UINT64 for word in (*key, 0)[:2]], np.uint64)
    return np.argsort(np.random.Philox(key=words).random_raw(size), kind="stable")


def stratified_split(labels: Int[np.ndarray, " N"], count: int, seed: int) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, " M"]]:
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
    held_out = [order[ordered_labels == c][:quota] for c, quota in zip(classes, quotas, strict=True)]
    held_out = np.sort(np.concatenate([np.empty(0, np.int64), *held_out]))
    return np.setdiff1d(np.arange(len(labels)), held_out, assume_unique=True), held_out


def load_splits(
    name: str,
    *,
    data_dir: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    **options: Any,
) -> dict[str, Source]:
    """The splits 'train', 'validation' and 'test' of a named data set.

    Args:
      name: one of `digits`, `fashion_mnist`, `mnist`, `idx`, `synthetic`, `arrays`, or `tfds:NAME`.
      data_dir: where the files lie, for the data sets that are read from files.
      validation_fraction: the part of the training data held out for validation, stratified by class; 0 for none.
      seed: keys the choice of the validation examples. The test split does not depend on it.
      **options: options of that data set; an unknown one is an error that lists the valid ones.

    Raises:
      UserError: unknown name or option, missing or damaged files, or a fraction outside [0, 1).
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction={validation_fraction} is not in [0, 1): give the part of the training data to hold out.")
    loader, positional = _find_loader(name)
    _check_options(name, loader, options)
    train, test = loader(*positional, data_dir=data_dir, **options)
    held_out = round(validation_fraction * len(train))
    kept, held = stratified_split(train.labels, held_out, seed)
    if len(kept) == 0:
        raise UserError(f"{name}: no training example is left of {len(train)} with validation_fraction={validation_fraction}; lower it.")
    return {
        "train": train.subset(kept, f"{name}/train"),
        "validation": train.subset(held, f"{name}/validation"),
        "test": test,
    }


def _find_loader(name: str):
    if name.startswith("tfds:"):
        from research.data import tfds_source

        return tfds_source.load_tfds, (name.removeprefix("tfds:"),)
    if name in _LOADERS:
        return _LOADERS[name], ()
    near = difflib.get_close_matches(name, _LOADERS, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f"Unknown data set {name!r}.{hint} Valid: {', '.join(_LOADERS)}, tfds:NAME (any TFDS data set in array_record form).")


def _check_options(name: str, loader, options: dict[str, Any]) -> None:
    parameters = inspect.signature(loader).parameters.values()
    valid = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "data_dir"]
    for option in options:
        if option not in valid:
            raise UserError(f"Data set {name!r} has no option {option!r}. Valid: {', '.join(valid) or 'none'}.")


def _load_digits(*, data_dir: str | None = None) -> tuple[ArraySource, ArraySource]:
    """The 1797 digits of scikit-learn, 8x8 with values 0..16; 360 of them, by a fixed stratified choice, are the test."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    # v * 255 / 16 never ends in exactly .5 but at v = 8, where round-half-even gives 128.
    images = np.round(raw.images * 255 / 16).astype(np.uint8)[..., None]
    everything = ArraySource("digits", images, raw.target.astype(np.int32), 10)
    train, test = stratified_split(everything.labels, _DIGITS_TEST_EXAMPLES, _DIGITS_TEST_SEED)
    return everything.subset(train, "digits/train"), everything.subset(test, "digits/test")


def _load_idx(*, data_dir: str | None = None, num_classes: int | None = None) -> tuple[ArraySource, ArraySource]:
    """A folder with four IDX files, given by `data_dir`."""
    if data_dir is None:
        raise UserError(
            "Data set 'idx' needs data_dir: the folder with the four IDX files (train-images-idx3-ubyte and so on, .gz or not)."
        )
    return _idx_sources("idx", pathlib.Path(data_dir), num_classes)


def _load_fashion_mnist(*, data_dir: str | None = None) -> tuple[ArraySource, ArraySource]:
    return _idx_sources("fashion_mnist", idx.find_folder("fashion_mnist", data_dir), 10)


def _load_mnist(*, data_dir: str | None = None) -> tuple[ArraySource, ArraySource]:
    return _idx_sources("mnist", idx.find_folder("mnist", data_dir), 10)


def _idx_sources(name: str, folder: pathlib.Path, num_classes: int | None) -> tuple[ArraySource, ArraySource]:
    arrays = idx.read_folder(folder)
    return arrays_to_sources(name, arrays["train"], arrays["test"], num_classes)


def _load_arrays(
    *, train: tuple, test: tuple, num_classes: int | None = None, data_dir: str | None = None
) -> tuple[ArraySource, ArraySource]:
    """Arrays of the caller's own: `train=(images, labels)`, `test=(images, labels)`."""
    return arrays_to_sources("arrays", train, test, num_classes)


def arrays_to_sources(name: str, train: tuple, test: tuple, num_classes: int | None) -> tuple[ArraySource, ArraySource]:
    """Checks two pairs (images, labels) and makes sources of them; `num_classes` defaults to the largest label + 1."""
    pairs = {split: _checked_pair(f"{name}/{split}", *pair) for split, pair in (("train", train), ("test", test))}
    largest = max(int(labels.max(initial=-1)) for _, labels in pairs.values())
    num_classes = largest + 1 if num_classes is None else num_classes
    if largest >= num_classes:
        raise UserError(f"{name}: a label is {largest}, but num_classes={num_classes} allows 0..{num_classes - 1}.")
    if pairs["train"][0].shape[1:] != pairs["test"][0].shape[1:]:
        shapes = [pair[0].shape[1:] for pair in pairs.values()]
        raise UserError(f"{name}: training images are {shapes[0]} but test images are {shapes[1]}; make them equal.")
    train_source, test_source = (ArraySource(f"{name}/{s}", *pair, num_classes) for s, pair in pairs.items())
    return train_source, test_source


def _checked_pair(name: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.asarray(images), np.asarray(labels)
    images = images[..., None] if images.ndim == 3 else images
    images = images.astype(np.float32) if images.dtype.kind == "f" else images
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
        raise UserError(f"{name}: images are {images.dtype}{list(images.shape)}; wanted uint8 or float [N, H, W] or [N, H, W, C].")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise UserError(f"{name}: labels are {labels.dtype}{list(labels.shape)}; wanted integers, one for each of {len(images)} images.")
    if len(labels) and labels.min() < 0:
        raise UserError(f"{name}: a label is {labels.min()}; labels count from 0.")
    return images, labels.astype(np.int32)


def _load_synthetic(
    *,
    image_size: int = 16,
    channels: int = 3,
    num_classes: int = 10,
    examples: int = 1024,
    test_examples: int = 256,
    data_dir: str | None = None,
) -> tuple[ArraySource, ArraySource]:
    """Class-dependent random patterns under noise; a function of the options alone."""
    sizes = (image_size, channels, num_classes, examples, test_examples)
    for option, value in zip(("image_size", "channels", "num_classes", "examples", "test_examples"), sizes, strict=True):
        if value < 1:
            raise UserError(f"synthetic: {option}={value} must be at least 1.")
    shape = (image_size, image_size, channels)
    generators = [np.random.Generator(np.random.Philox(key=np.array([image_size, k], np.uint64))) for k in range(3)]
    patterns = generators[0].integers(64, 192, (num_classes, *shape), dtype=np.uint8)

    def split(stream: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count, dtype=np.int32) % num_classes
        images = patterns[labels]
        images += generators[stream].integers(0, 128, images.shape, dtype=np.uint8) - np.uint8(64)
        return images, labels

    return arrays_to_sources("synthetic", split(1, examples), split(2, test_examples), num_classes)


_LOADERS = {
    "digits": _load_digits,
    "fashion_mnist": _load_fashion_mnist,
    "mnist": _load_mnist,
    "idx": _load_idx,
    "synthetic": _load_synthetic,
    "arrays": _load_arrays,
}
