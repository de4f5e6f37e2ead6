"""Augmentation of whole blocks of images in NumPy, and the preprocessing that evaluation shares with it.

Every random draw is a hash of (seed, epoch, index, stream): the augmentation of an example does not depend on the
batch, the shard or the process that it is in, and no generator has a state.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Real, UInt64

from research.data import randaugment
from research.errors import UserError
from research.values import SHARE, WEIGHT, Rule, fit, not_negative

_UINT64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
# One stream for each use of chance; RandAugment counts on from its own.
_SHIFT_Y, _SHIFT_X, _FLIP, _CROP, _ERASE, _RANDAUGMENT = 0, 1, 2, 3, 10, 100


def _mix(bits: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64[np.ndarray, ...] = bits ^ (bits >> np.uint64(31))
    return mixed


Block = dict[str, np.ndarray]


class Draws:
    """Uniform numbers that are functions of (seed, epoch, index, stream): SplitMix64 with one state per example."""

    def __init__(self, seed: int, epochs: Real[np.ndarray, "#B"], indices: Int[np.ndarray, " B"]):
        key = _mix(np.array([seed * _GOLDEN & _UINT64], np.uint64))
        key = _mix(key + np.asarray(epochs).astype(np.uint64) * np.uint64(_GOLDEN))
        self._states = _mix(key + np.asarray(indices).astype(np.uint64) * np.uint64(_GOLDEN))

    def __call__(self, stream: int) -> Float[np.ndarray, " B"]:
        """One float64 in [0, 1) for each example."""
        bits = _mix(self._states + np.uint64((stream + 1) * _GOLDEN & _UINT64))
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclasses.dataclass(frozen=True)
class Augment:
    """What happens to a block of images, in this order; every field is off by default.

    Attributes:
      pad_to: zero-pads the raw image to this size, centred; also for evaluation. 0: off.
      resized_crop: side of the output of a random resized crop (Szegedy et al. 2015); evaluation resizes the shorter
        side to `resized_crop / 0.875` and takes the centre. 0: off.
      resized_crop_scale: least and greatest area of that crop, relative to the image.
      crop_padding: pads by so many pixels on each side and crops back at a random place. 0: off.
      crop_mode: what that padding holds, 'zero' or 'reflect'.
      flip: mirrors left and right with probability 1/2.
      randaugment: None or (number of operations, magnitude 0..10), see `randaugment.py`. Needs uint8 images.
      randaugment_std: standard deviation of the magnitude.
      randaugment_prob: probability of each of the operations to be applied.
      mean, std: one number, or one for each channel: the result is (x / 255 - mean) / std.
      random_erasing: probability of setting a random box to 0 after normalisation (Zhong et al. 2017).
      sequence: makes a sequence of the finished image, row by row of patches of this side, 1 for pixels (Le et al.
        2015, arXiv 1504.00941); the batch then holds "vectors" [B, T, side * side * C] in place of "image". 0: off.
    """

    pad_to: int = 0
    resized_crop: int = 0
    resized_crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_padding: int = 0
    crop_mode: str = "zero"
    flip: bool = False
    randaugment: tuple[int, float] | None = None
    randaugment_std: float = 0.5
    randaugment_prob: float = 0.5
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    random_erasing: float = 0.0
    sequence: int = 0

    def __call__(
        self, images: np.ndarray, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"], seed: int
    ) -> Float[np.ndarray, "B H W C"]:
        """Augments a block [B, H, W, C] of uint8 (or float32 in 0..1), each example by its own draws."""
        draws = Draws(seed, epochs, indices)
        images = pad_centred(images, self.pad_to)
        if self.resized_crop:
            images = random_resized_crop(images, self.resized_crop, self.resized_crop_scale, draws)
        if self.crop_padding:
            images = shift_crop(images, self.crop_padding, self.crop_mode, draws)
        if self.flip:
            images = random_flip(images, draws)
        if self.randaugment:
            num_ops, magnitude = self.randaugment
            images = randaugment.apply(
                images,
                num_ops,
                magnitude,
                self.randaugment_std,
                self.randaugment_prob,
                lambda s: draws(_RANDAUGMENT + s),
            )
        images = normalise(images, self.mean, self.std)
        return random_erase(images, self.random_erasing, draws) if self.random_erasing else images

    def train(self, block: Block, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"], seed: int) -> Block:
        """The training batch of a block {"image", "label"}; whatever else an example holds stays."""
        return self._batch(block, self(block["image"], indices, epochs, seed))

    def evaluate(self, block: Block) -> Block:
        """The evaluation batch of a block {"image", "label"}; whatever else an example holds stays."""
        return self._batch(block, self.preprocess(block["image"]))

    def _batch(self, block: Block, images: Float[np.ndarray, "B H W C"]) -> Block:
        rest = {name: values for name, values in block.items() if name not in ("image", "label")}
        own = {"vectors": to_sequence(images, self.sequence)} if self.sequence else {"image": images}
        return {**own, "label": block["label"].astype(np.int32, copy=False), **rest}

    def preprocess(self, images: np.ndarray) -> Float[np.ndarray, "B H W C"]:
        """The deterministic part, for evaluation: padding, centre crop, normalisation."""
        images = pad_centred(images, self.pad_to)
        if self.resized_crop:
            images = centre_crop(images, self.resized_crop)
        return normalise(images, self.mean, self.std)


def pad_centred(images: np.ndarray, size: int) -> np.ndarray:
    """Zero-pads [B, H, W, C] to height and width `size` (0 leaves it alone); the odd pixel goes below and right."""
    _, height, width, _ = images.shape
    if not size or (height, width) == (size, size):
        return images
    if size < max(height, width):
        raise UserError(
            f"pad_to={size} is smaller than the images ({height}x{width}); give at least {max(height, width)}."
        )
    top, left = (size - height) // 2, (size - width) // 2
    padded = np.zeros((len(images), size, size, images.shape[3]), images.dtype)
    padded[:, top : top + height, left : left + width] = images
    return padded


def to_sequence(images: Float[np.ndarray, "B H W C"], side: int) -> Float[np.ndarray, "B T D"]:
    """Patches of `side` x `side` from left to right and from top to bottom, D = side * side * C."""
    count, height, width, channels = images.shape
    if height % side or width % side:
        raise UserError(
            f"sequence={side} does not divide the images ({height}x{width}) into patches; "
            f"pad_to={-(-max(height, width) // side) * side} helps."
        )
    rows, columns = height // side, width // side
    patches = images.reshape(count, rows, side, columns, side, channels).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(patches.reshape(count, rows * columns, side * side * channels))


def shift_crop(images: np.ndarray, padding: int, mode: str, draws: Draws) -> np.ndarray:
    """Pads each side by `padding` and crops back to the same size at a random place."""
    count, height, width, _ = images.shape
    if mode == "reflect" and padding >= min(height, width):
        raise UserError(
            f"crop_padding={padding} cannot reflect images of {height}x{width}; give less than {min(height, width)}."
        )
    widths = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = np.pad(images, widths, mode="reflect" if mode == "reflect" else "constant")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    top, left = ((draws(stream) * (2 * padding + 1)).astype(np.int64) for stream in (_SHIFT_Y, _SHIFT_X))
    return np.ascontiguousarray(windows[np.arange(count), top, left].transpose(0, 2, 3, 1))


def random_flip(images: np.ndarray, draws: Draws) -> np.ndarray:
    """Mirrors each image left and right with probability 1/2."""
    flipped = np.flatnonzero(draws(_FLIP) < 0.5)
    result = images.copy()
    result[flipped] = images[flipped, :, ::-1]
    return result


def normalise(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Float[np.ndarray, "B H W C"]:
    """(x / 255 - mean) / std for uint8, (x - mean) / std for float images in 0..1."""
    channels = images.shape[3]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise UserError(
                f"{name}={values} has {len(values)} numbers for images of {channels} channels; give 1 or {channels}."
            )
    scale = 1.0 / np.asarray(std, np.float64)
    bias = -np.asarray(mean, np.float64) * scale
    scale = scale / 255 if images.dtype == np.uint8 else scale
    result: np.ndarray = np.multiply(images, scale.astype(np.float32), dtype=np.float32)
    result += bias.astype(np.float32)
    return result


def random_erase(images: Float[np.ndarray, "B H W C"], probability: float, draws: Draws) -> np.ndarray:
    """Sets one box to 0, of 2% to 1/3 of the area and aspect ratio 0.3 to 3.3, cut to fit, with a probability."""
    height, width = images.shape[1:3]
    happens, area, aspect, y, x = (draws(_ERASE + k) for k in range(5))
    area = height * width * (0.02 + area * (1 / 3 - 0.02))
    aspect = np.exp(math.log(0.3) + aspect * math.log(3.3 / 0.3))
    box_height = np.clip(np.round(np.sqrt(area * aspect)), 1, height)
    box_width = np.clip(np.round(np.sqrt(area / aspect)), 1, width)
    top, left = np.floor(y * (height - box_height + 1)), np.floor(x * (width - box_width + 1))
    rows, columns = np.arange(height), np.arange(width)
    in_rows = (rows >= top[:, None]) & (rows < (top + box_height)[:, None]) & (happens < probability)[:, None]
    in_columns = (columns >= left[:, None]) & (columns < (left + box_width)[:, None])
    images[in_rows[:, :, None] & in_columns[:, None, :]] = 0
    return images


def random_resized_crop(images: np.ndarray, size: int, scale: tuple[float, float], draws: Draws) -> np.ndarray:
    """Crops a box of random area and aspect ratio (3/4 to 4/3), cut to fit, and resizes it to `size` (antialiased)."""
    height, width = images.shape[1:3]
    area, aspect, y, x = (draws(_CROP + k) for k in range(4))
    area = height * width * (scale[0] + area * (scale[1] - scale[0]))
    aspect = np.exp(math.log(3 / 4) + aspect * math.log((4 / 3) / (3 / 4)))
    box_width = np.clip(np.round(np.sqrt(area * aspect)), 1, width)
    box_height = np.clip(np.round(np.sqrt(area / aspect)), 1, height)
    left, top = np.floor(x * (width - box_width + 1)), np.floor(y * (height - box_height + 1))
    boxes = np.stack([left, top, left + box_width, top + box_height], 1)
    return np.stack([resize_box(image, size, tuple(box)) for image, box in zip(images, boxes, strict=True)])


def centre_crop(images: np.ndarray, size: int) -> np.ndarray:
    """The centre 87.5% of the shorter side, resized to `size`: resize to size / 0.875 and crop, in one step."""
    height, width = images.shape[1:3]
    side = 0.875 * min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return np.stack([resize_box(image, size, (left, top, left + side, top + side)) for image in images])


def resize_box(image: np.ndarray, size: int, box: tuple[float, float, float, float]) -> np.ndarray:
    """Resizes the box (left, top, right, bottom) of [H, W, C] to [size, size, C], bicubic with antialiasing."""
    from PIL import Image

    if image.dtype != np.uint8:
        raise UserError(f"Resizing crops need uint8 images, not {image.dtype}.")
    planes = [image] if image.shape[2] == 3 else np.moveaxis(image, 2, 0)
    resized = [np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC, box=box)) for p in planes]
    return resized[0] if image.shape[2] == 3 else np.stack(resized, 2)


RULES = {
    "resized_crop_scale": Rule(above=0, most=1),
    "crop_mode": Rule(choices=("zero", "reflect")),
    "randaugment_std": WEIGHT,
    "randaugment_prob": SHARE,
    "std": Rule(above=0),
    "random_erasing": SHARE,
}
"""Beside types; sizes and numbers of pixels count from 0, which is off."""
PARTS_OF = {
    "resized_crop_scale": "resized_crop",
    "crop_mode": "crop_padding",
    "randaugment_std": "randaugment",
    "randaugment_prob": "randaugment",
}
"""Option -> the one without which nothing reads it."""
_ONE_OR_MORE = float | tuple[float, ...]


def make_augment(config: Mapping[str, Any] | None = None) -> Augment:
    """An `Augment` from a plain or ml_collections dictionary. Raises UserError for unknown fields and bad values."""
    values: dict[str, Any] = {}
    kinds = typing.get_type_hints(Augment) | {"mean": _ONE_OR_MORE, "std": _ONE_OR_MORE}
    valid = [field.name for field in dataclasses.fields(Augment)]
    for key, value in dict(config or {}).items():
        if key not in valid:
            raise UserError(f"Unknown augmentation {key!r}. Valid: {', '.join(valid)}.")
        off = key == "randaugment" and value in ((), [])
        values[key] = (
            None if off else fit(value, kinds[key], f"data.augment.{key}", RULES.get(key, not_negative(0, kinds[key])))
        )
    for key in ("mean", "std"):
        if isinstance(values.get(key), float):
            values[key] = (values[key],)
    augment = Augment(**values)
    least, greatest = augment.resized_crop_scale
    if least > greatest:
        raise UserError(
            f"data.augment.resized_crop_scale={augment.resized_crop_scale}; valid: (least, greatest), "
            "the least not above the other"
        )
    if augment.randaugment is not None and not (augment.randaugment[0] >= 1 and 0 <= augment.randaugment[1] <= 10):
        raise UserError(
            f"data.augment.randaugment={augment.randaugment}; valid: None or (operations from 1, magnitude 0..10)"
        )
    return augment
