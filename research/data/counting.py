"""Crowds of digits to be counted: real 8x8 digits of scikit-learn scattered on a canvas, with a density map of their
centres.

As in a street, what is lower in the image is nearer and so larger: three sizes by thirds of the height. Part of a crowd
stands around one place, the rest anywhere. Image i is a function of (seed, split, i), and of the epoch when `fresh`;
nothing is stored.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from research.data import digests
from research.data.keyed_random import KeyedRandom
from research.data.kinds import DENSITY
from research.data.probes import SPLITS, check_counts, require
from research.data.registry import register
from research.data.source import Source
from research.data.sources import load_splits

SIZES = (6, 8, 12)
"""Sides of digits in the upper, the middle and the lower third, in pixels."""


@functools.lru_cache
def _stamps(split: str) -> Float[np.ndarray, "N 3 S S"]:
    """Digits of a split at every size, centred in the largest, values 0..1; test digits are never trained on."""
    from PIL import Image

    digits: Any = load_splits("digits")[split]
    images = digits.images[..., 0]
    largest = max(SIZES)
    stamps = np.zeros((len(images), len(SIZES), largest, largest), np.float32)
    for i, image in enumerate(images):
        for j, size in enumerate(SIZES):
            start = (largest - size) // 2
            resized = (
                np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR), np.float32) / 255
            )
            stamps[i, j, start : start + size, start : start + size] = resized
    return stamps


@dataclasses.dataclass(frozen=True)
class Counting(Source):
    """A source of `examples` images.

    Attributes:
      least, most: numbers of digits, all equally likely.
      sigma: standard deviation of the bump that each digit adds to the density, in pixels; each sums to 1 inside the
        canvas.
    """

    name: str
    digits: str
    examples: int
    seed: int
    stream: tuple[int, ...]
    fresh: bool
    image_size: int
    least: int
    most: int
    sigma: float

    @property
    def mean_count(self) -> float:
        return (self.least + self.most) / 2

    def facts(self) -> Mapping[str, Any]:
        return {"mean_count": self.mean_count}

    @property
    def digest(self) -> str:
        return digests.of_examples(self)

    def __len__(self) -> int:
        return self.examples

    def gather(
        self, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"] | None = None
    ) -> dict[str, np.ndarray]:
        """The block {"image": float32 [B, H, W, 1] in 0..1, "density": float32 [B, H, W], which sums to the number of
        digits}."""
        random = KeyedRandom.of(self.seed, self.stream, indices, epochs if self.fresh else None)
        counts = self.least + random.integers("count", self.most - self.least + 1)
        there = np.arange(self.most) < counts[:, None]
        y, x = self._places(random)
        return {"image": self._paint(random, y, x, there), "density": self._density(y, x, there)}

    def _places(self, random: KeyedRandom) -> tuple[Float[np.ndarray, "B N"], Float[np.ndarray, "B N"]]:
        """Rows and columns of the centres, in pixels: a crowd of random size around one place, the others anywhere."""
        side = self.image_size
        anywhere = random.uniform("anywhere", 2, self.most) * side
        centre, spread = random.uniform("centre", 2, 1) * side, (0.08 + 0.2 * random.uniform("spread", 1, 1)) * side
        crowd = centre + spread * random.normal("crowd", 2, self.most)
        share = random.uniform("share", 1)
        chosen = np.where((random.uniform("member", self.most) < share)[:, None], crowd, anywhere)
        y, x = np.moveaxis(np.clip(chosen, 0, side - 1), 1, 0)
        return y, x

    def _paint(
        self, random: KeyedRandom, y: np.ndarray, x: np.ndarray, there: np.ndarray
    ) -> Float[np.ndarray, "B H W 1"]:
        """Pastes the digits; where they overlap the brighter one is seen."""
        stamps, side, largest = _stamps(self.digits), self.image_size, max(SIZES)
        size = np.minimum((y * len(SIZES) / side).astype(np.int64), len(SIZES) - 1)
        pasted = stamps[random.integers("digit", len(stamps), self.most), size]  # [B, N, S, S]
        pasted = pasted * there[:, :, None, None]
        canvas = np.zeros((len(y), side + 2 * largest, side + 2 * largest), np.float32)
        offsets = np.arange(largest) - largest // 2 + largest
        rows, columns = (np.round(place).astype(np.int64)[..., None] + offsets for place in (y, x))
        which = np.arange(len(y))[:, None, None, None]
        np.maximum.at(canvas, (which, rows[..., :, None], columns[..., None, :]), pasted)
        return np.ascontiguousarray(canvas[:, largest:-largest, largest:-largest, None])

    def _density(self, y: np.ndarray, x: np.ndarray, there: np.ndarray) -> Float[np.ndarray, "B H W"]:
        """A Gaussian at every centre, which sums to 1 over the canvas also at its edge."""
        pixels = np.arange(self.image_size)

        def bumps(place: np.ndarray) -> Float[np.ndarray, "B N H"]:
            heights = np.exp(-0.5 * np.square((pixels - place[..., None]) / self.sigma))
            shares: np.ndarray = heights / heights.sum(-1, keepdims=True)
            return shares

        density: np.ndarray = (np.swapaxes(bumps(y) * there[..., None], 1, 2) @ bumps(x)).astype(np.float32)
        return density


@register("counting", DENSITY)
def load_counting(
    *,
    train_examples: int = 4000,
    test_examples: int = 200,
    seed: int = 0,
    fresh: bool = False,
    image_size: int = 64,
    least: int = 1,
    most: int = 40,
    sigma: float = 2.0,
) -> dict[str, Any]:
    """The splits 'train', 'validation' and 'test', with streams and digits of their own.

    Args:
      train_examples: number of training images.
      test_examples: number of validation images, and of test images.
      seed: keys every image.
      fresh: other training images in every epoch (where `gather` is told the epochs).
      image_size, least, most, sigma: see `Counting`; the image is square.

    Raises:
      UserError: counts or sizes below 1.
    """
    check_counts("counting", {"train_examples": train_examples, "test_examples": test_examples})
    require(
        image_size >= max(SIZES),
        f"counting: image_size={image_size} is less than the largest digit's {max(SIZES)} pixels.",
    )
    require(1 <= least <= most, f"counting: least={least} and most={most} must be 1 <= least <= most.")
    require(sigma > 0, f"counting: sigma={sigma} must be above 0.")
    counts = {"train": train_examples, "validation": test_examples, "test": test_examples}
    return {
        split: Counting(
            f"counting/{split}",
            split,
            counts[split],
            seed,
            (stream,),
            fresh and split == "train",
            image_size,
            least,
            most,
            sigma,
        )
        for split, stream in SPLITS.items()
    }
