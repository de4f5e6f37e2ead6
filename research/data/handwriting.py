"""Writers, simulated: scikit-learn's digits at 28x28 in the hands of a population, or of one user with habits of his
own.

No collection of handwriting by writer is at hand without a download, so this is a simulation on real digits. In the
population every image has a slant, a rotation, a width and a stroke of its own. A user's are fixed, further from
upright than the population's, and he has an idiosyncrasy: one digit is written in the shape of another with a bar
through it (a 1 like a crossed 7).
"""

import dataclasses
import functools
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int

from research.data import digests
from research.data.keyed_random import KeyedRandom
from research.data.kinds import IMAGE
from research.data.registry import register
from research.data.source import LabelledImages, keyed_permutation
from research.data.sources import load_splits
from research.errors import UserError

SIDE, USERS = 28, 10
_POPULATION, _USERS, _GLYPHS = 0x60, 0x61, 0x62
"""Words that keep the draws of the population's styles, of the users' and of the glyphs apart."""


@dataclasses.dataclass(frozen=True)
class Styles:
    """How B images are written.

    Attributes:
      slant: columns to the right for each row up.
      rotation: in radians, anticlockwise.
      width: of a digit, relative to its height.
      stroke: exponent of the brightness: below 1 strokes are thick.
    """

    slant: Float[np.ndarray, " B"]
    rotation: Float[np.ndarray, " B"]
    width: Float[np.ndarray, " B"]
    stroke: Float[np.ndarray, " B"]


def population_styles(random: KeyedRandom) -> Styles:
    """Styles of a population: everyone a little different."""

    def between(what: str, low: float, high: float) -> np.ndarray:
        return low + (high - low) * random.uniform(what)

    return Styles(
        between("slant", -0.25, 0.25),
        between("rotation", -0.15, 0.15),
        between("width", 0.85, 1.15),
        2.0 ** between("stroke", -0.5, 0.5),
    )


def user_styles(user: int, count: int) -> Styles:
    """The style of one user, `count` times."""
    random = KeyedRandom.of(user, (_USERS,), np.zeros(1, np.int64))

    def away(what: str, low: float, high: float) -> np.ndarray:
        return random.signs(what) * (low + (high - low) * random.uniform(what + " size"))

    own = (
        away("slant", 0.3, 0.5),
        away("rotation", 0.2, 0.35),
        1 + away("width", 0.15, 0.25),
        2.0 ** away("stroke", 0.5, 1.0),
    )
    return Styles(*(np.repeat(value, count) for value in own))


def idiosyncrasy(user: int) -> tuple[int, int]:
    """Returns (the digit that the user writes in another's shape, that other digit)."""
    first, second = KeyedRandom.of(user, (_USERS,), np.zeros(1, np.int64)).distinct("idiosyncrasy", 10, 2)[0]
    return int(first), int(second)


def write(glyphs: Float[np.ndarray, "B 8 8"], styles: Styles) -> Float[np.ndarray, "B 28 28 1"]:
    """Draws 8x8 glyphs of values 0..1 in the given styles, bilinearly; a glyph is about 20 pixels high."""
    count, scale = len(glyphs), 8 / 22
    rows, columns = np.meshgrid(np.arange(SIDE) - (SIDE - 1) / 2, np.arange(SIDE) - (SIDE - 1) / 2, indexing="ij")

    def turn(value: np.ndarray) -> np.ndarray:
        return value[:, None, None]

    sine, cosine = turn(np.sin(styles.rotation)), turn(np.cos(styles.rotation))
    y, x = cosine * rows + sine * columns, cosine * columns - sine * rows
    x = (x + turn(styles.slant) * y) / turn(styles.width)
    y, x = y * scale + 3.5 + 1, x * scale + 3.5 + 1  # in a glyph with a frame of zeros
    framed = np.pad(glyphs, ((0, 0), (1, 1), (1, 1)))
    y, x = np.clip(y, 0, 8.999), np.clip(x, 0, 8.999)
    top, left = y.astype(np.int64), x.astype(np.int64)
    down, right = y - top, x - left
    which = np.arange(count)[:, None, None]

    def at(i: int, j: int) -> np.ndarray:
        corner: np.ndarray = framed[which, top + i, left + j]
        return corner

    upper, lower = (at(i, 0) * (1 - right) + at(i, 1) * right for i in (0, 1))
    image = (upper * (1 - down) + lower * down) ** turn(styles.stroke)
    drawn: np.ndarray = image[..., None].astype(np.float32)
    return drawn


@dataclasses.dataclass(frozen=True)
class Handwriting(LabelledImages):
    """Images of digits with their labels; image i is a function of i alone, and in the population of the epoch too."""

    name: str
    glyphs: Float[np.ndarray, "N 8 8"]
    labels: Int[np.ndarray, " N"]
    user: int
    num_classes: int = 10

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return SIDE, SIDE, 1

    @property
    def digest(self) -> str:
        return digests.of_examples(self)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(
        self, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"] | None = None
    ) -> dict[str, np.ndarray]:
        """The block {"image": float32 [B, 28, 28, 1] in 0..1, "label": int32 [B]}."""
        indices = np.asarray(indices)
        if self.user < 0:
            styles = population_styles(KeyedRandom.of(0, (_POPULATION,), indices, epochs))
            return {"image": write(self.glyphs[indices], styles), "label": self.labels[indices]}
        return {"image": write(self._own(indices), user_styles(self.user, len(indices))), "label": self.labels[indices]}

    def _own(self, indices: Int[np.ndarray, " B"]) -> Float[np.ndarray, "B 8 8"]:
        """The glyphs that the user draws: those of one digit are another's, with a bar."""
        written, shape = idiosyncrasy(self.user)
        glyphs: np.ndarray = self.glyphs[indices].copy()
        others = self.glyphs[self.labels == shape]
        swapped = np.flatnonzero(self.labels[indices] == written)
        random = KeyedRandom.of(self.user, (_GLYPHS,), indices[swapped])
        glyphs[swapped] = others[random.integers("glyph", len(others))]
        glyphs[swapped, 4] = np.maximum(glyphs[swapped, 4], 0.9)
        return glyphs

    def subset(self, indices: Int[np.ndarray, " M"], name: str) -> Self:
        return dataclasses.replace(self, name=name, glyphs=self.glyphs[indices], labels=self.labels[indices])


@functools.lru_cache
def _digits() -> Any:
    return load_splits("digits", validation_fraction=0.0)


@register("handwriting", IMAGE, ready=False)
def load_handwriting(*, user: int = -1) -> tuple[Handwriting, Handwriting]:
    """Training and test images: the population's, or those of one user.

    Args:
      user: 0 to 9; -1 for the population.

    Raises:
      UserError: no such user.
    """
    if not -1 <= user < USERS:
        raise UserError(f"handwriting: user={user}; valid: 0 to {USERS - 1}, or -1 for the population.")
    name = "handwriting" if user < 0 else f"handwriting/user{user}"
    splits = [(split, _digits()[split]) for split in ("train", "test")]
    train, test = (
        Handwriting(f"{name}/{s}", d.images[..., 0].astype(np.float32) / 255, d.labels, user) for s, d in splits
    )
    return train, test


def user_indices(source: Handwriting, count: int) -> Int[np.ndarray, " M"]:
    """Which `count` images of his a user gives to learn from.

    Raises:
      UserError: there are fewer.
    """
    if not 1 <= count <= len(source):
        raise UserError(f"{source.name} has {len(source)} images, not {count}; give 1 to {len(source)}.")
    return keyed_permutation(len(source), source.user, _GLYPHS)[:count]
