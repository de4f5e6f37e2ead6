"""The named data sets: `load_splits(name)` gives train, validation and test.

The validation split is cut from the training data; the test split is read as it is and never touched by anything else.
"""

import dataclasses
import difflib
import importlib
import inspect
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Int

from research import seeds
from research.data import idx
from research.data.arrays import load_arrays
from research.data.source import AnySource, ArraySource, arrays_to_sources, keyed_permutation
from research.errors import UserError
from research.values import fit_options

# Second words of the Philox keys, so that no two uses of one seed share a stream.
_SPLIT_STREAM, _SUBSET_STREAM = 0x5917, 0x50B5
_DIGITS_TEST_SEED, _DIGITS_TEST_EXAMPLES = 1797, 360


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
) -> dict[str, AnySource]:
    """The splits 'train', 'validation' and 'test' of a named data set.

    Args:
      name: one of `digits`, `handwriting`, `fashion_mnist`, `mnist`, `idx`, `arrays`, `tfds:NAME` (images); `counting` (images and
        densities); `stdlib_text`, `text`, `tiny_shakespeare`, `token_file`, `tfds_text:NAME`, `probe:KIND` (tokens); `in_context:TASK`
        (vectors); `stdlib_pairs`, `text_pairs` (pairs of texts).
      data_dir: where the files lie, for the data sets that are read from files.
      validation_fraction: of images, the part of the training data held out for validation, stratified by class; 0 for none.
        The other data sets have splits of their own, as have `arrays` that hold validation examples.
      seed: keys the choice of the validation examples. The test split does not depend on it.
      **options: options of that data set; an unknown one is an error that lists the valid ones.

    Raises:
      UserError: unknown name or option, missing or damaged files, or a fraction outside [0, 1), or a seed out of range.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction={validation_fraction} is not in [0, 1): give the part of the training data to hold out.")
    loader, positional, ready = _find_loader(name)
    options = _typed_options(name, loader, options)
    seeds.check(seed, "data.options.seed")
    takes = inspect.signature(loader).parameters
    place = {key: value for key, value in {"data_dir": data_dir, "seed": seed}.items() if key in takes and key not in options}
    if ready:
        return loader(*positional, **place, **options)
    train, *own, test = loader(*positional, **place, **options)
    if own:
        return {"train": train, "validation": own[0], "test": test}
    held_out = round(validation_fraction * len(train))
    kept, held = stratified_split(train.labels, held_out, seed)
    if len(kept) == 0:
        raise UserError(f"{name}: no training example is left of {len(train)} with validation_fraction={validation_fraction}; lower it.")
    return {
        "train": train.subset(kept, f"{name}/train"),
        "validation": train.subset(held, f"{name}/validation"),
        "test": test,
    }


_ELSEWHERE = {
    "tfds:": ("tfds_source", "load_tfds", "image"),  # any TFDS set of images in array_record form
    "stdlib_text": ("stdlib_text", "load_stdlib_text", "tokens"),
    "stdlib_pairs": ("stdlib_pairs", "load_stdlib_pairs", "pairs"),
    "text_pairs": ("text_pairs", "load_text_pairs", "pairs"),
    "text": ("text", "load_text", "tokens"),
    "tiny_shakespeare": ("text", "load_tiny_shakespeare", "tokens"),
    "token_file": ("token_files", "load_token_file", "tokens"),
    "tfds_text:": ("text", "load_tfds_text", "tokens"),  # any TFDS set of texts
    "probe:": ("probes", "load_probe", "tokens"),  # a synthetic probe
    "counting": ("counting", "load_counting", "density"),  # digits scattered on a canvas, with density maps
    "in_context:": ("in_context", "load_in_context", "vectors"),  # functions learnt in context
}
"""Name, or prefix before a name -> module of this room, loader, the kind of its examples; all but the first give their splits ready."""


def kind_of_examples(name: str) -> str:
    """Returns what the examples of a named data set are, without reading any: image, density (images with maps), tokens, pairs or vectors.

    Raises:
      UserError: an unknown name.
    """
    _find_loader(name)
    head, colon, _ = name.partition(":")
    return "image" if name in _LOADERS else _ELSEWHERE[head + colon][2]


def settings_read(name: str) -> tuple[str, ...]:
    """Returns which of data.dir, data.validation_fraction and data.augment a named data set goes by.

    Raises:
      UserError: an unknown name.
    """
    loader, _, ready = _find_loader(name)
    files = ("data.dir",) if "data_dir" in inspect.signature(loader).parameters else ()
    whole = () if ready else ("data.validation_fraction",)
    return (*files, *whole, *(("data.augment",) if kind_of_examples(name) == "image" else ()))


def _find_loader(name: str) -> tuple[Any, tuple[str, ...], bool]:
    """Returns (loader, its positional arguments, whether it gives all splits)."""
    if name in _LOADERS:
        return _LOADERS[name], (), False
    head, colon, rest = name.partition(":")
    if head + colon in _ELSEWHERE:
        module, loader, _ = _ELSEWHERE[head + colon]
        return getattr(importlib.import_module(f"research.data.{module}"), loader), (rest,) if colon else (), head != "tfds"
    valid = [*_LOADERS, *(key + "NAME" if key.endswith(":") else key for key in _ELSEWHERE)]
    near = difflib.get_close_matches(name, valid, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f"Unknown data set {name!r}.{hint} Valid: {', '.join(valid)} (tfds: TFDS data sets in array_record form).")


def _typed_options(name: str, loader, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options with the types that the loader's annotations ask for."""
    parameters = inspect.signature(loader).parameters.values()
    valid = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "data_dir"]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)  # it checks the rest itself
    for option in options:
        if option not in valid and not open_ended:
            raise UserError(f"Data set {name!r} has no option {option!r}. Valid: {', '.join(valid) or 'none'}.")
    return fit_options(options, loader, "data.options.")


