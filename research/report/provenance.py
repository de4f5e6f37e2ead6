"""What a reader must know to judge a number: seeds, updates, compute, wall time, split, and what was chosen on which
split."""

from collections.abc import Mapping, Sequence
from typing import Any

UNKNOWN = "by hand while the recipe was written, trials not kept"


def line(reports: Sequence[Mapping[str, Any]], configs: Sequence[Mapping[str, Any]], seeds: int | None = None) -> str:
    """Returns a sentence for the page of a result.

    Args:
      reports: of its runs, as report.json holds them.
      configs: of these runs, resolved.
      seeds: how many seeds each arm has; by default as many as there are reports.
    """
    seeds = len(reports) if seeds is None else seeds
    updates = _span([report["updates"] for report in reports], ",.0f")
    flops = _span([report["train_flops"] for report in reports], ".3g")
    examples = _span([config["data"]["batch_size"] for config in configs], ".0f")
    chosen = "; ".join(dict.fromkeys(config["report"]["chosen"] or UNKNOWN for config in configs))
    seconds = _span([report["wall_s"] for report in reports], ".0f")
    return (
        f"{seeds} seed{'s' * (seeds != 1)}; {updates} updates of {examples} examples, "
        f"{flops} training FLOPs and {seconds} s "
        f"with compiling a run; {reports[0]['metric']}; chosen: {chosen}"
    )


def _span(values: Sequence[float], implementation: str) -> str:
    least, most = (format(value, implementation) for value in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"
