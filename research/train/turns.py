"""The gradients of one update, made on the host's word: networks one after the other, or in parallel.

A batch is cut into as many microbatches as the draws ask for, and each of them by `train.accumulate` once more. A loss
is a mean over what the task counts (`Task.weight`), so a microbatch counts by its share of that in its draw; what a
layer adds (losses of routers, moments of batch norm) is of a microbatch, and the microbatches count alike. Random draws
(mixing, dropout, attacks) are each microbatch's own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from research.nested.draws import Draw, teaches
from research.train import parallel
from research.train.compiler import Program
from research.train.gradient import Gradient, Weigh
from research.train.hooks import Phase
from research.train.layout import shapes_of
from research.train.parallel import Parallel
from research.train.processes import place_rows, place_whole
from research.train.programs import Programs
from research.train.setup import Setup
from research.train.state import Gradients, Microbatch, Rows, State

Batches = Mapping[str, Mapping[str, np.ndarray]]
"""Stream -> this process's part of its batch."""
Get = Callable[[Program], Any]
"""Gives a compiled program."""
LOOK_AHEAD = 50
"""Updates whose draws are looked at: a sub-network that is drawn later is compiled when it is."""
Named = list[tuple[str, dict[str, Any]]]
"""(sub-network, its numbers) of every draw."""


class GradientProgram(Program, Protocol):
    """A program (held, buffer of gradients, what it trains on) -> `Gradients`, see `research.train.state`."""

    def parts(self, programs: Programs) -> tuple[Gradient, ...]:
        """Returns the gradients of networks, of which a device computes one at a time."""
        ...


Ready = tuple[GradientProgram, Any]
"""A gradient program and what it trains on, in place."""


class Execution(Protocol):
    """How the gradients of an update are made."""

    def gradients(
        self, get: Get, step: int, state: State, batches: Batches, draws: tuple[Draw, ...], grads: Any
    ) -> tuple[Any, Any, Any]:
        """Returns (buffer of gradients, statistics, numbers that `read` takes), all on the devices."""
        ...

    def read(self, numbers: Any, draws: tuple[Draw, ...]) -> Named:
        """Returns the numbers of every draw, which are on the host, as means over its microbatches or devices."""
        ...

    def gradient_programs(self, draws: tuple[Draw, ...], phase: Phase) -> Iterator[GradientProgram]:
        """Yields the gradient programs that an update of these draws runs."""
        ...

    def programs(self, draws: tuple[Draw, ...], phase: Phase) -> Iterator[Program]:
        """Yields the programs that an update of these draws needs."""
        ...

    def planned(self) -> tuple[Draw, ...]:
        """Returns the draws of which plans are made: of the full network, where all devices train one at a time."""
        ...

    def ready(self, step: int, batches: Batches, draws: tuple[Draw, ...]) -> list[Ready]:
        """Returns the gradient programs of an update with what each trains on, in place, for measurements: the losses
        count alike, and what networks learn from each other is zeros."""
        ...


def make_execution(setup: Setup, programs: Programs) -> Execution:
    """Returns the execution that a config asks for."""
    return InParallel(setup, programs) if setup.parallel else InTurn(setup, programs)


