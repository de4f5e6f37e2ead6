"""What must hold before images are attacked, in training or in a report."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from research.errors import UserError
from research.robust.attacks import check_attacks


def check_pixels(config: Mapping[str, Any], sample: Mapping[str, Any]) -> None:
    """Raises UserError unless the model sees labelled images in [0, 1], which is what attacks are about."""
    augment = config["data"]["augment"]
    if not {"image", "label"} <= set(sample):
        raise UserError(
            f"attacks are on images with labels, which data set {config['data']['name']} does not give; choose another"
        )
    moved = [
        name
        for name, plain in (("mean", 0.0), ("std", 1.0))
        if any(v != plain for v in np.atleast_1d(augment.get(name, plain)))
    ]
    if moved:
        raise UserError(f"attacks are on images in [0, 1]; remove data.augment.{' and data.augment.'.join(moved)}")


def check_report(config: Mapping[str, Any], sample: Mapping[str, Any]) -> None:
    """Raises UserError when the attacks that `report` names cannot be carried out."""
    report = config["report"]
    if not report.get("attacks"):
        return
    check_attacks(report["attacks"], "report.attacks")
    check_pixels(config, sample)
    check_sizes(attack_epsilon(config), report["attack_examples"], report["attack_steps"])


def check_sizes(epsilon: float, examples: int, steps: int) -> None:
    """Raises UserError for a radius outside (0, 1], or counts below 1."""
    if not 0 < epsilon <= 1 or min(examples, steps) < 1:
        raise UserError(
            f"attack_epsilon={epsilon:g}, attack_examples={examples}, attack_steps={steps}; valid: up to 1, and from 1"
        )


def attack_epsilon(config: Mapping[str, Any]) -> float:
    """Returns the radius of the attacks in the report: its own where it is not 0, else that of training."""
    return config["report"].get("attack_epsilon") or config["task"].get("robust", {}).get("epsilon", 8 / 255)
