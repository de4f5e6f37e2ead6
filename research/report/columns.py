"""How the columns of a report are read: which way is better, and in which form people are shown them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

LOWER_IS_BETTER = ("loss", "perplexity", "ppl", "error", "bits", "bpc", "bpb", "nll", "mse", "mae", "rmse")
VALUE = "value"
"""The column of the number that ranks networks."""


@dataclass(frozen=True)
class Column:
    """How a column is read.

    Attributes:
      higher_is_better: whether a larger value is better; None: neither is, as of a share.
      percent: whether people are shown it in percent.
    """

    higher_is_better: bool | None = None
    percent: bool = False

    def shown(self, value: float, decimals: int = 1) -> str:
        """Returns a value for people, a fraction in percent with so many decimals."""
        return f"{100 * value:.{decimals}f}" if self.percent else f"{value:.4f}"


def higher_is_better(report: Mapping[str, Any]) -> bool:
    """The report's own word, else by its metric's name: losses, errors, perplexities and bits are to be small."""
    if report.get("higher_is_better") is not None:
        return bool(report["higher_is_better"])
    return not any(word in report["metric"].lower() for word in LOWER_IS_BETTER)


def told(columns: Mapping[str, Column]) -> dict[str, dict[str, Any]]:
    """Returns columns as report.json holds them, under "columns"."""
    return {name: asdict(column) for name, column in columns.items()}


def declared(report: Mapping[str, Any]) -> dict[str, Column]:
    """Returns the columns that a report says how to read, `VALUE` among them.

    Reports of earlier versions say nothing: theirs are accuracies, what attacks left of them, and values of validation,
    by their names.
    """
    if "columns" in report:
        return {name: Column(**column) for name, column in report["columns"].items()}
    value = Column(higher_is_better(report), "accuracy" in report["metric"])
    found = {VALUE: value}
    for name in report["subnets"][0]:
        if name.startswith("validation_"):
            found[name] = value
        elif name.startswith("robust_") or name.endswith("accuracy"):
            found[name] = Column(higher_is_better=True, percent=True)
    return found
