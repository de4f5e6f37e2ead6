"""Robust accuracy in the final report: attacks on the first images of the split, every network with statistics of its
own."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import numpy as np
from jaxtyping import Array, Bool

from research.methods.bases.adversarial import check_pixels
from research.modules.state import Arrays, apply, told
from research.report.columns import Column
from research.robust.attacks import PARTS, check_attacks, is_correct
from research.tasks.base import Task, real_examples
from research.tasks.robust import AttackedClassification
from research.train.evaluation import Evaluator, Weights
from research.train.hooks import About
from research.train.method import Evaluation, Method
from research.train.method_registry import register
from research.train.turns import place
from research.values import SHARE, SIZE

CLEAN = "clean"
RADIUS = 8 / 255
"""Of attacks on a network that was not trained against any."""


@register("attacks")
@dataclass(frozen=True)
class Attacks(Method, Evaluation):
    """The method: columns `clean_accuracy` and `robust_ATTACK`.

    Attributes:
      names: pgdN, apgd_ce, apgd_dlr, apgd_t, apgd.
      examples: images that are attacked, from the start of the split.
      epsilon: radius; 0: that of adversarial training, where there is some, else 8/255.
      steps: of each APGD.
    """

    paper = "arXiv 1706.06083, 2003.01690"
    reports = True

    names: tuple[str, ...] = ("pgd20",)
    examples: Annotated[int, SIZE] = 1000
    epsilon: Annotated[float, SHARE] = 0.0
    steps: Annotated[int, SIZE] = 100

    def check(self, about: About) -> None:
        check_attacks(self.names, "method.attacks.names")
        check_pixels(about.config, about.shapes)

    def evaluations(self) -> tuple[Evaluation, ...]:
        return (self,)

    def declared(self) -> Mapping[str, Column]:
        return dict.fromkeys(columns(dict.fromkeys((CLEAN, *self.names), 0.0)), Column(True, percent=True))

    def columns(
        self, evaluator: Evaluator, weights: Weights, statistics: Mapping[str, Arrays], split: str
    ) -> dict[str, dict[str, float]]:
        task = evaluator.setup.task
        found = robust_accuracies(
            evaluator,
            weights,
            statistics,
            self.names,
            split,
            epsilon=self.epsilon or radius(task),
            examples=self.examples,
            steps=self.steps,
        )
        return {name: columns(accuracies) for name, accuracies in found.items()}


def radius(task: Task) -> float:
    """Returns the radius of the attacks that a network was trained against."""
    return task.epsilon if isinstance(task, AttackedClassification) else RADIUS


def robust_accuracies(
    evaluator: Evaluator,
    weights: Weights,
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
      weights: of the full network.
      statistics: those that each network is evaluated with, by name.
      attacks: names, see `research.robust.attacks.attack`.
      split: "train", "validation" or "test".
      epsilon: radius of the ball, in units of a pixel's range.
      examples: how many images are attacked, from the start of the split.
      steps: of each APGD.
    """
    programs, batches = evaluator.programs, _first(evaluator, split, examples)
    whole = programs.layout.replicated
    is_counted = jax.jit(lambda mask: mask > 0, out_shardings=whole)
    counted = np.concatenate([np.asarray(is_counted(batch["mask"])) for batch in batches])
    out: dict[str, dict[str, float]] = {}
    for name, stats in statistics.items():
        params = jax.jit(functools.partial(programs.effective, name))(weights.params, weights.methods)
        right: dict[str, np.ndarray] = {}
        for attack in dict.fromkeys((CLEAN, *(part for wanted in attacks for part in PARTS.get(wanted, (wanted,))))):
            run = jax.jit(
                functools.partial(_right, programs.layout.compute(name), attack, epsilon, steps), out_shardings=whole
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
    (index, count), batches, seen = evaluator.programs.layout.share, [], 0
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
    model: Callable[[Array], Array] = lambda x: apply(config, params, stats, x, mode="eval", **more)[0]
    image, label = batch["image"], batch["label"]
    if attack == CLEAN:
        right: Array = model(image).argmax(-1) == label
        return right
    return is_correct(attack, model, image, label, key, epsilon=epsilon, steps=steps)
