"""Suites: cases together with the thresholds that their figures must reach, each a ratio of times measured in one
run."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
FORWARD = "forward"


@dataclass(frozen=True)
class Threshold:
    """A claim with a number.

    Attributes:
      claim: in words; the figure is what it says, and higher or lower than `asked`.
      figure: of the rows of a run.
      asked: the bound.
      at_least: whether the figure may not be below the bound, else not above it.
      peer: the peer that it compares with, without which it is not judged.
    """

    claim: str
    figure: Callable[[Sequence[Row]], float]
    asked: float
    at_least: bool = False
    peer: str = ""

    @property
    def bound(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.asked:g}"

    def judge(self, rows: Sequence[Row], peers: Iterable[str]) -> dict[str, Any]:
        """A row with claim, figure, asked and met: "yes", "no", or why it was not judged."""
        if self.peer and self.peer not in peers:
            return {
                "claim": self.claim,
                "figure": None,
                "asked": self.bound,
                "met": f"not judged: needs --peer={self.peer}",
            }
        try:
            figure = self.figure(rows)
        except LookupError:
            return {
                "claim": self.claim,
                "figure": None,
                "asked": self.bound,
                "met": "not judged: its cases were left out",
            }
        met = figure >= self.asked if self.at_least else figure <= self.asked
        return {"claim": self.claim, "figure": figure, "asked": self.bound, "met": "yes" if met else "no"}


@dataclass(frozen=True)
class Suite:
    """Cases and their thresholds; `wanted` holds the names of cases with the words that the shape must hold ("" for
    all)."""

    wanted: tuple[tuple[str, str], ...]
    thresholds: tuple[Threshold, ...]

    def wants(self, name: str, shape: str, direction: str) -> bool:
        """Whether a case is one of this suite's: never a forward pass alone, no threshold is about one."""
        return direction != FORWARD and any(name == wanted and holds(shape, words) for wanted, words in self.wanted)


def holds(shape: str, words: str) -> bool:
    """Whether the words stand in a shape, from the start of one of its own: "4 experts" is not in "64 experts"."""
    return f" {words}" in f" {shape}"


def ratios(
    rows: Sequence[Row], name: str, over: str, under: str, *, words: str = "", field: str = "median_ms"
) -> list[float]:
    """The field of one contender over that of another, a number for each case that has both, forward with gradients.

    Args:
      words: that the case's shape must hold.
    """
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["name"] == name and row["direction"] != FORWARD and holds(row["shape"], words):
            cases.setdefault(row["shape"], {})[row["contender"]] = row
    found = [case[over][field] / case[under][field] for case in cases.values() if over in case and under in case]
    if not found:
        raise LookupError(f"no case of {name} with {words!r} has both {over} and {under}")
    return found


def geometric_mean(numbers: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, numbers)) / len(numbers))


def times_by_length(rows: Sequence[Row], name: str, words: str = "") -> dict[int, float]:
    """Length to the median of ours in ms, forward with gradients; the length is the second number of the shape's
    BATCHxLENGTHx..."""
    found = {}
    for row in rows:
        if (
            row["name"] == name
            and row["contender"] == "ours"
            and row["direction"] != FORWARD
            and holds(row["shape"], words)
        ):
            sizes = next(word for word in row["shape"].split() if word.count("x") >= 2)
            found[int(sizes.split("x")[1])] = row["median_ms"]
    return found


def exponent(times: Mapping[int, float]) -> float:
    """The slope of time over length in logarithms, by least squares."""
    x, y = [math.log(n) for n in times], [math.log(t) for t in times.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def spread(numbers: Iterable[float]) -> float:
    """Largest over smallest."""
    numbers = list(numbers)
    if not numbers:
        raise LookupError("none of the cases was measured")
    return max(numbers) / min(numbers)


def faster(
    claim: str, name: str, than: str, asked: float, *, words: str = "", reduce: Callable = min, peer: str = ""
) -> Threshold:
    """Ours is `asked` times as fast as another, at the case where it is least so, or in the geometric mean."""
    return Threshold(
        claim, lambda rows: reduce(ratios(rows, name, than, "ours", words=words)), asked, at_least=True, peer=peer
    )


def slower(
    claim: str, name: str, than: str, asked: float, *, words: str = "", reduce: Callable = max, peer: str = ""
) -> Threshold:
    """Ours takes at most `asked` times as long as another."""
    return Threshold(claim, lambda rows: reduce(ratios(rows, name, "ours", than, words=words)), asked, peer=peer)


def needs_peer(suite: Suite) -> bool:
    """Whether no threshold can be judged without a peer."""
    return all(threshold.peer for threshold in suite.thresholds)