def _load_digits() -> tuple[ArraySource, ArraySource]:
    """The 1797 digits of scikit-learn, 8x8 with values 0..16; 360 of them, by a fixed stratified choice, are the test."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    # v * 255 / 16 never ends in exactly .5 but at v = 8, where round-half-even gives 128.
    images = np.round(raw.images * 255 / 16).astype(np.uint8)[..., None]
    everything = ArraySource("digits", images, raw.target.astype(np.int32), 10)
    train, test = stratified_split(everything.labels, _DIGITS_TEST_EXAMPLES, _DIGITS_TEST_SEED)
    return everything.subset(train, "digits/train"), everything.subset(test, "digits/test")


def _load_idx(
    *, data_dir: str | None = None, num_classes: int | None = None, average: int = 1, train_examples: int = 0
) -> tuple[ArraySource, ArraySource]:
    """A folder with four IDX files, given by `data_dir`; `average` and `train_examples` as in `reduced`."""
    if data_dir is None:
        raise UserError(
            "Data set 'idx' needs data_dir: the folder with the four IDX files (train-images-idx3-ubyte and so on, .gz or not)."
        )
    return reduced(*_idx_sources("idx", pathlib.Path(data_dir), num_classes), average, train_examples)


def _load_fashion_mnist(*, data_dir: str | None = None, average: int = 1, train_examples: int = 0) -> tuple[ArraySource, ArraySource]:
    return reduced(*_idx_sources("fashion_mnist", idx.find_folder("fashion_mnist", data_dir), 10), average, train_examples)


def _load_mnist(*, data_dir: str | None = None, average: int = 1, train_examples: int = 0) -> tuple[ArraySource, ArraySource]:
    return reduced(*_idx_sources("mnist", idx.find_folder("mnist", data_dir), 10), average, train_examples)


def _idx_sources(name: str, folder: pathlib.Path, num_classes: int | None) -> tuple[ArraySource, ArraySource]:
    arrays = idx.read_folder(folder)
    return arrays_to_sources(name, arrays["train"], arrays["test"], num_classes)


def _load_handwriting(*, user: int = -1) -> tuple[AnySource, AnySource]:
    """Digits of simulated writers."""
    from research.data.handwriting import load_handwriting

    return load_handwriting(user=user)


def reduced(train: ArraySource, test: ArraySource, average: int, train_examples: int) -> tuple[ArraySource, ArraySource]:
    """Returns smaller data sets of uint8 images.

    Args:
      average: side of the blocks of pixels of which each image keeps the rounded mean; 1: the images as they are.
      train_examples: how many of the training examples stay, the first of a fixed permutation, in their order; 0: all. Validation
        examples are taken from these.

    Raises:
      UserError: blocks that do not divide the images, or more examples than there are.
    """
    height, width, _ = train.image_shape
    if average < 1 or height % average or width % average:
        raise UserError(f"{train.name}: average={average} does not divide images of {height}x{width}; give a divisor of both.")
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
    return np.round(blocks.mean((2, 4), dtype=np.float32)).astype(np.uint8)


def _load_synthetic(
    *,
    image_size: int = 16,
    channels: int = 3,
    num_classes: int = 10,
    examples: int = 1024,
    test_examples: int = 256,
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
    "handwriting": _load_handwriting,
    "synthetic": _load_synthetic,
    "arrays": load_arrays,
}
