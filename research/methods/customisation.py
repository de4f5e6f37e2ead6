"""Customisation after training (Sathe et al. 2018, arXiv 1811.00056): a local expert and a gate learnt on a user's few
images, the network itself frozen.

First the local expert is trained, on the user's images, those that the global expert gets wrong weighing more; then the
gate, on the question whether the local expert is right where the global one is wrong. Images of everybody (a replay)
teach the gate to leave them alone: without them it sends everything to the local expert.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from research.errors import UserError
from research.methods.bases.customise import cross_entropy, gate_cross_entropy, gate_labels, shares
from research.methods.bases.source import check_source, load_source
from research.models.customised import GATE, LOCAL, CustomisedConfig, Parts, is_local, within
from research.modules.state import Arrays, abstract, apply, told
from research.report.columns import Column
from research.tasks.base import Example, Forward, Outcome, Task, real_examples
from research.train.evaluation import Evaluator, Weights
from research.train.hooks import About, Objective, Phase
from research.train.method import Evaluation, Method
from research.train.method_registry import register
from research.train.turns import place
from research.values import WEIGHT

REPLAY = "replay"
"""Entry of a batch: 1 where an example is everybody's, 0 where it is the user's."""


@register("customisation")
@dataclass(frozen=True)
class Customisation(Method, Evaluation):
    """The method; the first half of a run trains the local expert, the second the gate.

    Attributes:
      source: run of the global expert, or folder of its weights.
      mistake_weight: weight of the user's images that the global expert gets wrong, in the local expert's loss; of his
        others 1.
    """

    paper = "arXiv 1811.00056"
    replaces = True
    teaches = False

    source: str = ""
    mistake_weight: Annotated[float, WEIGHT] = 4.0

    def check(self, about: About) -> None:
        config, model = about.config, about.space.full
        if not isinstance(model, CustomisedConfig):
            raise UserError(
                f"method customisation trains the parts of model customised, not {config.model['name']}; set "
                "config.model.name=customised and its backbone"
            )
        check_source(self.name, self.source, about)
        if REPLAY not in about.shapes:
            raise UserError(
                f"method customisation must tell the user's examples from everybody's, which data set "
                f"{config.data.name} does not; give data.name=replay:NAME"
            )
        if config.task.mixup or config.task.cutmix:
            raise UserError(
                "method customisation judges single images, which task.mixup and task.cutmix mix; set both to 0"
            )
        if config.train.accumulate > 1 or config.nested.execution == "parallel":
            raise UserError(
                "method customisation weighs the examples of a batch against each other, so parts of one do not add "
                "up; set train.accumulate=1 and nested.execution=sliced"
            )
        for other in about.methods:
            if type(other).evaluated is not Method.evaluated:
                raise UserError(
                    f"method customisation freezes the global expert, whose weights {other.name} would replace"
                )

    def phases(self, model: Any) -> tuple[Phase, ...]:
        del model
        return (
            Phase("local", trains=lambda name: name.startswith(LOCAL), outputs=False, until=0.5),
            Phase("gate", trains=lambda name: name.startswith(GATE), outputs=False),
        )

    def start(self, model: Any, key: Array, say: Callable[[str], None]) -> tuple[Arrays, Arrays]:
        del key
        config, params, stats = load_source(self.name, self.source, say)
        wanted = abstract(model.backbone)
        for found, shapes in ((params, wanted.params), (stats, wanted.stats)):
            for name in sorted({*found, *shapes}):
                if name not in found or name not in shapes or found[name].shape != shapes[name].shape:
                    raise UserError(
                        f"method.customisation.source={self.source} does not fit model.backbone at {name}; its model "
                        f"is {config.family}, the backbone {model.backbone.family}"
                    )
        return within(params), within(stats)

    def objective(self, inner: Objective, task: Task) -> Objective:
        del inner, task

        def objective(forward: Forward, example: Example) -> Outcome:
            parts = Parts(*forward(*example.inputs, method="parts"))
            label, own = example.batch["label"], 1 - example.batch[REPLAY]
            right = [logits.argmax(-1) == label for logits in (parts.local, parts.everybody)]
            if example.phase == "local":
                weights = own * jnp.where(right[1], 1.0, self.mistake_weight)
                loss = cross_entropy(parts.local, example.target, weights)
                return Outcome(loss, {"loss_local": loss, "local_accuracy": _mean(right[0], own)})
            wanted = own * gate_labels(*right)
            loss = gate_cross_entropy(parts.gate, wanted, shares(own))
            return Outcome(loss, {"loss_gate": loss, "gate_accuracy": ((parts.gate > 0) == (wanted > 0)).mean()})

        return objective

    def work(self) -> float:
        return 1 / 3  # of a frozen network there is no backward pass

    def evaluations(self) -> tuple[Evaluation, ...]:
        return (self,)

    def declared(self) -> Mapping[str, Column]:
        return {"frozen_accuracy": Column(True, percent=True), "local_answers": Column(percent=True)}

    def columns(
        self, evaluator: Evaluator, weights: Weights, statistics: Mapping[str, Arrays], split: str
    ) -> dict[str, dict[str, float]]:
        """Columns `frozen_accuracy`, of the global expert alone, and `local_answers`, the share of images that the
        local expert answers."""
        programs, names = evaluator.programs, ("frozen_accuracy", "local_answers")
        whole = programs.layout.replicated
        params = {
            name: jax.jit(functools.partial(programs.effective, name), out_shardings=whole)(
                weights.params, weights.methods
            )
            for name in statistics
        }
        runs = {
            name: jax.jit(functools.partial(_sums, programs.layout.compute(name)), out_shardings=whole)
            for name in statistics
        }
        sums = {name: np.zeros(3) for name in statistics}
        for batch in evaluator.batches(split):
            placed = place(batch, programs)
            for name, stats in statistics.items():
                evaluator.tick()
                sums[name] += np.asarray(runs[name](params[name], stats, placed))
        return {
            name: {column: float(value / total[2]) for column, value in zip(names, total[:2], strict=True)}
            for name, total in sums.items()
        }


def _sums(config: CustomisedConfig, params: Arrays, stats: Arrays, batch: dict[str, Array]) -> Array:
    """Of a batch: images that the global expert alone gets right, those that the local one answers, and all."""
    more = told(config, real_examples(batch))
    parts = apply(config, params, stats, batch["image"], method="parts", mode="eval", **more)[0]
    right = parts.everybody.argmax(-1) == batch["label"]
    return jnp.stack([(batch["mask"] * each).sum() for each in (right, is_local(config, parts), jnp.ones_like(right))])


def _mean(values: Array, weights: Array) -> Array:
    """The weighted mean, 0 without weights."""
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1e-20)
