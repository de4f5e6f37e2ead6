"""One update on the host: batches in place, a gradient program for each drawn sub-network and microbatch, then the
update program.

A batch is cut in as many parts as the draws ask for, and each part into `train.accumulate` microbatches. A loss is a
mean over what the task counts (`Task.weight`), so a microbatch counts by its share of that in its part; what a layer
adds (losses of routers, moments of batch norm) is of a microbatch, and the microbatches count alike. Random draws
(mixing, dropout, attacks) are each microbatch's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from research.nested.schemes import Draw
from research.train import spread
from research.train.evaluation import place
from research.train.programs import Programs
from research.train.setup import Setup
from research.train.state import State

Losses = list[tuple[str, dict[str, Any], Any]]


@dataclass
class Updater:
    """Makes updates; `program(kind, name, *args, **which)` gives a compiled program."""

    setup: Setup
    programs: Programs
    program: Callable[..., Any]

    def __post_init__(self):
        self.weighs = weighs(self.setup)

    def __call__(
        self, step: int, state: State, batch: dict[str, np.ndarray], draws: tuple[Draw, ...], grads: Any
    ) -> tuple[State, Any, dict[str, Any]]:
        """Returns (state, gradient buffer, metrics) after the update; metrics["losses"] is what `records.of_losses`
        reads."""
        make = self._spread if self.setup.config["nested"]["spread"] else self._in_turn
        grads, stats, losses = make(step, state, batch, draws, grads)
        bare = State(state.params, {}, state.opt_state, state.ema)
        args = (bare, grads, np.int32(step), state.stats, stats)
        state, grads, metrics = self.program("update", "", *args, phase=self.setup.phase(step))(*args)
        return state, grads, {"losses": losses, **metrics}

    def _in_turn(
        self, step: int, state: State, batch: dict[str, np.ndarray], draws: tuple[Draw, ...], grads: Any
    ) -> tuple[Any, ...]:
        """Runs the gradient programs one after the other; of the statistics the full network's count."""
        accumulate, reduce = self.setup.config["train"]["accumulate"], self.setup.config["nested"]["reduce"]
        even = 1.0 / accumulate / (len(draws) if reduce == "mean" else 1)
        stats, losses, phase = state.stats, [], self.setup.phase(step)
        placed: dict[tuple[int, int], Any] = {}
        teachers: dict[tuple[int, int], Any] = {}
        for order, draw in enumerate(draws):
            slots = [(draw.part * accumulate + micro, draw.parts * accumulate) for micro in range(accumulate)]
            for slot in slots:
                if slot not in placed:
                    placed[slot] = place(part_of(batch, *slot), self.programs)
            batches = tuple(placed[slot] for slot in slots)
            shares, scales = self._shares(batches, np.float32(accumulate * even)) if self.weighs else (None, None)
            for micro, slot in enumerate(slots):
                clock = np.array([step, slot[0], order * accumulate + micro], np.uint32)
                scale = (np.float32(even) if scales is None else scales[micro], np.float32(even))
                teacher = teachers[slot] if draw.distill else np.float32(0)
                args = (state.params, stats, grads, placed[slot], clock, scale, teacher)
                which = {"distill": draw.distill, "teaches": teaches(draw, draws), "phase": phase}
                grads, after, metrics, outputs = self.program("gradient", draw.name, *args, **which)(*args)
                if draw.name == "full":
                    stats, teachers[slot] = after, outputs
                losses.append((draw.name, metrics, 1 / accumulate if shares is None else shares[micro]))
        return grads, stats, losses

    def _shares(self, batches: tuple[Any, ...], factor: np.float32) -> tuple[Any, Any]:
        """Of each microbatch, its share in what the task counts in all of them, and the share times `factor`."""
        return self.program("weigh", "", batches, factor)(batches, factor)

    def _spread(
        self, step: int, state: State, batch: dict[str, np.ndarray], draws: tuple[Draw, ...], grads: Any
    ) -> tuple[Any, ...]:
        """Trains the networks at the same time, each on its own devices."""
        clock, places = spread.places(self.programs, step, draws)
        args = (state.params, state.stats, grads, place(batch, self.programs), clock, places)
        return self.program("spread", "full", *args, phase=self.setup.phase(step))(*args)


def weighs(setup: Setup) -> bool:
    """Whether microbatches may differ in what the task counts."""
    accumulate = setup.config["train"]["accumulate"]
    return accumulate > 1 and jax.eval_shape(setup.task.weight, setup.batch_shapes(1)) is not None


def teaches(draw: Draw, draws: tuple[Draw, ...]) -> bool:
    """Whether others of an update learn from a draw's outputs: only then are they kept."""
    return draw.name == "full" and any(d.distill and (d.part, d.parts) == (draw.part, draw.parts) for d in draws)


def part_of(batch: dict[str, np.ndarray], slot: int, slots: int) -> dict[str, np.ndarray]:
    """Returns the `slot`-th of `slots` equal parts of a batch."""
    if slots == 1:
        return batch
    size = len(batch["index"]) // slots
    return {k: v[slot * size : (slot + 1) * size] for k, v in batch.items()}


def host_losses(metrics: Mapping[str, Any], draws: tuple[Draw, ...], spreads: bool) -> list[tuple[str, dict[str, Any]]]:
    """Returns (sub-network, its numbers) of every draw of an update that is on the host, means over its microbatches or
    devices."""
    if spreads:
        return spread.per_network(metrics["losses"], draws)
    count = len(metrics["losses"]) // len(draws)
    rows = [metrics["losses"][i * count : (i + 1) * count] for i in range(len(draws))]
    return [(row[0][0], _mean([m for _, m, _ in row], [float(share) for *_, share in row])) for row in rows]


def _mean(several: list[dict[str, Any]], shares: list[float]) -> dict[str, Any]:
    """The numbers of a part: losses and what is measured by the microbatches' shares, what layers tell of themselves by
    equal ones."""
    if len(several) == 1:
        return several[0]
    weighted = lambda name: sum(
        share * np.asarray(m[name], np.float64) for share, m in zip(shares, several, strict=True)
    )  # noqa: E731
    even = lambda *arrays: np.mean(arrays, 0, np.float64)  # noqa: E731
    return {k: jax.tree.map(even, *[m[k] for m in several]) if k == "experts" else weighted(k) for k in several[0]}
