"""Recalibration of batch-norm statistics and evaluation of sub-networks.

After many-in-one training running moments belong to no network in particular: before it is evaluated each one gets
its own, the averages of the moments of the same training batches (Once-for-All; universally slimmable networks).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.data import pipeline
from research.errors import UserError
from research.modules.axes import StatKind
from research.modules.state import Arrays, apply, told
from research.tasks.base import summary
from research.train.gradient import Running
from research.train.layout import Shapes, shapes_of, structs
from research.train.processes import place_whole
from research.train.programs import Programs
from research.train.setup import Setup
from research.train.state import Held, State
from research.train.turns import place

FEW = 10
"""Calls up to which optimising a program costs more than it saves, on a CPU."""


@dataclass(frozen=True)
class Calibrate:
    """Adds a batch's moments of one network: (params, methods' arrays, stats, total, batch) -> total.

    Attributes:
      name: of the network.
      moments: names of the statistics that it recalibrates.
      batch: shapes of a training batch.
    """

    name: str
    moments: tuple[str, ...]
    batch: Shapes

    @property
    def title(self) -> str:
        return f"calibrate {self.name}"

    def rarely(self, programs: Programs) -> bool:
        return programs.calls[0] <= FEW

    def lower(self, programs: Programs) -> jax.stages.Lowered:
        layout, task = programs.layout, programs.task
        config = layout.compute(self.name)

        def program(params: Arrays, methods: Any, stats: Arrays, total: Arrays, batch: Any) -> Arrays:
            sub, start = programs.weights(self.name, params, methods), layout.sliced(self.name, stats)
            more = {"mode": "calibrate", **told(config, task.real(batch))}
            _, stats = apply(config, sub, start, *layout.cast_inputs(task.inputs(batch)), **more)
            return {k: v + stats[k] for k, v in total.items()}

        whole = layout.replicated
        compiled = jax.jit(
            program,
            in_shardings=(layout.params, layout.extras, layout.stats, whole, layout.batch),
            out_shardings=whole,
            donate_argnums=(3,),
        )
        full, own = programs.full, layout.small(self.name).stats
        total = {k: own[k] for k in self.moments}
        with jax.set_mesh(layout.mesh):
            return compiled.lower(
                dict(full.params), programs.shapes.methods, dict(full.stats), total, structs(self.batch)
            )


@dataclass(frozen=True)
class Evaluate:
    """Adds the sums of a batch: (params, methods' arrays, the network's own stats, sums, batch) -> sums.

    Attributes:
      name: of the network.
      batch: shapes of a batch, with its mask.
    """

    name: str
    batch: Shapes

    @property
    def title(self) -> str:
        return f"evaluate {self.name}"

    def rarely(self, programs: Programs) -> bool:
        return programs.calls[1] <= FEW

    def lower(self, programs: Programs) -> jax.stages.Lowered:
        layout, task = programs.layout, programs.task

        def program(params: Arrays, methods: Any, stats: Arrays, sums: Any, batch: Any) -> Any:
            forward = Running(programs, self.name, Held(params, stats, methods, {}), params, task.real(batch))
            return jax.tree.map(jnp.add, sums, task.examine(forward, batch))

        whole = layout.replicated
        compiled = jax.jit(
            program,
            in_shardings=(layout.params, layout.extras, whole, whole, layout.batch),
            out_shardings=whole,
            donate_argnums=(3,),
        )
        stats, sums = dict(layout.small(self.name).stats), zero_sums(programs)
        with jax.set_mesh(layout.mesh):
            return compiled.lower(dict(programs.full.params), programs.shapes.methods, stats, sums, structs(self.batch))


def zero_sums(programs: Programs) -> dict[str, np.ndarray]:
    """Returns the start of a sum over a split, on the host."""
    return {k: np.asarray(v, np.float32) for k, v in programs.task.zero_sums().items()}


def calibration_batches(setup: Setup, count: int, share: tuple[int, int] = (0, 1)) -> list[dict[str, np.ndarray]]:
    """Returns the first `count` training batches of epoch 0, prepared as for evaluation; of each the share (index,
    count)."""
    source, size = setup.splits["train"], setup.config.data.batch_size
    batches = []
    for step in range(min(count, max(len(source) // size, 1))):
        indices, _ = pipeline.batch_indices(
            len(source), step, batch_size=size, seed=0, shard_index=share[0], shard_count=share[1]
        )
        batches.append(setup.transform.evaluate(source.gather(indices)))
    return batches


@dataclass(frozen=True)
class Weights:
    """What is evaluated: parameters of the full network (their average, where a method keeps one), its running
    statistics, and the arrays of methods."""

    params: Arrays
    stats: Arrays
    methods: dict[str, Arrays]


def weights_of(programs: Programs, state: State) -> Weights:
    """Returns what of a state is evaluated."""
    return Weights(programs.methods.evaluated(state.params, state.methods), state.stats, state.methods)


def extracted(programs: Programs, name: str, weights: Weights) -> dict[str, np.ndarray]:
    """Returns the parameters of a stand-alone network, independent copies on the host: what methods make of the weights
    is baked in."""
    params, methods = jax.device_get((weights.params, weights.methods))
    return {k: np.array(v) for k, v in programs.stand_alone(name, params, methods).items()}


class Evaluator:
    """Evaluates sub-networks of given parameters; calibrated statistics are returned with the metrics.

    Args:
      tick: called between batches; may raise to stop.
    """

    def __init__(self, setup: Setup, programs: Programs, tick: Callable[[], None] = lambda: None):
        self.setup, self.programs, self.tick = setup, programs, tick
        self._calibration: list[dict[str, jax.Array]] | None = None

    def _calibration_batches(self) -> list[dict[str, jax.Array]]:
        if self._calibration is None:
            count = self.setup.config.eval.calibrate_batches
            self._calibration = [
                place(b, self.programs) for b in calibration_batches(self.setup, count, self.programs.layout.share)
            ]
        return self._calibration

    def _zeros(self, shapes: Any) -> Any:
        return self._everywhere(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))

    def _everywhere(self, tree: Any) -> Any:
        return place_whole(tree, self.programs.layout.replicated)

    def needs_calibration(self, name: str) -> bool:
        return bool(self._moments(name)) and self.setup.config.eval.calibrate_batches > 0

    def _moments(self, name: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of what a network recalibrates: not what was drawn once, nor what updates balance routers by."""
        small = self.programs.layout.small(name)
        return {k: small.stats[k] for k in small.stats_of(StatKind.MOMENT)}

    def statistics(self, name: str, state: Weights) -> Arrays:
        """Returns the statistics that sub-network `name` is evaluated with."""
        params, stats = state.params, state.stats
        if not self.programs.layout.small(name).stats:
            return {}
        moments = self._moments(name) if self.needs_calibration(name) else {}
        rest = {k: v for k, v in stats.items() if k not in moments}
        own = (
            jax.jit(
                functools.partial(self.programs.layout.sliced, name), out_shardings=self.programs.layout.replicated
            )(rest)
            if rest
            else {}
        )
        if not moments:
            return own
        total = self._zeros(moments)
        batches = self._calibration_batches()
        program = self.programs.get(self._calibrate(name, batches[0]))
        for batch in batches:
            self.tick()
            total = program(params, state.methods, stats, total, batch)
        host = {k: np.asarray(v) / np.asarray(len(batches), v.dtype) for k, v in jax.device_get(total).items()}
        return {**own, **self._everywhere(host)}

    def batches(self, split: str) -> Iterator[dict[str, np.ndarray]]:
        return pipeline.eval_batches(
            self.setup.splits[split],
            batch_size=self.setup.config.eval.batch_size,
            prepare=self.setup.transform.evaluate,
            shard_index=self.programs.layout.share[0],
            shard_count=self.programs.layout.share[1],
        )

    def _calibrate(self, name: str, batch: Any) -> Calibrate:
        return Calibrate(self.programs.layout.canonical(name), tuple(sorted(self._moments(name))), shapes_of(batch))

    def __call__(self, names: Sequence[str], state: Weights, split: str) -> dict[str, dict[str, float]]:
        """Returns name -> metrics of the split; every name is recalibrated first."""
        return self.run({name: self.statistics(name, state) for name in names}, state, split)

    def run(self, statistics: dict[str, Arrays], state: Weights, split: str) -> dict[str, dict[str, float]]:
        """Returns name -> metrics for sub-networks whose statistics are at hand; the data are read once.

        Raises:
          UserError: the split has no example, or none with a label.
        """
        if not self.setup.examples(split):
            valid = [name for name, count in self.setup.data.facts.examples.items() if count]
            raise UserError(f"{self.setup.config.data.name} has no {split} split; valid: {', '.join(valid)}")
        zero = zero_sums(self.programs)
        sums = {name: self._everywhere(zero) for name in statistics}
        for batch in self.batches(split):
            placed = place(batch, self.programs)
            for name in statistics:
                self.tick()
                program = self.programs.get(Evaluate(self.programs.layout.canonical(name), shapes_of(placed)))
                sums[name] = program(state.params, state.methods, statistics[name], sums[name], placed)
        where = f"the {split} split of {self.setup.config.data.name}"
        return {name: summary(self.setup.task, jax.device_get(value), where) for name, value in sums.items()}

    def _shapes(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of `size` examples to evaluate, which may hold more than those to train on: lengths, where the last
        text is filled up."""
        source = next(
            (self.setup.splits[name] for name in ("validation", "test") if len(self.setup.splits[name])), None
        )
        if source is None:
            return self.setup.batch_shapes(size)
        example = self.setup.transform.evaluate(source.gather(np.zeros(1, np.int64)))
        return {k: jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype) for k, v in example.items()}

    def prefetch(self, names: Sequence[str]) -> None:
        """Starts compiling what evaluating `names` needs."""
        for name in names:
            self.programs.prefetch(*self.needed(name))

    def needed(self, name: str) -> Iterator[Calibrate | Evaluate]:
        """Yields the programs that evaluating a network needs."""
        size, local = self.setup.config.eval.batch_size, self.setup.config.data.batch_size
        if self.needs_calibration(name):
            yield self._calibrate(name, self.setup.batch_shapes(local))
        masked = shapes_of({**self._shapes(size), "mask": jax.ShapeDtypeStruct((size,), np.float32)})
        yield Evaluate(self.programs.layout.canonical(name), masked)
