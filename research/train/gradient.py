"""The gradient program of one sub-network: its objective on one microbatch, added to the buffer of gradients."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from research import seeds
from research.modules.axes import StatKind
from research.modules.features import chosen, reading
from research.modules.state import Arrays, abstract, apply, told
from research.tasks.base import Example
from research.train.hooks import Clock, Loss, everything
from research.train.layout import Shapes, structs
from research.train.programs import Programs
from research.train.state import Gradients, Held, Microbatch

MIX, DROP, DRAW = 0, 1, 2
"""Streams of random numbers of an update: mixing of examples, noise of layers, draws of the objective."""


class Running:
    """The model of a program, as tasks and methods run it (`research.tasks.base.Forward`); its statistics move in
    training.

    Args:
      programs: of the run.
      name: of the network.
      held: arrays of the full network and of methods.
      params: the parameters that gradients are taken of.
      real: which examples, or tokens, are real; None: all.
      clock: of training; None in evaluation, where `held.stats` are the network's own.
      key: for noise of layers.
    """

    def __init__(
        self,
        programs: Programs,
        name: str,
        held: Held,
        params: Arrays,
        real: Array | None,
        clock: Clock | None = None,
        key: Array | None = None,
    ):
        self._programs, self._name, self._held, self._params, self._clock = programs, name, held, params, clock
        self._config = programs.layout.compute(name)
        self._real, self._noise = real, key
        self._told = told(self._config, real)
        self._mode = "eval" if clock is None else "train"
        self._key = {} if key is None else {"key": key}
        self._live = programs.weights(name, params, held.methods, clock)
        self.stats = held.stats if clock is None else programs.layout.sliced(name, held.stats)
        self._start = self.stats

    def __call__(
        self,
        *inputs: Array,
        mode: str = "",
        method: str = "__call__",
        params: str = "live",
        subnet: str = "",
        features: Sequence[str] = (),
    ) -> Any:
        run = self._other(subnet) if subnet else self
        with reading() as found:
            outputs = run._run(inputs, mode, method, params)
        return (outputs, chosen(found, features)) if features else outputs

    def _run(self, inputs: tuple[Array, ...], mode: str, method: str, params: str) -> Any:
        cast = self._programs.layout.cast_inputs(inputs)
        if params == "live":
            mode = mode or self._mode
            more = {**(self._key if mode == "train" else {}), **self._told}
            outputs, stats = apply(self._config, self._live, self.stats, *cast, mode=mode, method=method, **more)
            if mode == "train":
                self.stats = stats
            return outputs
        if params == "frozen":
            live = jax.lax.stop_gradient(self._params)
            arrays = self._programs.weights(self._name, live, self._held.methods, self._clock)
            return apply(self._config, arrays, self._start, *cast, mode=mode or "eval", method=method, **self._told)[0]
        arrays, stats = self._held.brought[params]
        config = self._programs.network(params)
        config = config.on_cpu() if self._programs.layout.on_cpu else config
        cast_arrays = self._programs.layout.cast(arrays)
        return apply(config, cast_arrays, stats, *cast, mode=mode or "eval", method=method, **self._told)[0]

    def _other(self, name: str) -> "Running":
        """The same for another network of the space, whose statistics stay."""
        layout = self._programs.layout
        if self._clock is None:
            raise ValueError("statistics of other sub-networks are not at hand outside of training")
        name = layout.canonical(name)
        return Running(self._programs, name, self._held, self._params, self._real, self._clock, self._noise)


@dataclass(frozen=True)
class Gradient:
    """Adds the gradient of one sub-network's objective: (held, grads, microbatch) -> `Gradients`.

    Attributes:
      name: of the network.
      batches: stream -> shapes of a microbatch.
      phase: of the update.
      distill: whether it learns from the full network's outputs.
      teaches: whether its outputs are kept for others.
    """

    name: str
    batches: tuple[tuple[str, Shapes], ...]
    phase: str = "all"
    distill: bool = False
    teaches: bool = False

    @property
    def title(self) -> str:
        return f"gradient {self.name}"

    def rarely(self, programs: Programs) -> bool:
        del programs
        return False

    def lower(self, programs: Programs) -> jax.stages.Lowered:
        layout = programs.layout
        whole, rows = layout.replicated, layout.batch
        microbatch = Microbatch(rows, whole, whole, rows if self.distill else whole)
        held = programs.held_shardings()
        program = jax.jit(
            self.program(programs),
            in_shardings=(held, layout.params, microbatch),
            out_shardings=Gradients(layout.params, layout.stats, whole, rows if self.teaches else whole),
            donate_argnums=(1,),
        )
        with jax.set_mesh(layout.mesh):  # layers that cut their own work ask for it
            return program.lower(programs.held_shapes(), dict(programs.full.params), self.microbatch(programs))

    def parts(self, programs: Programs) -> "tuple[Gradient, ...]":
        """Returns the gradients that it computes: itself."""
        del programs
        return (self,)

    def microbatch(self, programs: Programs) -> Microbatch:
        """The shapes of what it trains on."""
        streams = {stream: structs(shapes) for stream, shapes in self.batches}
        number, clock = jax.ShapeDtypeStruct((), np.float32), jax.ShapeDtypeStruct((4,), np.uint32)
        teacher = programs.outputs(self.batches[0][1]) if self.distill else number
        return Microbatch(streams, clock, (number, number), teacher)

    def program(self, programs: Programs) -> Any:
        """Returns the function; `research.train.parallel` runs it on single devices."""
        gradient = programs.methods.gradient(programs.phases[self.phase])

        def program(held: Held, grads: Arrays, microbatch: Microbatch) -> Gradients:
            clock = make_clock(programs.seed, microbatch.clock, self.phase)
            loss = self.loss(programs, held, microbatch)
            (_, (outcome, stats)), new = gradient(loss, held.params, clock.key(DRAW, clock.turn))
            grads = jax.tree.map(jnp.add, grads, new)
            measured: dict[str, Any] = {"loss": outcome.loss, **outcome.measured}
            if self.name == "full":
                measured["logged"] = {k: stats[k] for k in programs.full.stats_of(StatKind.LOG)}
            outputs = outcome.outputs if self.teaches else jnp.zeros(())
            return Gradients(grads, stats if self.name == "full" else held.stats, measured, outputs)

        return program

    def loss(self, programs: Programs, held: Held, microbatch: Microbatch) -> Loss:
        """Returns the function of the parameters that gradients are made of, see `research.train.method.Loss`."""
        task, phase = programs.task, programs.phases[self.phase]
        objective, clock = programs.methods.objective(task), make_clock(programs.seed, microbatch.clock, self.phase)
        mixing, noise, own = clock.key(MIX, clock.microbatch), clock.key(DROP, clock.turn), clock.key(DRAW, clock.turn)
        prepared = {stream: task.prepare(batch, mixing) for stream, batch in microbatch.batches.items()}
        teacher = microbatch.teacher if self.distill else None

        def loss(
            params: Arrays, stream: str = self.batches[0][0], trains: Callable[[str], bool] = phase.trains
        ) -> tuple[Array, Any]:
            (inputs, target), batch = prepared[stream], microbatch.batches[stream]
            if trains is not everything:
                params = {k: v if trains(k) else jax.lax.stop_gradient(v) for k, v in params.items()}
            forward = Running(programs, self.name, held, params, task.real(batch), clock, noise)
            outcome = objective(forward, Example(batch, inputs, target, teacher, self.phase, own))
            layers = self._layer_losses(programs, forward.stats)
            total = outcome.loss * microbatch.scale[0] + layers * microbatch.scale[1]
            return total, (outcome, forward.stats)

        return loss

    def _layer_losses(self, programs: Programs, stats: Mapping[str, Array]) -> Any:
        kinds = abstract(programs.space.configs[self.name]).stat_kinds
        return sum(stats[k].sum() for k in stats if kinds[k] is StatKind.LOSS)


def make_clock(seed: int, clock: Array, phase: str) -> Clock:
    """Returns the clock of a program of an update from its four numbers, see `Microbatch`."""
    key = jax.random.fold_in(seeds.key(seed), clock[0])
    return Clock(clock[0], clock[1], clock[2], clock[3], phase, key)


@dataclass(frozen=True)
class Weigh:
    """Of microbatches, the share of each in what the task counts in all of them, and that times a factor.

    Attributes:
      batch: shapes of a microbatch.
      count: of microbatches.
    """

    batch: Shapes
    count: int
    title = "weigh"

    def rarely(self, programs: Programs) -> bool:
        del programs
        return False

    def lower(self, programs: Programs) -> jax.stages.Lowered:
        layout, task = programs.layout, programs.task

        def weigh(batches: tuple[Any, ...], factor: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
            weights = jnp.stack([jnp.asarray(task.weight(batch), jnp.float32) for batch in batches])
            shares = weights / jnp.maximum(weights.sum(), 1e-20)
            return tuple(shares), tuple(shares * factor)

        with jax.set_mesh(layout.mesh):
            return jax.jit(
                weigh, in_shardings=(layout.batch, layout.replicated), out_shardings=layout.replicated
            ).lower((structs(self.batch),) * self.count, jax.ShapeDtypeStruct((), np.float32))
