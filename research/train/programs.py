"""The compiled programs of a run: one gradient program per sub-network, one update program, and for evaluation one
recalibration and one evaluation program per sub-network. A task whose updates have phases has the first two once for
each phase. All are compiled ahead of time, in background threads.
"""

import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from research import seeds
from research.modules.axes import StatKind
from research.modules.mesh import BATCH_AXES
from research.modules.state import Abstract, Arrays, abstract, apply, initialize, told
from research.nested.schemes import Draw
from research.nested.slicing import slice_like
from research.nested.space import Space
from research.tasks.base import phases
from research.train import experts, sharding, spread
from research.train.processes import batch_share
from research.train.state import State, update_program

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass
class Programs:
    """Builds and keeps the compiled programs; `get` waits for one, `prefetch` starts compiling it.

    Attributes:
      calls: kind -> how often such a program runs at each evaluation, where that is known.
      compiled: key -> compiled program, in order of completion.
      seconds: key -> seconds spent tracing and compiling it.
      waiting: called again and again while `get` waits; may raise to stop.
    """

    task: Any
    space: Space
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh
    seed: int
    config: Mapping[str, Any]
    calls: dict[str, int] = field(default_factory=dict)
    compiled: dict[tuple, Any] = field(default_factory=dict)
    seconds: dict[tuple, float] = field(default_factory=dict)
    waiting: Callable[[], None] = lambda: None

    FEW = 10  # calls up to which optimising costs more than it saves

    def __post_init__(self):
        self.full: Abstract = abstract(self.space.full)
        self._on_cpu = all(d.platform == "cpu" for d in self.mesh.devices.flat)
        self.share = batch_share(self.mesh)  # (index, count): which part of every batch this process holds
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.batch_sharding = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        shapes = {**self.full.params, **self.full.stats}
        layout, self.refused = sharding.layout(self.full.axes, shapes, self.mesh, self.config["mesh"]["min_size"])
        self.param_shardings = {k: layout[k] for k in self.full.params}
        self.stat_shardings = {k: layout[k] for k in self.full.stats}
        self.shards = {r: int(self.config["nested"]["tensor_shards"]) for r in ("mlp", "heads", "bottleneck")}
        self.state_shapes = jax.eval_shape(self._init, jax.eval_shape(lambda: jax.random.key(0)))
        self.state_shardings = State(
            self.param_shardings,
            self.stat_shardings,
            sharding.like_params(self.state_shapes.opt_state, self.full.params, self.param_shardings, self.mesh),
            self.param_shardings if self.state_shapes.ema is not None else None,
        )
        self._futures: dict[tuple, Future] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")  # XLA itself compiles on all cores
        self._canonical = {}
        for name, config in self.space.configs.items():
            self._canonical[name] = next((n for n, c in self.space.configs.items() if c == config), name)

    # -- initial state -----------------------------------------------------------------------------------------

    def _init(self, key: Array) -> State:
        params, stats = initialize(self.space.full, key)
        return self._fresh(params, stats)

    def _fresh(self, params: Arrays, stats: Arrays) -> State:
        ema = jax.tree.map(jnp.copy, params) if self.config["train"]["ema"] else None
        return State(params, stats, self.optimizer.init(params), ema)

    def init_state(self) -> State:
        """Draws the initial state, each array where it belongs."""
        key = seeds.key(self.seed)
        lowered = jax.jit(self._init, out_shardings=self.state_shardings).lower(key)
        # It runs once: on a CPU the compiler's effort costs more than it saves.
        return lowered.compile(compiler_options={"xla_backend_optimization_level": 1} if self._on_cpu else None)(key)

    def state_from(self, params: Arrays, stats: Arrays) -> State:
        """Returns an initial state that starts from given weights."""
        return jax.jit(self._fresh, out_shardings=self.state_shardings)(params, stats)

    def zero_grads(self) -> Arrays:
        """Returns the gradient buffer, zeros with the layout of the parameters; no process ever holds all of it."""

        def zeros(shape: Any, sharding: NamedSharding) -> Array:
            return jax.make_array_from_callback(
                shape.shape, sharding, lambda index: np.zeros(_size(index, shape.shape), shape.dtype)
            )

        return {k: zeros(s, self.param_shardings[k]) for k, s in self.full.params.items()}

    def compute(self, name: str) -> Any:
        """The config to run with: on a CPU mesh the ops' forms are chosen for it."""
        config = self.space.configs[name]
        return config.on_cpu() if self._on_cpu else config

    # -- programs ----------------------------------------------------------------------------------------------

    def small(self, name: str) -> Abstract:
        return abstract(self.space.configs[name])

    def sliced(self, name: str, arrays: Arrays) -> Arrays:
        """Returns the slices of full-size arrays that sub-network `name` is made of."""
        small = self.small(name)
        whole = sharding.whole_where_cut(
            arrays, {**self.param_shardings, **self.stat_shardings}, self.full, small, self.shards
        )
        return slice_like(whole, self.full, small, self.shards)

    def _cast(self, arrays: Arrays) -> Arrays:
        dtype = DTYPES[self.config["train"]["precision"]]
        return {k: v if k in self.full.precise else v.astype(dtype) for k, v in arrays.items()}

    def _cast_inputs(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        dtype = DTYPES[self.config["train"]["precision"]]
        return tuple(x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in inputs)

    def outputs(self, batch: Any) -> jax.ShapeDtypeStruct:
        """Returns the shape of the full network's outputs for a batch."""
        params, stats = dict(self.full.params), dict(self.full.stats)

        def run(params: Arrays, stats: Arrays, batch: Any) -> Any:
            return apply(
                self.space.full, self._cast(params), stats, *self._cast_inputs(self.task.inputs(batch)), mode="eval"
            )[0]

        return jax.eval_shape(run, params, stats, batch)

    def _layer_losses(self, name: str, stats: Arrays) -> Any:
        return sum(stats[k].sum() for k in stats if self.small(name).stat_kinds[k] is StatKind.LOSS)

    def _gradient(self, name: str, distill: bool, teaches: bool, phase: str) -> Callable:
        config, share, task = self.compute(name), self.config["nested"]["distill"], self.task

        if hasattr(task, "objective"):
            return self._objective(name, phase)

        def program(params, stats, grads, batch, clock, scale, teacher):
            step_key = jax.random.fold_in(seeds.key(self.seed), clock[0])
            mix_key = jax.random.fold_in(jax.random.fold_in(step_key, 0), clock[1])
            drop_key = jax.random.fold_in(jax.random.fold_in(step_key, 1), clock[2])
            inputs, target = task.prepare(batch, mix_key)

            def loss_fn(params):
                sub = self._cast(self.sliced(name, params))
                sub_stats = self.sliced(name, stats)
                more = {"mode": "train", "key": drop_key, **told(config, task.real(batch))}
                outputs, new_stats = apply(config, sub, sub_stats, *self._cast_inputs(inputs), **more)
                loss = task.loss(outputs, target)
                if distill:
                    loss = (1 - share) * loss + share * task.distill(outputs, teacher, target)
                return loss * scale[0] + self._layer_losses(name, new_stats) * scale[1], (loss, outputs, new_stats)

            (_, (loss, outputs, new_stats)), new = jax.value_and_grad(loss_fn, has_aux=True)(params)
            grads = jax.tree.map(jnp.add, grads, new)
            out_stats = new_stats if name == "full" else stats
            metrics = {"loss": loss, **task.measure(outputs, batch)}
            if name == "full":
                metrics |= {"experts": experts.observed(new_stats)}
            return grads, out_stats, metrics, outputs if teaches else jnp.zeros(())

        return program

    def _objective(self, name: str, phase: str) -> Callable:
        """The gradient program of a task that runs the model itself; parameters of other phases get the gradient
        zero."""
        config, task = self.compute(name), self.task
        phase = phase or phases(task)[0]

        def program(params, stats, grads, batch, clock, scale, teacher):
            del teacher
            step_key = jax.random.fold_in(seeds.key(self.seed), clock[0])
            mix_key, drop_key, attack_key = (
                jax.random.fold_in(jax.random.fold_in(step_key, i), clock[place])
                for i, place in ((0, 1), (1, 2), (2, 2))
            )
            (image,), target = task.prepare(batch, mix_key)

            def loss_fn(params):
                params = {k: v if task.trains(phase, k) else jax.lax.stop_gradient(v) for k, v in params.items()}
                moved = {"stats": self.sliced(name, stats)}
                arrays = self._cast(self.sliced(name, params))

                def train(x, method="__call__"):
                    more = {"mode": "train", "key": drop_key, "method": method}
                    outputs, moved["stats"] = apply(config, arrays, moved["stats"], *self._cast_inputs((x,)), **more)
                    return outputs

                frozen = self._frozen(name, jax.lax.stop_gradient(self.sliced(name, params)), self.sliced(name, stats))
                loss, metrics = task.objective(train, frozen, image, target, attack_key, phase)
                return loss * scale[0] + self._layer_losses(name, moved["stats"]) * scale[1], (
                    loss,
                    metrics,
                    moved["stats"],
                )

            (_, (loss, metrics, new_stats)), new = jax.value_and_grad(loss_fn, has_aux=True)(params)
            grads = jax.tree.map(jnp.add, grads, new)
            return grads, new_stats if name == "full" else stats, {"loss": loss, **metrics}, jnp.zeros(())

        return program

    def _frozen(self, name: str, params: Arrays, stats: Arrays, real: Array | None = None) -> Callable:
        """The model of these arrays as attacks see it: a function of (x, method, mode) that moves no statistics."""
        config, params = self.compute(name), self._cast(params)
        more = told(config, real)
        run = lambda x, mode, method: apply(
            config, params, stats, *self._cast_inputs((x,)), mode=mode, method=method, **more
        )[0]  # noqa: E731
        return lambda x, method="__call__", mode="eval": run(x, mode, method)

    def _update(self, phase: str) -> Callable:
        return update_program(
            self.space.full, self.optimizer, self.schedule, self.config["train"], phase, len(phases(self.task))
        )

    def _weigh(self, batches: tuple[Any, ...], factor: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Of each microbatch, its share in what the task counts in all of them, and that times `factor`."""
        weights = jnp.stack([jnp.asarray(self.task.weight(batch), jnp.float32) for batch in batches])
        shares = weights / jnp.maximum(weights.sum(), 1e-20)
        return tuple(shares), tuple(shares * factor)

    def _calibrate(self, name: str) -> Callable:
        config = self.compute(name)

        def program(params, stats, total, batch):
            sub, start = self._cast(self.sliced(name, params)), self.sliced(name, stats)
            more = {"mode": "calibrate", **told(config, self.task.real(batch))}
            _, stats = apply(config, sub, start, *self._cast_inputs(self.task.inputs(batch)), **more)
            return {k: v + stats[k] for k, v in total.items()}

        return program

    def _evaluate(self, name: str) -> Callable:
        config = self.compute(name)

        def examined(params, stats, sums, batch):
            frozen = self._frozen(name, self.sliced(name, params), stats, self.task.real(batch))
            return jax.tree.map(jnp.add, sums, self.task.examine(frozen, batch))

        def program(params, stats, sums, batch):
            sub = self._cast(self.sliced(name, params))
            more = {"mode": "eval", **told(config, self.task.real(batch))}
            outputs, _ = apply(config, sub, stats, *self._cast_inputs(self.task.inputs(batch)), **more)
            return jax.tree.map(jnp.add, sums, self.task.sums(outputs, batch))

        return examined if hasattr(self.task, "examine") else program

    # -- compiling ---------------------------------------------------------------------------------------------

    def _build(self, key: tuple, args: tuple) -> Any:
        start = time.perf_counter()
        kind, name = key[0], key[1]
        rep, batch = self.replicated, self.batch_sharding
        params, stats = self.param_shardings, self.stat_shardings
        if kind == "spread":
            every = [self._gradient(n, False, False, key[3]) for n in key[2]]
            nested, full = self.config["nested"], key[2].index(self._canonical["full"])
            fn = jax.jit(
                spread.program(every, self.mesh, nested["count"], nested["reduce"], self.task.weight, self.full, full),
                in_shardings=(params, stats, params, batch, batch, batch),
                out_shardings=(params, stats, rep),
                donate_argnums=(2,),
            )
        elif kind == "gradient":
            fn = jax.jit(
                self._gradient(name, *key[2:]),
                in_shardings=(params, stats, params, batch, rep, rep, batch if key[2] else rep),
                out_shardings=(params, stats, rep, batch if key[3] else rep),
                donate_argnums=(2,),
            )
        elif kind == "update":
            fn = jax.jit(
                self._update(key[2]),
                in_shardings=(dataclasses.replace(self.state_shardings, stats={}), params, rep, stats, stats),
                out_shardings=(self.state_shardings, params, rep),
                donate_argnums=(0, 1),
            )
        elif kind == "weigh":
            fn = jax.jit(self._weigh, in_shardings=(batch, rep), out_shardings=rep)
        elif kind == "calibrate":
            fn = jax.jit(
                self._calibrate(name), in_shardings=(params, stats, rep, batch), out_shardings=rep, donate_argnums=(2,)
            )
        else:
            fn = jax.jit(
                self._evaluate(name), in_shardings=(params, rep, rep, batch), out_shardings=rep, donate_argnums=(2,)
            )
        with jax.set_mesh(self.mesh):  # layers that cut their own work ask for it
            program = fn.lower(*args).compile(compiler_options=self._effort(kind))
        with self._lock:
            self.compiled[key] = program
            self.seconds[key] = time.perf_counter() - start
        return program

    def _effort(self, kind: str) -> dict[str, int] | None:
        """Compiler options: on a CPU a program that runs a few times only is compiled without optimisation."""
        rarely = self.calls.get(kind, self.FEW + 1) <= self.FEW
        return {"xla_backend_optimization_level": 0} if self._on_cpu and rarely else None

    def prefetch(
        self, kind: str, name: str, *args: Any, distill: bool = False, teaches: bool = False, phase: str = ""
    ) -> None:
        """Starts compiling a program for arguments of these shapes, if it is not at hand yet."""
        key = self._key(kind, name, distill, teaches, phase)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)), args)
        with self._lock:
            if key not in self._futures:
                self._futures[key] = self._pool.submit(self._build, key, shapes)

    def get(
        self, kind: str, name: str, *args: Any, distill: bool = False, teaches: bool = False, phase: str = ""
    ) -> Any:
        """Returns a compiled program, waiting for it when needed."""
        key = self._key(kind, name, distill, teaches, phase)
        ready = self.compiled.get(key)
        if ready is not None:
            return ready
        self.prefetch(kind, name, *args, distill=distill, teaches=teaches, phase=phase)
        future = self._futures[key]
        while not future.done():
            self.waiting()
            time.sleep(0.01)  # a plain result() would hold back signals
        return future.result()

    def busy(self) -> bool:
        """Whether a program is being compiled, or is to be."""
        return any(not future.done() for future in list(self._futures.values()))

    def compiling(self) -> str:
        """Returns a line on the program that is being compiled: which, and of how many."""
        keys = list(self._futures)
        left = [key for key in keys if not self._futures[key].done()]
        what = f"compiling the {' '.join(left[0][:2]).strip()} program, " if left else "compiled "
        return f"{what}{len(keys) - len(left) + bool(left)} of {len(keys)}"

    def _key(self, kind: str, name: str, distill: bool, teaches: bool, phase: str) -> tuple:
        more = {"gradient": (distill, teaches, phase), "update": (phase,), "spread": (self.spread_order, phase)}.get(
            kind, ()
        )
        return (kind, self._canonical.get(name, name), *more)

    def memory(self) -> str:
        """Returns a line on the memory of a device: what the state takes, and the largest program beside it."""
        sizes = {}
        for (kind, name, *_), compiled in list(self.compiled.items()):
            if (found := compiled.memory_analysis()) is not None:
                sizes[f"{kind} {name}".strip()] = (
                    found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
                )
        state = sum(
            math.prod(p.shard_shape(s.shape)) * jnp.dtype(s.dtype).itemsize
            for s, p in zip(jax.tree.leaves(self.state_shapes), jax.tree.leaves(self.state_shardings), strict=True)
        )
        largest = max(sizes, key=lambda k: sizes[k], default="")
        more = f", the {largest} program {sizes[largest] / 2**20:,.1f} MiB beside it" if largest else ""
        return f"memory of a device: state {state / 2**20:,.1f} MiB{more}"

    @functools.cached_property
    def spread_order(self) -> tuple[str, ...]:
        """The networks of the one program in which devices train different ones."""
        return tuple(dict.fromkeys(self._canonical.values()))

    def spread_places(self, draws: Sequence[Draw]) -> np.ndarray:
        """Returns for each device the place of its network in `spread_order`; consecutive devices hold the rows of one
        part of the batch."""
        names = [self.spread_order.index(self._canonical[draw.name]) for draw in draws]
        return np.repeat(np.array(names, np.int32), self.mesh.size // len(draws))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def bound(self) -> int:
        """The most programs that a run may compile: three per distinct sub-network, and the update; gradient and update
        in each phase.

        Networks that an update distils and another does not have a gradient program for each, and unequal microbatches
        one that weighs them.
        """
        count, networks = len(phases(self.task)), len(set(self._canonical.values()))
        kinds = [key[0] for key in self.compiled]
        more = max(kinds.count("gradient") - count * networks, 0) + kinds.count("weigh")
        return (2 + count) * networks + count + more


def _size(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of what an index cuts out of an array of `shape`."""
    return tuple(len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True))
