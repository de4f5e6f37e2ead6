"""Robust accuracy of a run's networks: each attack on the first images of a split, every network with statistics of its
own."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool

from research.modules.state import Arrays, apply, told
from research.robust.attacks import PARTS, is_correct
from research.tasks.base import real_examples
from research.train.evaluation import Evaluator, place

CLEAN = "clean"


def robust_accuracies(
    evaluator: Evaluator,
    weights: Arrays,
    statistics: Mapping[str, Arrays],
    attacks: Sequence[str],
    split: str,
    *,
    epsilon: float,
    examples: int,
    steps: int,
) -> dict[str, dict[str, float]]:
    """Returns network -> {"clean": accuracy on the images as they are, ATTACK: that on the same images under each
    attack}.

    Args:
      weights: parameters of the full network.
      statistics: those that each network is evaluated with, by name.
      attacks: names, see `research.robust.attacks.attack`.
      split: "train", "validation" or "test".
      epsilon: radius of the ball, in units of a pixel's range.
      examples: how many images are attacked, from the start of the split.
      steps: of each APGD.
    """
    programs, batches = evaluator.programs, _first(evaluator, split, examples)
    whole = programs.replicated
    is_counted = jax.jit(lambda mask: mask > 0, out_shardings=whole)
    counted = np.concatenate([np.asarray(is_counted(batch["mask"])) for batch in batches])
    out: dict[str, dict[str, float]] = {}
    for name, stats in statistics.items():
        params = jax.jit(functools.partial(programs.sliced, name))(weights)
        right: dict[str, np.ndarray] = {}
        for attack in dict.fromkeys((CLEAN, *(part for wanted in attacks for part in PARTS.get(wanted, (wanted,))))):
            run = jax.jit(
                functools.partial(_right, programs.compute(name), attack, epsilon, steps), out_shardings=whole
            )
            found = []
            for i, batch in enumerate(batches):
                evaluator.tick()
                found.append(np.asarray(run(params, stats, batch, jax.random.fold_in(jax.random.key(0), i))))
            right[attack] = np.concatenate(found)[counted]
        # The worst case of several attacks needs no attack of its own.
        worst = {
            attack: np.all([right[part] for part in PARTS.get(attack, (attack,))], axis=0)
            for attack in (CLEAN, *attacks)
        }
        out[name] = {attack: float(values.mean()) for attack, values in worst.items()}
    return out


def columns(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Returns the columns of a report's row: `clean_accuracy`, and `robust_ATTACK` for each attack."""
    return {"clean_accuracy" if name == CLEAN else f"robust_{name}": value for name, value in accuracies.items()}


def _first(evaluator: Evaluator, split: str, examples: int) -> list[dict[str, jax.Array]]:
    """The batches that hold the first examples of a split; what they hold beyond has mask 0."""
    (index, count), batches, seen = evaluator.programs.share, [], 0
    for batch in evaluator.batches(split):
        size = len(batch["label"])
        mask = np.asarray(batch["mask"]) * (index * size + np.arange(size) < examples - seen)
        batches.append(place({**batch, "mask": mask.astype(np.float32)}, evaluator.programs))
        seen += count * size
        if seen >= examples:
            break
    return batches


def _right(
    config: Any,
    attack: str,
    epsilon: float,
    steps: int,
    params: Arrays,
    stats: Arrays,
    batch: dict[str, Array],
    key: Array,
) -> Bool[Array, " B"]:
    """Which images are classified rightly, under an attack or as they are."""
    more = told(config, real_examples(batch))
    model = lambda x: apply(config, params, stats, x, mode="eval", **more)[0]  # noqa: E731
    image, label = batch["image"], batch["label"]
    if attack == CLEAN:
        return model(image).argmax(-1) == label
    return is_correct(attack, model, image, label, key, epsilon=epsilon, steps=steps)
