"""In-context learning: prompts x1, y1, x2, y2, ... of a function drawn anew for every prompt, made on demand.

Regression after Garg et al. 2022 (arXiv 2208.01066, sections 2 and 4), Boolean functions in `boolean_functions`.
The model predicts y_i where it has read x_i, that is from i - 1 examples.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from research.data import digests
from research.data.boolean_functions import BOOLEAN, Boolean, Prompt, chosen, dot
from research.data.keyed_random import KeyedRandom
from research.data.kinds import VECTORS
from research.data.probes import SPLITS, check_counts, find_rule, require
from research.data.registry import register
from research.data.source import Source


@dataclasses.dataclass(frozen=True)
class Regression:
    """Inputs x ~ N(0, I) of `dims` coordinates, `points` of them; coordinates from `active_dims` on are 0."""

    dims: int = 20
    points: int = 41
    active_dims: int | None = None

    scored_from: ClassVar[int] = 0

    def __post_init__(self) -> None:
        require(
            self.dims >= 1 and self.points >= 1,
            f"in-context: dims={self.dims} and points={self.points} must be at least 1.",
        )
        require(
            1 <= self._active() <= self.dims,
            f"in-context: active_dims={self.active_dims} is not in 1..{self.dims} (dims).",
        )

    def _active(self) -> int:
        return self.dims if self.active_dims is None else self.active_dims

    @property
    def variance(self) -> float:
        """Of a target: the squared error of predicting zero."""
        return float(self._active())

    def generate(self, random: KeyedRandom, active: Int[np.ndarray, " B"] | None = None) -> Prompt:
        """Inputs and targets, float32; `active` lowers each prompt's number of coordinates that are not 0."""
        x = random.normal("inputs", self.points, self.dims)
        x[:, :, self._active() :] = 0
        if active is not None:
            x *= np.arange(self.dims) < active[:, None, None]
        return x, self.targets(random, x).astype(np.float32)

    def targets(self, random: KeyedRandom, x: Float[np.ndarray, "B K D"]) -> Float[np.ndarray, "B K"]:
        raise NotImplementedError


class Linear(Regression):
    """y = w.x, w ~ N(0, I)."""

    def weights(self, random: KeyedRandom) -> Float[np.ndarray, "B D"]:
        return random.normal("weights", self.dims)

    def targets(self, random: KeyedRandom, x: Float[np.ndarray, "B K D"]) -> Float[np.ndarray, "B K"]:
        return dot(x, self.weights(random))


@dataclasses.dataclass(frozen=True)
class SparseLinear(Linear):
    """y = w.x with all but `nonzeros` coordinates of w at 0."""

    nonzeros: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            1 <= self.nonzeros <= self.dims, f"sparse_linear: nonzeros={self.nonzeros} is not in 1..{self.dims} (dims)."
        )

    @property
    def variance(self) -> float:
        return self.nonzeros * self._active() / self.dims

    def weights(self, random: KeyedRandom) -> Float[np.ndarray, "B D"]:
        sparse: np.ndarray = super().weights(random) * chosen(random, "nonzeros", self.dims, self.nonzeros)
        return sparse


@dataclasses.dataclass(frozen=True)
class NoisyLinear(Linear):
    """y = w.x + noise ~ N(0, noise_std^2): in the prompt and in what is to be predicted."""

    noise_std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.noise_std >= 0, f"noisy_linear: noise_std={self.noise_std} must not be negative.")

    @property
    def variance(self) -> float:
        return super().variance + self.noise_std**2

    def targets(self, random: KeyedRandom, x: Float[np.ndarray, "B K D"]) -> Float[np.ndarray, "B K"]:
        return super().targets(random, x) + self.noise_std * random.normal("noise", self.points)


class Quadratic(Linear):
    """y = w.x^2 / sqrt(3), the squares by coordinate."""

    def targets(self, random: KeyedRandom, x: Float[np.ndarray, "B K D"]) -> Float[np.ndarray, "B K"]:
        scaled: np.ndarray = super().targets(random, x * x) / np.sqrt(3)
        return scaled


