"""The config's section `data`: which examples a run learns from, and how many at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from research.errors import UserError
from research.sections import Only, Section, free, setting
from research.values import COUNT, SIZE, Rule

NOT_OPTIONS = {"name": "name", "data_dir": "dir", "validation_fraction": "validation_fraction"}
"""What loaders of data sets take beside their options -> the field that sets it."""


def goes_by(field: str) -> Callable[[Any], bool]:
    """Whether the data set of a config goes by a field."""

    def here(config: Any) -> bool:
        from research.data.sources import settings_read

        return field in settings_read(config.data.name)

    return here


@dataclass(frozen=True)
class DataSection(Section):
    """The section; `options` are of the data set, `augment` of `research.data.augment.Augment`."""

    name: str = setting("digits", "data set, see research/data/sources.py")
    dir: str = setting(
        "",
        "where its files lie",
        only=Only("data sets that are read from files", goes_by("data.dir"), option=False),
    )
    validation_fraction: float = setting(
        0.1,
        "part of the training images held out for validation",
        Rule(least=0, below=1),
        Only("data sets without a validation split of their own", goes_by("data.validation_fraction"), option=False),
    )
    batch_size: int = setting(128, "examples of an update", SIZE)
    augment: Mapping[str, Any] = free()
    options: Mapping[str, Any] = free()
    stall_s: float = setting(600.0, "seconds that a batch may take before the run ends; 0: for ever", COUNT)

    def check(self) -> None:
        for option, field in NOT_OPTIONS.items():
            if option in self.options:
                raise UserError(f"data.options.{option} is no option; set data.{field}")
