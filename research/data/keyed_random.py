"""Random numbers that belong to examples: pure functions of (seed, stream, epoch, index), drawn for a whole block at
once.

The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): word i of key k is `mix(k + (i + 1) * gamma)`. Keys
are folded the same way, so what an example draws depends neither on the block it is drawn in nor on what else is drawn.
"""

import dataclasses
import math
import zlib

import numpy as np
from jaxtyping import Float, Float32, Int, UInt64

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_UINT64 = (1 << 64) - 1


def fold(keys: UInt64[np.ndarray, "*#N"], words: UInt64[np.ndarray, "*#N"]) -> UInt64[np.ndarray, "..."]:
    """Word number `words` of the SplitMix64 sequences of `keys`, which broadcast; arrays of one axis or more."""
    z: np.ndarray = keys + (words + np.uint64(1)) * _GAMMA
    z ^= z >> _SHIFTS[0]
    z *= _FACTORS[0]
    z ^= z >> _SHIFTS[1]
    z *= _FACTORS[1]
    z ^= z >> _SHIFTS[2]
    return z


@dataclasses.dataclass(frozen=True)
class KeyedRandom:
    """The random numbers of a block of B examples.

    Every method takes the name of the draw (`what`), which tells the draws of one example apart: the same name gives
    the same words again. Results have the examples on axis 0.
    """

    keys: UInt64[np.ndarray, " B"]

    @classmethod
    def of(
        cls,
        seed: int,
        stream: tuple[int, ...],
        indices: Int[np.ndarray, " B"],
        epochs: Int[np.ndarray, " B"] | None = None,
    ) -> "KeyedRandom":
        """The numbers of the examples at `indices`; `stream` keeps splits apart, `epochs` (if given) the passes over
        the data."""
        indices = np.asarray(indices)
        epochs = np.zeros_like(indices) if epochs is None else np.asarray(epochs)
        keys = np.array([seed & _UINT64], np.uint64)
        for word in (len(stream), *stream):
            keys = fold(keys, np.array([word & _UINT64], np.uint64))
        return cls(fold(fold(keys, epochs.astype(np.uint64)), indices.astype(np.uint64)))

    def __len__(self) -> int:
        return len(self.keys)

    def words(self, what: str, *shape: int) -> UInt64[np.ndarray, "B ..."]:
        """Words of 64 random bits."""
        keys = fold(self.keys, np.array([zlib.crc32(what.encode())], np.uint64))
        return fold(keys[:, None], np.arange(math.prod(shape), dtype=np.uint64)).reshape(len(keys), *shape)

    def uniform(self, what: str, *shape: int) -> Float[np.ndarray, "B ..."]:
        """Uniform on the odd multiples of 2^-53: never 0, never 1."""
        return ((self.words(what, *shape) >> np.uint64(12)) + 0.5) * 2.0**-52

    def integers(self, what: str, below: int, *shape: int) -> Int[np.ndarray, "B ..."]:
        """Uniform on 0..below - 1, to within below / 2^32; below < 2^32."""
        return _scale(self.words(what, *shape), np.uint64(below))

    def signs(self, what: str, *shape: int) -> Float32[np.ndarray, "B ..."]:
        """-1 or +1 with probability 1/2 each."""
        return (self.words(what, *shape) >> np.uint64(63)).astype(np.float32) * 2 - 1

    def normal(self, what: str, *shape: int) -> Float32[np.ndarray, "B ..."]:
        """Standard normal, by Box and Muller (1958) from two words for every two numbers."""
        count = math.prod(shape)
        first, second = np.moveaxis(self.uniform(what, 2, -(-count // 2)), 1, 0)
        radius, angle = np.sqrt(-2 * np.log(first)).astype(np.float32), (2 * np.pi * second).astype(np.float32)
        pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)
        return pairs[:, :count].reshape(len(self), *shape)

    def permutation(self, what: str, size: int) -> Int[np.ndarray, "B size"]:
        """A random order of 0..size - 1."""
        return np.argsort(self.words(what, size), axis=1)

    def distinct(self, what: str, below: int, count: int) -> Int[np.ndarray, "B count"]:
        """`count` different integers of 0..below - 1 in random order; every ordered choice is equally likely.

        Floyd's algorithm (Bentley and Floyd, CACM 1987): `count` words instead of `below`.
        """
        words = self.words(what, count)
        chosen = np.empty(words.shape, np.int64)
        for step, top in enumerate(range(below - count, below)):
            number = _scale(words[:, step], np.uint64(top + 1))
            repeated = (chosen[:, :step] == number[:, None]).any(1)
            chosen[:, step] = np.where(repeated, top, number)
        return np.take_along_axis(chosen, self.permutation(what + " order", count), 1)

    def weighted(self, what: str, weights: Float[np.ndarray, " N"], count: int) -> Int[np.ndarray, "B count"]:
        """`count` different integers of 0..N - 1, drawn one after the other with probability proportional to the
        weights left.

        An exponential race: the order of -log(u) / weight is that of drawing without replacement (Efraimidis and
        Spirakis, 2006).
        """
        times = -np.log(self.uniform(what, len(weights))) / weights
        return np.argsort(times, axis=1)[:, :count]


def _scale(words: UInt64[np.ndarray, "*N"], below: np.uint64) -> Int[np.ndarray, "*N"]:
    """The upper 32 bits of the words, spread over 0..below - 1 (Lemire 2019, without the rejection)."""
    return (((words >> np.uint64(32)) * below) >> np.uint64(32)).astype(np.int64)
