"""Suites: cases together with the marks that their figures must reach, each a ratio of times measured in one run."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
FORWARD = "forward"


@dataclass(frozen=True)
class Mark:
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
        """A row with claim, figure, asked and kept: "yes", "no", or why it was not judged."""
        if self.peer and self.peer not in peers:
            return {
                "claim": self.claim,
                "figure": None,
                "asked": self.bound,
                "kept": f"not judged: needs --peer={self.peer}",
            }
        try:
            figure = self.figure(rows)
        except LookupError:
            return {
                "claim": self.claim,
                "figure": None,
                "asked": self.bound,
                "kept": "not judged: its cases were left out",
            }
        kept = figure >= self.asked if self.at_least else figure <= self.asked
        return {"claim": self.claim, "figure": figure, "asked": self.bound, "kept": "yes" if kept else "no"}


@dataclass(frozen=True)
class Suite:
    """Cases and their marks; `wanted` holds the names of cases with the words that the shape must hold ("" for all)."""

    wanted: tuple[tuple[str, str], ...]
    marks: tuple[Mark, ...]

    def wants(self, name: str, shape: str, direction: str) -> bool:
        """Whether a case is one of this suite's: never a forward pass alone, no mark is about one."""
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


def _spread_of(words: str, rows: Sequence[Mapping[str, Any]]) -> float:
    return spread([row["median_ms"] for row in rows if holds(row["shape"], words)])


def _faster(
    claim: str, name: str, than: str, asked: float, *, words: str = "", reduce: Callable = min, peer: str = ""
) -> Mark:
    """Ours is `asked` times as fast as another, at the case where it is least so, or in the geometric mean."""
    return Mark(
        claim, lambda rows: reduce(ratios(rows, name, than, "ours", words=words)), asked, at_least=True, peer=peer
    )


def _slower(
    claim: str, name: str, than: str, asked: float, *, words: str = "", reduce: Callable = max, peer: str = ""
) -> Mark:
    """Ours takes at most `asked` times as long as another."""
    return Mark(claim, lambda rows: reduce(ratios(rows, name, "ours", than, words=words)), asked, peer=peer)


def _grouped(experts: int, of_dense: float) -> Mark:
    claim = f"grouped_matmul, {experts} experts: time over one dense product's, balanced and skewed"
    return _slower(claim, "grouped_matmul", "dense", of_dense, words=f"{experts} experts")


_SSD, _GLA = "ssd", "linear_attention"
_TOKENS_SHAPES = ("32x512x", "8x2048x", "2x8192x", "1x16384x")


def _by_token(rows: Sequence[Row], name: str, words: str) -> float:
    times = times_by_length(rows, name, words)
    return spread(times[length] for length in (512, 2048, 8192, 16_384))  # the same number of tokens each


