"""What convnets of several stages share: the checks of their sizes, and how width and depth of a sub-network are cut
stage by stage.

A config has `depths`, `kept_layers` (indices of each stage's layers in the full model) and other tuples with an entry
for each stage.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from research.errors import UserError
from research.modules import elastic


def check_stages(config: Any, names: Sequence[str], more: Sequence[int] = (), *, first_stays: bool = True) -> None:
    """Fills in `kept_layers` where it is empty and raises UserError for sizes that do not fit together.

    Args:
      names: further fields with one entry for each stage, sizes from 1.
      more: other sizes from 1.
      first_stays: the first layer of a stage is another than the rest and is always kept.
    """
    if not config.kept_layers:
        object.__setattr__(config, "kept_layers", tuple(tuple(range(d)) for d in config.depths))
    lists = [vars(config)[name] for name in ("depths", *names)]
    if {len(config.kept_layers), *map(len, lists)} != {len(config.depths)} or not config.depths:
        raise UserError(f"{config.family}: depths, {', '.join(names)} and kept_layers need one entry per stage")
    bad = [n for n in (*(n for sizes in lists for n in sizes), *more) if n < 1]
    if bad:
        raise UserError(
            f"{config.family}: {bad[0]} among depths, channels, classes and the like; valid: whole numbers from 1"
        )
    if any(len(k) != d or (first_stays and k[0] != 0) for k, d in zip(config.kept_layers, config.depths, strict=True)):
        start = "start with 0 and have" if first_stays else "have"
        raise UserError(f"{config.family}: kept_layers={config.kept_layers} must {start} {config.depths} entries")


def check_image(config: Any, stride: int, remedy: str) -> None:
    """Raises UserError for images that are smaller than the total stride of the network."""
    if config.image_size < stride:
        raise UserError(
            f"{config.family}: images of {config.image_size} pixels are smaller than the total stride {stride}; "
            f"use {remedy}"
        )


def kept_after_first(config: Any) -> Mapping[str, tuple[int, ...]]:
    """Returns stack of layers -> kept ones, of stages whose first layer stands apart."""
    return {f"stage{i + 1}/layers": kept[1:] for i, kept in enumerate(config.kept_layers)}


def shrunk_dims(dims: Sequence[int], fraction: Any, name: str = "width") -> tuple[int, ...]:
    """Returns the channels of each stage times its fraction, to a multiple of 4; one fraction serves all stages.

    Raises:
      UserError: a fraction outside (0, 1], or another number of them than of stages.
    """
    fractions = elastic.per_stage(fraction, len(dims), name)
    return tuple(elastic.scaled(d, f, 4, name) for d, f in zip(dims, fractions, strict=True))


def shrunk_depths(kept_layers: Sequence[Sequence[int]], depth: Any, keep: str) -> tuple[tuple[int, ...], ...]:
    """Returns the kept layers of each stage of a sub-network; one depth serves all stages.

    Raises:
      UserError: a depth outside the space, or an unknown way to keep layers.
    """
    choices = elastic.per_stage(depth, len(kept_layers), "depth")
    return tuple(
        elastic.kept_layers(layers, elastic.depth_count(choice, len(layers), 1, "depth"), keep)
        for layers, choice in zip(kept_layers, choices, strict=True)
    )
