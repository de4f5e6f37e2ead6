"""Recalibration of batch-norm statistics and evaluation of sub-networks.

After many-in-one training running moments belong to no network in particular: before it is evaluated each one gets
its own, the averages of the moments of the same training batches (Once-for-All; universally slimmable networks).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from research.data import pipeline
from research.errors import UserError
from research.modules.axes import StatKind
from research.modules.state import Arrays
from research.tasks.base import summary
from research.train.processes import place_rows, place_whole
from research.train.programs import Programs
from research.train.setup import Setup


def place(batch: dict[str, np.ndarray], programs: Programs) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on its devices."""
    wanted = {k: v for k, v in batch.items() if k != "index"}
    return place_rows(wanted, programs.batch_sharding, programs.share[1])


def calibration_batches(setup: Setup, count: int, share: tuple[int, int] = (0, 1)) -> list[dict[str, np.ndarray]]:
    """Returns the first `count` training batches of epoch 0, prepared as for evaluation; of each the share (index,
    count)."""
    source, size = setup.splits["train"], setup.config["data"]["batch_size"]
    batches = []
    for step in range(min(count, max(len(source) // size, 1))):
        indices, _ = pipeline.batch_indices(
            len(source), step, batch_size=size, seed=0, shard_index=share[0], shard_count=share[1]
        )
        batches.append(setup.transform.evaluate(source.gather(indices)))
    return batches


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
            count = self.setup.config["eval"]["calibrate_batches"]
            self._calibration = [
                place(b, self.programs) for b in calibration_batches(self.setup, count, self.programs.share)
            ]
        return self._calibration

    def _zeros(self, shapes: Any) -> Any:
        return self._everywhere(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))

    def _everywhere(self, tree: Any) -> Any:
        return place_whole(tree, self.programs.replicated)

    def needs_calibration(self, name: str) -> bool:
        return bool(self._moments(name)) and self.setup.config["eval"]["calibrate_batches"] > 0

    def _moments(self, name: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of what a network recalibrates: not what was drawn once, nor what updates balance routers by."""
        small = self.programs.small(name)
        return {k: small.stats[k] for k in small.stats_of(StatKind.MOMENT)}

    def statistics(self, name: str, params: Arrays, stats: Arrays) -> Arrays:
        """Returns the statistics that sub-network `name` is evaluated with."""
        if not self.programs.small(name).stats:
            return {}
        moments = self._moments(name) if self.needs_calibration(name) else {}
        rest = {k: v for k, v in stats.items() if k not in moments}
        own = (
            jax.jit(functools.partial(self.programs.sliced, name), out_shardings=self.programs.replicated)(rest)
            if rest
            else {}
        )
        if not moments:
            return own
        total = self._zeros(moments)
        batches = self._calibration_batches()
        program = self.programs.get("calibrate", name, params, stats, total, batches[0])
        for batch in batches:
            self.tick()
            total = program(params, stats, total, batch)
        host = {k: np.asarray(v) / np.asarray(len(batches), v.dtype) for k, v in jax.device_get(total).items()}
        return {**own, **self._everywhere(host)}

    def batches(self, split: str) -> Iterator[dict[str, np.ndarray]]:
        return pipeline.eval_batches(
            self.setup.splits[split],
            batch_size=self.setup.config["eval"]["batch_size"],
            prepare=self.setup.transform.evaluate,
            shard_index=self.programs.share[0],
            shard_count=self.programs.share[1],
        )

    def _zero_sums(self) -> dict[str, np.ndarray]:
        return {k: np.asarray(v, np.float32) for k, v in self.setup.task.zero_sums().items()}

    def __call__(self, names: Sequence[str], params: Arrays, stats: Arrays, split: str) -> dict[str, dict[str, float]]:
        """Returns name -> metrics of the split; every name is recalibrated first."""
        statistics = {name: self.statistics(name, params, stats) for name in names}
        return self.run(statistics, params, split)

    def run(self, statistics: dict[str, Arrays], params: Arrays, split: str) -> dict[str, dict[str, float]]:
        """Returns name -> metrics for sub-networks whose statistics are at hand; the data are read once.

        Raises:
          UserError: the split has no example, or none with a label.
        """
        if not self.setup.examples(split):
            valid = [name for name, count in self.setup.data.facts.examples.items() if count]
            raise UserError(f"{self.setup.config['data']['name']} has no {split} split; valid: {', '.join(valid)}")
        zero = self._zero_sums()
        sums = {name: self._everywhere(zero) for name in statistics}
        for batch in self.batches(split):
            placed = place(batch, self.programs)
            for name in statistics:
                self.tick()
                program = self.programs.get("evaluate", name, params, statistics[name], sums[name], placed)
                sums[name] = program(params, statistics[name], sums[name], placed)
        where = f"the {split} split of {self.setup.config['data']['name']}"
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

    def prefetch(self, names: Sequence[str], params: Arrays) -> None:
        """Starts compiling what evaluating `names` needs."""
        size, local = self.setup.config["eval"]["batch_size"], self.setup.config["data"]["batch_size"]
        sums, full = self._zero_sums(), dict(self.programs.full.stats)
        for name in names:
            stats = dict(self.programs.small(name).stats)
            if self.needs_calibration(name):
                self.programs.prefetch(
                    "calibrate", name, params, full, self._moments(name), self.setup.batch_shapes(local)
                )
            masked = {**self._shapes(size), "mask": jax.ShapeDtypeStruct((size,), np.float32)}
            self.programs.prefetch("evaluate", name, params, stats, sums, masked)