@dataclasses.dataclass(frozen=True)
class ReluNetwork(Regression):
    """y = sqrt(2 / hidden) * v.relu(W x), all weights ~ N(0, 1)."""

    points: int = 101
    hidden: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.hidden >= 1, f"relu_network: hidden={self.hidden} must be at least 1.")

    def targets(self, random: KeyedRandom, x: Float[np.ndarray, "B K D"]) -> Float[np.ndarray, "B K"]:
        hidden = np.maximum(x @ random.normal("first", self.dims, self.hidden), 0)
        scaled: np.ndarray = dot(hidden, random.normal("second", self.hidden)) * np.sqrt(2 / self.hidden)
        return scaled


@dataclasses.dataclass(frozen=True)
class DecisionTree(Regression):
    """A full binary tree: each node asks whether one random coordinate is above 0, each leaf holds a value ~ N(0,
    1)."""

    points: int = 101
    depth: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.depth <= 16, f"decision_tree: depth={self.depth} is not in 1..16.")

    @property
    def variance(self) -> float:
        return 1.0

    def targets(self, random: KeyedRandom, x: Float[np.ndarray, "B K D"]) -> Float[np.ndarray, "B K"]:
        coordinates = random.integers("coordinates", self.dims, 2**self.depth - 1)
        node = np.zeros(x.shape[:2], np.int64)
        for _ in range(self.depth):
            asked = np.take_along_axis(coordinates, node, 1)
            node = 2 * node + 1 + (np.take_along_axis(x, asked[:, :, None], 2)[:, :, 0] > 0)
        return np.take_along_axis(random.normal("leaves", 2**self.depth), node - (2**self.depth - 1), 1)


