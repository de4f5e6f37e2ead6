"""TensorFlow Datasets in array_record format, read without TensorFlow.

Small data sets of one image shape are decoded once into memory; others are decoded example by example as they are
read, after which images of different shapes are resized and cropped to one.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
from jaxtyping import Int, UInt8

from research.data import digests
from research.data.augment import resize_box
from research.data.images import MODES, check_image, decode_image
from research.data.kinds import IMAGE
from research.data.registry import register
from research.data.source import LabelledImages, arrays_to_sources
from research.data.tfds_builder import open_builder
from research.data.tfds_prepare import prepare
from research.errors import UserError
from research.files import printable

_IN_MEMORY_BYTES = 1 << 29
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class TfdsSource(LabelledImages):
    """Examples of one TFDS split, decoded when they are gathered.

    Attributes:
      records: the split as `tfds.data_source`, whose examples are dictionaries with encoded images
        (`research.data.images`).
      indices: which of the records this source holds, in its own order.
      image_size: images whose sides differ from it are resized by the shorter side and cropped at the centre; 0
        leaves them as they are.
      files: that the records lie in.
    """

    name: str
    records: Any
    indices: Int[np.ndarray, " N"]
    labels: Int[np.ndarray, " N"]
    num_classes: int
    image_key: str
    image_size: int
    image_shape: tuple[int, int, int]
    files: tuple[str, ...]

    @property
    def digest(self) -> str:
        return digests.of_arrays(
            np.frombuffer(digests.of_files(self.files).encode(), np.uint8), self.indices, self.labels
        )

    def __len__(self) -> int:
        return len(self.indices)

    def gather(
        self, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"] | None = None
    ) -> dict[str, np.ndarray]:
        numbers = self.indices[indices].tolist()
        images = [
            self.decoded(number, example)
            for number, example in zip(numbers, self.records.__getitems__(numbers), strict=True)
        ]
        return {
            "image": np.stack(images) if images else np.empty((0, *self.image_shape), np.uint8),
            "label": self.labels[indices],
        }

    def subset(self, indices: Int[np.ndarray, " M"], name: str) -> Self:
        return dataclasses.replace(self, name=name, indices=self.indices[indices], labels=self.labels[indices])

    def decoded(self, number: int, example: Mapping[str, Any]) -> UInt8[np.ndarray, "H W C"]:
        """The image of an example, of the shape of all. Raises UserError with the example's number, and its file's name
        if it has one."""
        try:
            image = self._sized(decode_image(example[self.image_key], self.image_shape[2]))
            if image.shape != self.image_shape:
                raise UserError(f"it is {image.shape[0]}x{image.shape[1]}; set image_size where images differ in size")
        except UserError as error:
            raise UserError(f"{self.name}: {_example(number, example)} cannot be read: {error}") from None
        return image

    def _sized(self, image: np.ndarray) -> np.ndarray:
        size, (height, width) = self.image_size, image.shape[:2]
        if not size or (height, width) == (size, size):
            return image
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        return resize_box(image, size, (left, top, left + side, top + side))


@register("tfds:", IMAGE, ready=False, prepare=prepare)
def load_tfds(
    name: str,
    *,
    data_dir: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    image_size: int = 0,
    in_memory: bool | None = None,
) -> tuple[LabelledImages, LabelledImages]:
    """The training and test data of a TFDS image classification set.

    `test_split` defaults to 'test', or to 'validation' where there is no 'test'. `image_size` is needed where images
    differ in shape. `in_memory` defaults to whether the decoded images have one shape and fit 512 MiB.
    """
    builder = open_builder(name, data_dir)
    splits = list(builder.info.splits)
    test_split = test_split or ("test" if "test" in splits else "validation")
    for split in (train_split, test_split):
        if split.split("[")[0] not in splits:
            raise UserError(f"tfds:{name} has no split {split!r}. Valid: {', '.join(splits)}.")
    train, test = (_open_split(builder, name, split, image_size) for split in (train_split, test_split))
    for source in (train, test):
        if source.labels.min(initial=0) < 0:
            raise UserError(
                f"{source.name} has examples without a label; choose another with train_split or test_split: "
                f"{', '.join(splits)}."
            )
    if in_memory is None:
        fixed = image_size or None not in builder.info.features[train.image_key].shape
        in_memory = bool(fixed) and (len(train) + len(test)) * int(np.prod(train.image_shape)) <= _IN_MEMORY_BYTES
    if not in_memory:
        return train, test
    in_train, in_test = ((_decode_all(source), source.labels) for source in (train, test))
    train_source, test_source = arrays_to_sources(f"tfds:{name}", in_train, in_test, train.num_classes)
    return dataclasses.replace(train_source, name=train.name), dataclasses.replace(test_source, name=test.name)


def _open_split(builder: Any, name: str, split: str, image_size: int) -> TfdsSource:
    import tensorflow_datasets as tfds

    features, keys = builder.info.features, builder.info.supervised_keys
    if not keys or not all(key in features for key in keys[:2]):
        raise UserError(f"tfds:{name} declares no (image, label) pair; only image classification sets can be read.")
    image_key, label_key = keys[:2]
    image, label = features[image_key], features[label_key]
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(
            f"tfds:{name} pairs {type(image).__name__} with {type(label).__name__}; "
            "only Image with ClassLabel can be read."
        )
    height, width, channels = image.shape
    if not image_size and None in (height, width):
        raise UserError(f"The images of tfds:{name} differ in size; set image_size, for example image_size=256.")
    shape = (image_size or height, image_size or width, channels)
    if image.np_dtype not in (np.uint8, np.uint16) or channels not in MODES:
        valid = ", ".join(map(str, MODES))
        raise UserError(
            f"The images of tfds:{name} are {np.dtype(image.np_dtype).name} of {channels} channels; valid: "
            f"uint8 of {valid}."
        )
    with _reading(f"tfds:{name}/{split}"):
        undecoded = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
    labels, bad = [], []
    for number, example in enumerate(_records(undecoded, f"tfds:{name}/{split}")):
        labels.append(example[label_key])
        try:
            check_image(example[image_key])
        except UserError as error:
            bad.append(f"{_example(number, example)} ({error})")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"tfds:{name}/{split}: {len(bad)} of {len(labels)} images cannot be read: {', '.join(bad[:3])}{more};\n"
            "get these files again and prepare the data set anew"
        )
    return TfdsSource(
        name=f"tfds:{name}/{split}",
        records=undecoded,
        indices=np.arange(len(undecoded)),
        labels=np.asarray(labels, np.int32),
        num_classes=label.num_classes,
        image_key=image_key,
        image_size=image_size,
        image_shape=shape,
        files=tuple(map(str, builder.info.splits[split.split("[")[0]].filepaths)),
    )


_NAME_KEYS = ("file_name", "filename", "image/filename")


def _example(number: int, example: Mapping[str, Any]) -> str:
    """What messages call an example: its number, and the name of its file where the data set has one."""
    names = [example[key] for key in _NAME_KEYS if key in example]
    shown = [printable(name.decode(errors="replace") if isinstance(name, bytes) else name) for name in names]
    return f"example {number}{f' ({shown[0]})' if shown else ''}"


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns what array_record and TFDS raise at damaged files, of a dozen types, into a UserError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        told = printable(" ".join(str(error).split()), 160)
        raise UserError(f"{name} cannot be read ({type(error).__name__}: {told}); prepare it anew") from error


def _records(records: Any, name: str) -> Iterator[dict[str, Any]]:
    for start in range(0, len(records), _BLOCK):
        with _reading(f"{name}, examples from {start}"):
            block = records.__getitems__(list(range(start, min(start + _BLOCK, len(records)))))
        yield from block


def read_records(builder: Any, name: str, split: str) -> Iterator[dict[str, Any]]:
    """Yields the examples of a split; what is damaged is a UserError."""
    with _reading(f"tfds:{name}/{split}"):
        records = builder.as_data_source(split)
    yield from _records(records, f"tfds:{name}/{split}")


def _decode_all(source: TfdsSource) -> np.ndarray:
    """All images; names those that are damaged in their midst, which `check_image` does not see, up to three."""
    images, bad = np.empty((len(source), *source.image_shape), np.uint8), []
    for number, example in enumerate(_records(source.records, source.name)):
        try:
            images[number] = source.decoded(number, example)
        except UserError as error:
            bad.append(str(error))
    if bad:
        raise UserError(bad[0] + (f";\nso are {len(bad) - 1} more" if len(bad) > 1 else ""))
    return images