SUITES = {
    "depthwise": Suite(
        (("depthwise_conv2d", ""),),
        (
            _faster(
                "depthwise 2-D: geometric mean of speed over lax's",
                "depthwise_conv2d",
                "xla",
                10,
                reduce=geometric_mean,
            ),
            _faster("depthwise 2-D: least speed over lax's of any shape", "depthwise_conv2d", "xla", 1),
            _slower(
                "depthwise 2-D: geometric mean of time over torch's",
                "depthwise_conv2d",
                "torch",
                2,
                reduce=geometric_mean,
                peer="torch",
            ),
        ),
    ),
    "unireplknet": Suite(
        (("unireplknet_a", ""),),
        (
            _slower(
                "UniRepLKNet-A step: time over the official class's",
                "unireplknet_a",
                "unireplknet",
                1,
                peer="unireplknet",
            ),
        ),
    ),
    "selective_scan": Suite(
        (("selective_scan", ""),),
        (
            _faster("selective scan: least speed over lax.scan under autodiff", "selective_scan", "naive", 2.5),
            _faster("selective scan: least speed over associative_scan", "selective_scan", "xla", 5),
            Mark(
                "selective scan: temporary memory over lax.scan's under autodiff",
                lambda rows: max(ratios(rows, "selective_scan", "ours", "naive", field="temp_bytes")),
                0.2,
            ),
        ),
    ),
    "language_models": Suite(
        (("mamba", ""), ("mamba2", ""), ("gla", "")),
        (
            _faster(
                "Mamba-1 language model: speed over transformers'", "mamba", "transformers", 100, peer="transformers"
            ),
            _faster(
                "Mamba-2 language model: speed over transformers'", "mamba2", "transformers", 1.5, peer="transformers"
            ),
            _faster(
                "GLA language model: speed over transformers' Mamba-2", "gla", "transformers", 1.5, peer="transformers"
            ),
        ),
    ),
    "length": Suite(
        tuple((name, f"{kind}{shape}") for name, kind in ((_SSD, ""), (_GLA, "gla ")) for shape in _TOKENS_SHAPES),
        (
            Mark(
                "SSD: time per token, largest over smallest, length 512 to 16,384",
                lambda rows: _by_token(rows, _SSD, ""),
                1.2,
            ),
            Mark(
                "GLA: time per token, largest over smallest, length 512 to 16,384",
                lambda rows: _by_token(rows, _GLA, "gla"),
                1.2,
            ),
        ),
    ),
    "attention": Suite(
        (
            ("softmax_attention", "1x8192x"),
            ("sliding_window_attention", ""),
            *(("routing_attention", f"1x{length}x") for length in (2048, 4096, 8192)),
        ),
        (
            Mark(
                "linear attention: speed over softmax attention at length 8,192",
                lambda rows: min(ratios(rows, "softmax_attention", "ours", "linear attention", words="1x8192x")),
                4,
                at_least=True,
            ),
            Mark(
                "sliding window: exponent of time in length, 1,024 to 16,384",
                lambda rows: exponent(times_by_length(rows, "sliding_window_attention")),
                1.1,
            ),
            Mark(
                "routing: exponent of time in length, 2,048 to 8,192",
                lambda rows: exponent(times_by_length(rows, "routing_attention")),
                1.6,
            ),
        ),
    ),
    "context": Suite(
        (("sequence_training", ""),),
        tuple(
            Mark(
                f"{kind}: time of a training step, largest over smallest, length 256 to 8,192 at 8,192 tokens",
                functools.partial(_spread_of, f"{kind} "),
                1.2,
            )
            for kind in (
                "mamba",
                "mamba2",
                "mamba3",
                "gla",
                "retention",
                "deltanet",
                "gated_deltanet",
                "hgrn",
                "cosformer",
                "performer",
                "sla",
                "window",
            )
        ),
    ),
    "decoding": Suite(
        (("sequence_decoding", ""),),
        (
            *(
                _slower(
                    f"{kind}: a step at position 10,000 over one at 100",
                    "sequence_decoding",
                    "position 100",
                    1.1,
                    words=f"{kind} ",
                )
                for kind in (
                    "mamba",
                    "mamba2",
                    "mamba3",
                    "gla",
                    "retention",
                    "deltanet",
                    "gated_deltanet",
                    "hgrn",
                    "performer",
                    "sla",
                    "window",
                )
            ),
            Mark(
                "attention with a cache: a step at position 10,000 over one at 100",
                lambda rows: min(ratios(rows, "sequence_decoding", "ours", "position 100", words="attention ")),
                1.5,
                at_least=True,
            ),
        ),
    ),
    "moe": Suite(
        (("moe_ffn", ""),),
        (
            _slower(
                "mixture of 8 experts, top-2: time over a dense FFN of the same active FLOPs",
                "moe_ffn",
                "dense",
                1.8,
                words="8 experts",
            ),
            _slower("mixture of 64 experts, top-2: the same", "moe_ffn", "dense", 3, words="64 experts"),
        ),
    ),
    "grouped": Suite(
        (("grouped_matmul", ""),),
        (
            *(_grouped(experts, asked) for experts, asked in ((4, 2), (8, 2), (16, 2), (64, 3))),
            _faster(
                "grouped_matmul, 8 experts: least speed over ragged_dot", "grouped_matmul", "xla", 3, words="8 experts"
            ),
            _faster(
                "grouped_matmul, 64 experts: least speed over ragged_dot",
                "grouped_matmul",
                "xla",
                10,
                words="64 experts",
            ),
        ),
    ),
}


def needs_peer(suite: Suite) -> bool:
    """Whether no mark can be judged without a peer."""
    return all(mark.peer for mark in suite.marks)