REGRESSION: dict[str, type[Regression]] = {
    "linear": Linear,
    "sparse_linear": SparseLinear,
    "noisy_linear": NoisyLinear,
    "quadratic": Quadratic,
    "relu_network": ReluNetwork,
    "decision_tree": DecisionTree,
}


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Short prompts in few coordinates first (Garg et al. 2022, appendix A.2), growing by the epoch.

    Attributes:
      every: epochs between two steps.
      dims: coordinates that are not 0 at the start, and how many more at each step; None leaves them all. Regression
        only.
      points: targets that are scored at the start, and how many more at each step; None scores them all.
    """

    every: int
    dims: tuple[int, int] | None = None
    points: tuple[int, int] | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Curriculum":
        """Reads config fields.

        Raises:
          UserError: an unknown field, or one that is no count from 1 or no pair of them.
        """
        valid = [field.name for field in dataclasses.fields(cls)]
        require(isinstance(options, Mapping), f"curriculum={options} must be fields: {', '.join(valid)}.")
        require("every" in options, "curriculum: every is needed, a number of epochs.")
        given: dict[str, Any] = {}
        for name, value in options.items():
            require(name in valid, f"curriculum has no field {name!r}; valid: {', '.join(valid)}.")
            counts = [value] if name == "every" else value
            wanted = "a count" if name == "every" else "a pair of counts"
            fits = isinstance(counts, (list, tuple)) and len(counts) == (1 if name == "every" else 2)
            require(
                fits and all(isinstance(n, int) and n >= 1 for n in counts),
                f"curriculum: {name}={value} must be {wanted} from 1.",
            )
            given[name] = value if name == "every" else tuple(value)
        return cls(**given)

    def at(self, growth: tuple[int, int], epochs: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
        """Returns how much `growth` allows in each epoch."""
        return growth[0] + growth[1] * (epochs // self.every)


@dataclasses.dataclass(frozen=True)
class InContext(Source):
    """A source of `examples` prompts; nothing is stored.

    Prompt i is a function of (seed, stream, i), and of the epoch too when `fresh` and `gather` is told it.

    Attributes:
      binary: whether targets are labels of -1 and +1.
    """

    binary: ClassVar[bool]

    name: str
    rule: Regression | Boolean
    examples: int
    seed: int
    stream: tuple[int, ...] = ()
    fresh: bool = False
    curriculum: Curriculum | None = None

    @property
    def dims(self) -> int:
        return self.rule.dims

    @property
    def points(self) -> int:
        return self.rule.points

    @property
    def variance(self) -> float:
        """Of a target."""
        return self.rule.variance

    @property
    def scored_from(self) -> int:
        """The first prediction that counts; the targets before it cannot be known."""
        return self.rule.scored_from

    def facts(self) -> Mapping[str, Any]:
        rule = {"points": self.points, "binary": self.binary, "variance": self.variance}
        return {**rule, "scored_from": self.scored_from}

    @property
    def digest(self) -> str:
        return digests.of_examples(self)

    def __len__(self) -> int:
        return self.examples

    def gather(
        self, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"] | None = None
    ) -> dict[str, np.ndarray]:
        """The block {"vectors": float32 [B, 2K, D], "targets": float32 [B, K]}.

        Vector 2i is x_i, vector 2i + 1 holds y_i in coordinate 0 and zeros; target i is predicted at vector 2i. Targets
        that the curriculum does not score yet are NaN.
        """
        random = KeyedRandom.of(self.seed, self.stream, indices, epochs if self.fresh else None)
        dims = points = None
        if self.curriculum and epochs is not None:
            dims = self.curriculum.at(self.curriculum.dims, epochs) if self.curriculum.dims else None
            points = self.curriculum.at(self.curriculum.points, epochs) if self.curriculum.points else None
        x, y = self.rule.generate(random, **({} if dims is None else {"active": dims}))
        vectors = np.zeros((len(x), 2 * self.points, self.dims), np.float32)
        vectors[:, 0::2], vectors[:, 1::2, 0] = x, y
        if points is not None:
            y = np.where(np.arange(self.points) < points[:, None], y, np.float32(np.nan))
        return {"vectors": vectors, "targets": y}


class InContextRegression(InContext):
    """Prompts with real targets: squared error."""

    binary: ClassVar[bool] = False


class InContextBoolean(InContext):
    """Prompts with labels -1 and +1: logistic loss, accuracy of the sign."""

    binary: ClassVar[bool] = True


@register("in_context:", VECTORS)
def load_in_context(
    task: str,
    *,
    train_examples: int | None = None,
    test_examples: int | None = None,
    seed: int = 0,
    fresh: bool = False,
    curriculum: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, InContext]:
    """The splits 'train', 'validation' and 'test' of an in-context task, with streams of their own.

    Args:
      task: one of `REGRESSION` or `BOOLEAN`.
      train_examples: number of training prompts.
      test_examples: number of validation prompts, and of test prompts.
      seed: keys every prompt.
      fresh: other training prompts in every epoch (where `gather` is told the epochs); the papers train so.
      curriculum: fields of `Curriculum`, for the training prompts.
      **options: fields of the task: dims, points and its own.

    Raises:
      UserError: an unknown task or option, with the valid ones, or values that do not fit together.
    """
    rule = find_rule("in-context task", task, REGRESSION | BOOLEAN, options)
    source = InContextBoolean if task in BOOLEAN else InContextRegression
    given = check_counts(task, {"train_examples": train_examples, "test_examples": test_examples})
    counts = {split: given["train_examples" if split == "train" else "test_examples"] for split in SPLITS}
    growing = Curriculum.of(curriculum) if curriculum else None
    if growing:
        require(
            growing.dims is None or task in REGRESSION,
            f"curriculum: {task} has no coordinates to leave out; leave dims away.",
        )
        first = (growing.points or (rule.points,))[0]
        start = rule.scored_from
        require(first > start, f"curriculum: points begin with {first}, but {task} scores from example {start} on.")
    return {
        split: source(
            f"{task}/{split}",
            rule,
            counts[split],
            seed,
            (stream,),
            fresh and split == "train",
            growing if split == "train" else None,
        )
        for split, stream in SPLITS.items()
    }
