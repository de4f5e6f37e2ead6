"""The config's section `nested`: the sub-networks of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from research.sections import Only, Section, free, setting
from research.values import SIZE, Rule, fit

NAME = r"[A-Za-z0-9_][A-Za-z0-9_+=-]{0,79}"
"""Names of sub-networks, which are names of files too; a config has no dots in them."""


@dataclass(frozen=True)
class NestedSection(Section):
    """The section; `points` are the sub-networks by name, choices of elastic axes."""

    points: Mapping[str, Any] = free()
    reduce: str = setting("mean", "how the losses of an update's networks are joined", Rule(choices=("mean", "sum")))
    sort_importance: bool = setting(
        False,
        "channels are permuted by importance before the first update",
        only=Only("runs with train.init_from", lambda config: bool(config.train.init_from)),
    )
    execution: str = setting(
        "sliced",
        "networks of an update one after the other on all devices, or on different ones",
        Rule(choices=("sliced", "parallel")),
    )
    tensor_shards: int = setting(1, "parts from each of which a leading slice is taken", SIZE)

    def check(self) -> None:
        for name, choices in self.points.items():
            fit(name, str, "a name in config.nested.points")
            fit(choices, str | dict, f"config.nested.points.{name}")

    def check_names(self) -> None:
        """Judges the names of sub-networks of a run that begins; older runs keep theirs.

        Raises:
          UserError: a name that would be no name of a file.
        """
        for name in self.points:
            fit(name, str, "a name in config.nested.points", Rule(pattern=NAME, says="of letters, digits and _ + = -"))
