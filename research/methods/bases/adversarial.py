"""What methods of adversarial training share: the attack's options, the task as it is evaluated, the loss of TRADES.

Images are in [0, 1], without normalisation. Attacks see the network without gradients of its parameters and in eval
mode; every sub-network of an update attacks its own images.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from jaxtyping import Array

from research.errors import UserError
from research.robust.losses import trades
from research.tasks.base import Example, Forward, Outcome, Task
from research.tasks.classification import Classification
from research.tasks.robust import AttackedClassification, accuracy, outputs
from research.train.hooks import About
from research.train.method import Method
from research.train.sections import RunConfig
from research.values import COUNT, SIZE, Rule

NOISE = 1e-3  # standard deviation of the start of TRADES' attack
RADIUS = Rule(above=0, most=1)


def check_pixels(config: RunConfig, shapes: Mapping[str, Any]) -> None:
    """Raises UserError unless the model sees labelled images in [0, 1], which is what attacks are about."""
    augment = config.data.augment
    if not {"image", "label"} <= set(shapes):
        raise UserError(
            f"attacks are on images with labels, which data set {config.data.name} does not give; choose another"
        )
    plain = (("mean", 0.0), ("std", 1.0))
    moved = [name for name, value in plain if any(v != value for v in np.atleast_1d(augment.get(name, value)))]
    if moved:
        raise UserError(f"attacks are on images in [0, 1]; remove data.augment.{' and data.augment.'.join(moved)}")


def shares(scores: Array | None) -> dict[str, Array]:
    """Returns the share of the images that goes to each expert."""
    if scores is None:
        return {}
    return {f"expert_{i}": (scores.argmax(-1) == i).mean() for i in range(scores.shape[-1])}


@dataclass(frozen=True)
class Adversarial(Method):
    """What adversarial methods share.

    Attributes:
      epsilon, steps, step_size: of the attack in training, in units of the range of a pixel.
      through_gate: in training, attacks on a mixture follow its router's straight-through gate too (the released code
        of AdvMoE), instead of the gradient of the function; evaluations never do.
      eval_steps: PGD steps of an evaluation, of size epsilon / 4; 0: there the images are not attacked.
    """

    replaces = True
    headings: ClassVar[Mapping[str, str]] = {"robust_accuracy": "robust"}

    epsilon: Annotated[float, RADIUS] = 8 / 255
    steps: Annotated[int, SIZE] = 2
    step_size: Annotated[float, Rule(above=0)] = 5 / 255
    through_gate: bool = False
    eval_steps: Annotated[int, COUNT] = 0

    def check(self, about: About) -> None:
        check_pixels(about.config, about.shapes)

    def wrapped(self, task: Task, model: Any) -> Task:
        if type(task) is not Classification:
            raise UserError(f"method {self.name} is for classification, not {task.name}")
        own = {"epsilon": self.epsilon, "eval_steps": self.eval_steps, "pathways": model.pathways}
        return AttackedClassification(**dataclasses.asdict(task), **own)

    @property
    def how(self) -> dict[str, Any]:
        """The attack in training."""
        return {"epsilon": self.epsilon, "steps": self.steps, "step_size": self.step_size}

    @property
    def mode(self) -> str:
        """The mode in which attacks see the network."""
        return "through_gate" if self.through_gate else "eval"


def trades_outcome(forward: Forward, example: Example, attacked: Array, routed: bool, beta: float) -> Outcome:
    """Returns the loss of TRADES on attacked images; clean logits are what others learn from."""
    (image,), target = example.inputs, example.target
    clean, scores = outputs(forward, image, routed)
    logits, _ = outputs(forward, attacked, routed)
    loss = trades(clean, logits, target, beta)
    measured = {"accuracy": accuracy(clean, target), "robust_accuracy": accuracy(logits, target), **shares(scores)}
    return Outcome(loss, measured, clean)


def is_routed(task: Task) -> bool:
    """Whether images are sent along pathways, of a task that `Adversarial.wrapped` gave."""
    assert isinstance(task, AttackedClassification)
    return task.routed