def place(batch: Mapping[str, np.ndarray], programs: Programs) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on its devices."""
    wanted = {k: v for k, v in batch.items() if k != "index"}
    return place_rows(wanted, programs.layout.batch, programs.layout.share[1])


class InTurn:
    """Runs the gradient programs one after the other; of the statistics the full network's count."""

    def __init__(self, setup: Setup, programs: Programs):
        self.setup, self.run = setup, programs
        self.accumulate: int = setup.config.train.accumulate
        self.mean = setup.mean
        self.weighs = weighs(setup)

    def gradients(
        self, get: Get, step: int, state: State, batches: Batches, draws: tuple[Draw, ...], grads: Any
    ) -> tuple[Any, Any, Any]:
        accumulate, phase = self.accumulate, self.setup.phase(step)
        even = 1.0 / accumulate / (len(draws) if self.mean else 1)
        stats, numbers = state.stats, []
        own, nothing = self._placed((np.float32(even), np.float32(0)))
        placed: dict[tuple[int, int], dict[str, Any]] = {}
        teachers: dict[tuple[int, int], Any] = {}
        for order, draw in enumerate(draws):
            cut = microbatches(draw, accumulate)
            for which in cut:
                if which not in placed:
                    placed[which] = {name: place(rows_of(batches[name], *which), self.run) for name in phase.streams}
            shares, scales = self._shares(get, [placed[which] for which in cut], np.float32(accumulate * even))
            for micro, which in enumerate(cut):
                clock = self._placed(np.array([step, which[0], order * accumulate + micro, order], np.uint32))
                scale = (own if scales is None else scales[micro], own)
                program = self.program_of(draw, draws, phase, placed[which])
                teacher = teachers[which] if program.distill else nothing
                held = self.run.held(state, stats)
                found = get(program)(held, grads, Microbatch(placed[which], clock, scale, teacher))
                grads = found.grads
                if draw.name == "full":
                    stats, teachers[which] = found.stats, found.outputs
                numbers.append((draw.name, found.measured, 1 / accumulate if shares is None else shares[micro]))
        return grads, stats, numbers

    def _placed(self, numbers: Any) -> Any:
        """Puts numbers of the host on the devices, which nothing does behind the loop's back."""
        return place_whole(numbers, self.run.layout.replicated)

    def program_of(
        self, draw: Draw, draws: Sequence[Draw], phase: Phase, batches: Mapping[str, Mapping[str, Any]]
    ) -> Gradient:
        """Returns the gradient program of one of an update's draws.

        Args:
          batches: stream -> a microbatch, or its shapes.
        """
        name, shapes = self.run.layout.canonical(draw.name), tuple((k, shapes_of(v)) for k, v in batches.items())
        distill, taught = draw.distill and phase.outputs, teaches(draw, draws) and phase.outputs
        return Gradient(name, shapes, phase.name, distill, taught)

    def _shares(self, get: Get, placed: Sequence[Mapping[str, Any]], factor: np.float32) -> tuple[Any, Any]:
        """Of each microbatch, its share in what the task counts in all of them, and the share times `factor`."""
        if not self.weighs:
            return None, None
        own = tuple(next(iter(batches.values())) for batches in placed)
        found: tuple[Any, Any] = get(Weigh(shapes_of(own[0]), len(own)))(own, self._placed(factor))
        return found

    def read(self, numbers: Any, draws: tuple[Draw, ...]) -> Named:
        count = len(numbers) // len(draws)
        rows = [numbers[i * count : (i + 1) * count] for i in range(len(draws))]
        return [(row[0][0], _mean([m for _, m, _ in row], [float(share) for *_, share in row])) for row in rows]

    def gradient_programs(self, draws: tuple[Draw, ...], phase: Phase) -> Iterator[GradientProgram]:
        for draw in draws:
            yield self.program_of(draw, draws, phase, dict.fromkeys(phase.streams, self._shapes(draw)))

    def programs(self, draws: tuple[Draw, ...], phase: Phase) -> Iterator[Program]:
        yield from self.gradient_programs(draws, phase)
        if self.weighs:
            yield Weigh(shapes_of(self._shapes(draws[-1])), self.accumulate)

    def _shapes(self, draw: Draw) -> dict[str, Any]:
        return self.setup.batch_shapes(self.setup.config.data.batch_size // self.accumulate // draw.microbatches)

    def planned(self) -> tuple[Draw, ...]:
        return (Draw("full", microbatches=self.setup.microbatches // self.accumulate),)

    def ready(self, step: int, batches: Batches, draws: tuple[Draw, ...]) -> list[Ready]:
        phase, layout = self.setup.phase(step), self.run.layout
        found: list[Ready] = []
        even = (np.float32(1 / self.accumulate / len(draws)),) * 2
        for order, draw in enumerate(draws):
            for micro, which in enumerate(microbatches(draw, self.accumulate)):
                placed = {name: place(rows_of(batches[name], *which), self.run) for name in phase.streams}
                clock = np.array([step, which[0], order * self.accumulate + micro, order], np.uint32)
                program = self.program_of(draw, draws, phase, placed)
                shape = program.microbatch(self.run).teacher
                where = layout.batch if program.distill else layout.replicated
                teacher = jax.device_put(np.zeros(shape.shape, shape.dtype), where)
                whole, scale = self._placed((clock, even))
                found.append((program, Microbatch(placed, whole, scale, teacher)))
        return found


class InParallel:
    """Trains the networks at the same time, each on its own devices."""

    def __init__(self, setup: Setup, programs: Programs):
        self.setup, self.run = setup, programs
        self.names = programs.layout.distinct()
        self.shapes = shapes_of(setup.batch_shapes(setup.config.data.batch_size))

    def gradients(
        self, get: Get, step: int, state: State, batches: Batches, draws: tuple[Draw, ...], grads: Any
    ) -> tuple[Any, Any, Any]:
        ((program, rows),) = self.ready(step, batches, draws)
        found: Gradients = get(program)(self.run.held(state), grads, rows)
        return found.grads, found.stats, found.measured

    def read(self, numbers: Any, draws: tuple[Draw, ...]) -> Named:
        return parallel.per_network(numbers, draws)

    def gradient_programs(self, draws: tuple[Draw, ...], phase: Phase) -> Iterator[GradientProgram]:
        yield Parallel(self.names, self.shapes, len(draws), self.setup.mean, phase.name)

    def programs(self, draws: tuple[Draw, ...], phase: Phase) -> Iterator[Program]:
        yield from self.gradient_programs(draws, phase)

    def planned(self) -> tuple[Draw, ...]:
        return self.setup.draw(0)

    def ready(self, step: int, batches: Batches, draws: tuple[Draw, ...]) -> list[Ready]:
        clock, places = parallel.places(self.run, self.names, step, draws)
        phase = self.setup.phase(step)
        (program,) = self.gradient_programs(draws, phase)
        return [(program, Rows(place(batches[phase.streams[0]], self.run), clock, places))]


def weighs(setup: Setup) -> bool:
    """Whether microbatches may differ in what the task counts."""
    accumulate = setup.config.train.accumulate
    return accumulate > 1 and jax.eval_shape(setup.task.weight, setup.batch_shapes(1)) is not None


def microbatches(draw: Draw, accumulate: int) -> list[tuple[int, int]]:
    """Returns (index, count) of a draw's microbatches of a batch: its own, cut into `accumulate`."""
    return [(draw.microbatch * accumulate + k, draw.microbatches * accumulate) for k in range(accumulate)]


def rows_of(batch: Mapping[str, np.ndarray], index: int, count: int) -> Mapping[str, np.ndarray]:
    """Returns the `index`-th of `count` microbatches of equal size."""
    if count == 1:
        return batch
    size = len(batch["index"]) // count
    return {k: v[index * size : (index + 1) * size] for k, v in batch.items()}


def _mean(several: list[dict[str, Any]], shares: list[float]) -> dict[str, Any]:
    """The numbers of a draw: losses and what is measured by the microbatches' shares, what layers tell of themselves by
    equal ones."""
    if len(several) == 1:
        return several[0]
    weighted: Callable[[str], Any] = lambda name: sum(
        share * np.asarray(m[name], np.float64) for share, m in zip(shares, several, strict=True)
    )
    even = lambda *arrays: np.mean(arrays, 0, np.float64)
    return {k: jax.tree.map(even, *[m[k] for m in several]) if k == "logged" else weighted(k) for k in several[0]}
