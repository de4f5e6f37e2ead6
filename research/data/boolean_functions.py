"""Boolean functions of -1 and 1 for in-context learning, drawn anew for every prompt.

After Bhattamishra et al. 2023 (arXiv 2310.03016, section 4 and appendix) and its released code.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from research.data.keyed_random import KeyedRandom
from research.data.probes import require

Prompt = tuple[Float[np.ndarray, "B K D"], Float[np.ndarray, "B K"]]


@dataclasses.dataclass(frozen=True)
class Boolean:
    """Inputs uniform on {-1, +1}^dims, `points` of them; labels -1 and +1."""

    dims: int = 28
    points: int = 70

    def __post_init__(self) -> None:
        require(
            self.dims >= 1 and self.points >= 1,
            f"in-context: dims={self.dims} and points={self.points} must be at least 1.",
        )

    @property
    def variance(self) -> float:
        """Of a label."""
        return 1.0

    @property
    def scored_from(self) -> int:
        """The first prediction that counts."""
        return 0

    def generate(self, random: KeyedRandom) -> Prompt:
        """Inputs and labels, float32."""
        raise NotImplementedError

    def inputs(self, random: KeyedRandom) -> Float[np.ndarray, "B K D"]:
        return random.signs("inputs", self.points, self.dims)


@dataclasses.dataclass(frozen=True)
class Conjunction(Boolean):
    """AND of literals: a coordinate is left out, plain or negated with probabilities .7, .15, .15.

    Each input is made to satisfy all literals with probability 0.3. With teaching=True the literals are plain
    (probability 0.3), each input is made positive with probability 0.4, and the prompt opens with a teaching sequence
    (appendix of the paper): one input that has +1 at the literals and -1 elsewhere, then the same with each literal
    turned around, one after the other.
    """

    teaching: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        enough = not self.teaching or self.points > self.dims
        require(
            enough, f"conjunction: a teaching sequence needs points > dims; points={self.points}, dims={self.dims}."
        )

    def generate(self, random: KeyedRandom) -> Prompt:
        w = _literals(random, self.dims, 0.7)
        if self.teaching:
            w = (random.uniform("literals", self.dims) < 0.3).astype(np.float32)
        x = _force(self.inputs(random), w, random.uniform("forced", self.points) < (0.4 if self.teaching else 0.3), 1)
        if self.teaching:
            # Point p > 0 of the lesson turns around the literal before which p - 1 others stand.
            order = np.where(w > 0, np.cumsum(w, 1), 0)[:, None, :]
            point = np.arange(self.points)[:, None]
            lesson = np.where((order > 0) & (order != point), 1, -1)
            x = np.where(point <= w.sum(1)[:, None, None], lesson, x).astype(np.float32)
        return x, _conjunction(x, w)


class Disjunction(Boolean):
    """OR of literals as in `Conjunction`; each input is made to falsify all of them with probability 0.3."""

    def generate(self, random: KeyedRandom) -> Prompt:
        w = self.literals(random)
        x = _force(self.inputs(random), w, random.uniform("forced", self.points) < 0.3, -1)
        return x, -_conjunction(x, -w)

    def literals(self, random: KeyedRandom) -> Float[np.ndarray, "B D"]:
        return _literals(random, self.dims, 0.7)


@dataclasses.dataclass(frozen=True)
class SparseDisjunction(Disjunction):
    """OR of `literal_count` plain literals."""

    literal_count: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = 1 <= self.literal_count <= self.dims
        require(fits, f"sparse_disjunction: literal_count={self.literal_count} is not in 1..{self.dims} (dims).")

    def literals(self, random: KeyedRandom) -> Float[np.ndarray, "B D"]:
        return chosen(random, "literals", self.dims, self.literal_count)


class DNF(Boolean):
    """OR of three conjunctions (probabilities .8, .1, .1); one of them is made true with probability 0.35, the same in
    a prompt."""

    def generate(self, random: KeyedRandom) -> Prompt:
        w, x = _force_clause(self, random, 0.35, 1)
        return x, np.max([_conjunction(x, w[:, clause]) for clause in range(3)], axis=0)


class CNF(Boolean):
    """AND of three disjunctions (probabilities .8, .1, .1); one of them is made false with probability 0.3, the same in
    a prompt."""

    def generate(self, random: KeyedRandom) -> Prompt:
        w, x = _force_clause(self, random, 0.3, -1)
        return x, np.min([-_conjunction(x, -w[:, clause]) for clause in range(3)], axis=0)


class Majority(Boolean):
    """sign(w.x - 1/2), w_i in {0, 1}, 1 with probability 0.3: the majority of the chosen coordinates, a tie being
    -1."""

    def generate(self, random: KeyedRandom) -> Prompt:
        x = self.inputs(random)
        return x, _threshold(x, (random.uniform("weights", self.dims) < 0.3).astype(np.float32))


class Halfspace(Boolean):
    """sign(w.x - 1/2), w_i uniform on -3..3."""

    def generate(self, random: KeyedRandom) -> Prompt:
        x = self.inputs(random)
        return x, _threshold(x, random.integers("weights", 7, self.dims).astype(np.float32) - 3)


class SparseThreshold(Boolean):
    """sign(w.x - t), w as the literals of `Conjunction`, t uniform on -2.5, -1.5, ..., 2.5."""

    def generate(self, random: KeyedRandom) -> Prompt:
        x, threshold = self.inputs(random), random.integers("threshold", 6, 1) - 2.5
        return x, _threshold(x, _literals(random, self.dims, 0.7), threshold)


@dataclasses.dataclass(frozen=True)
class Parity(Boolean):
    """+1 where an odd number of the chosen coordinates is +1; any subset of the coordinates is equally likely."""

    dims: int = 10

    def generate(self, random: KeyedRandom) -> Prompt:
        x = self.inputs(random)
        ones = dot((x + 1) / 2, self.subset(random))
        return x, (2 * np.mod(ones, 2) - 1).astype(np.float32)

    def subset(self, random: KeyedRandom) -> Float[np.ndarray, "B D"]:
        return (random.signs("subset", self.dims) + 1) / 2


@dataclasses.dataclass(frozen=True)
class SparseParity(Parity):
    """Parity of `bits` coordinates."""

    dims: int = 28
    bits: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.bits <= self.dims, f"sparse_parity: bits={self.bits} is not in 1..{self.dims} (dims).")

    def subset(self, random: KeyedRandom) -> Float[np.ndarray, "B D"]:
        return chosen(random, "subset", self.dims, self.bits)


@dataclasses.dataclass(frozen=True)
class NearestNeighbour(Boolean):
    """The first `start` labels are random, then each is that of the most similar input before it, the earliest of
    equals.

    An input among the first that occurred before keeps its label. Predictions count from `start` on (`scored_from`).
    """

    start: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            1 <= self.start < self.points,
            f"nearest_neighbour: start={self.start} is not in 1..{self.points - 1} (points - 1).",
        )

    @property
    def scored_from(self) -> int:
        return self.start

    def generate(self, random: KeyedRandom) -> Prompt:
        x, y = self.inputs(random), random.signs("labels", self.points)
        similarity, rows = x @ x.transpose(0, 2, 1), np.arange(len(random))
        for point in range(1, self.points):
            before = similarity[:, point, :point]
            nearest = before.argmax(1)
            copied = before[rows, nearest] == self.dims if point < self.start else True
            y[:, point] = np.where(copied, y[rows, nearest], y[:, point])
        return x, y


BOOLEAN: dict[str, type[Boolean]] = {
    "conjunction": Conjunction,
    "disjunction": Disjunction,
    "sparse_disjunction": SparseDisjunction,
    "dnf": DNF,
    "cnf": CNF,
    "majority": Majority,
    "halfspace": Halfspace,
    "sparse_threshold": SparseThreshold,
    "parity": Parity,
    "sparse_parity": SparseParity,
    "nearest_neighbour": NearestNeighbour,
}


def dot(x: Float[np.ndarray, "B K D"], w: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B K"]:
    products: np.ndarray = (x @ w[:, :, None])[:, :, 0]
    return products


def chosen(random: KeyedRandom, what: str, dims: int, count: int) -> Float[np.ndarray, "B D"]:
    """1 at `count` random coordinates, 0 elsewhere."""
    chosen = np.zeros((len(random), dims), np.float32)
    np.put_along_axis(chosen, random.distinct(what, dims, count), 1, 1)
    return chosen


def _literals(random: KeyedRandom, dims: int, absent: float, *clauses: int) -> Float[np.ndarray, "B ... D"]:
    """0 with probability `absent`, else +1 or -1 with equal probability."""
    u = random.uniform("literals", *clauses, dims)
    return np.where(u < absent, 0, np.where(u < (1 + absent) / 2, 1, -1)).astype(np.float32)


def _force(
    x: Float[np.ndarray, "B K D"], w: Float[np.ndarray, "B D"], forced: Bool[np.ndarray, "B K"], to: int
) -> Float[np.ndarray, "B K D"]:
    """Sets the literals of the forced inputs: all true (to = 1) or all false (to = -1)."""
    return np.where(forced[:, :, None] & (w != 0)[:, None], to * w[:, None], x)


def _force_clause(
    rule: Boolean, random: KeyedRandom, probability: float, to: int
) -> tuple[Float[np.ndarray, "B 3 D"], Float[np.ndarray, "B K D"]]:
    """Literals [B, 3, D] of three clauses, and inputs of which some have one clause of the prompt forced."""
    w = _literals(random, rule.dims, 0.8, 3)
    forced = w[np.arange(len(random)), random.integers("clause", 3)]
    return w, _force(rule.inputs(random), forced, random.uniform("forced", rule.points) < probability, to)


def _conjunction(x: Float[np.ndarray, "B K D"], w: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B K"]:
    """+1 where every literal holds, else -1; of no literals, +1."""
    return _threshold(x, w, np.abs(w).sum(1, keepdims=True) - 1)


def _threshold(
    x: Float[np.ndarray, "B K D"], w: Float[np.ndarray, "B D"], threshold: Any = 0.5
) -> Float[np.ndarray, "B K"]:
    """sign(w.x - threshold); the callers' values never meet the threshold."""
    signs: np.ndarray = np.sign(dot(x, w) - threshold).astype(np.float32)
    return signs
