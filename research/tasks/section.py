"""The config's section `task`: what is learnt from the examples."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from research.sections import Only, Section, free, group, setting
from research.values import SHARE, WEIGHT, Rule


@dataclass(frozen=True)
class ContrastiveSection(Section):
    """The group `task.contrastive`, of pairs of texts."""

    loss: str = setting("mnr_plus", "loss of pairs of texts", Rule(choices=("mnr", "symmetric", "mnr_plus")))
    temperature: float = setting(1.0, "what products of vectors are divided by", Rule(above=0))
    normalize: bool = setting(False, "vectors are scaled to length 1 before their products")


@dataclass(frozen=True)
class TaskSection(Section):
    """The section; `options` are of a task that is a dataclass of them. Each task names the others that it reads."""

    name: str = setting("", "the task by name; by default that of the data's examples")
    options: Mapping[str, Any] = free()
    label_smoothing: float = setting(0.0, "share of a target that is spread over all classes", Rule(least=0, below=1))
    mixup: float = setting(0.0, "alpha of mixup's Beta distribution; 0: off", WEIGHT)
    cutmix: float = setting(0.0, "alpha of cutmix's Beta distribution; 0: off", WEIGHT)
    switch: float = setting(
        0.5,
        "where both are on, the probability of cutmix",
        SHARE,
        Only(
            "task.mixup together with task.cutmix",
            lambda config: bool(config.task.mixup and config.task.cutmix),
            option=False,
        ),
    )
    metric: str = setting("", "the number that ranks networks; '': the task's own choice")
    contrastive: ContrastiveSection = group(ContrastiveSection)
    local_counting: float = setting(0.0, "weight of the relative local counting loss", WEIGHT)
