"""What the programs of supervised training are made of, and the arrays that a run starts from."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from research import seeds
from research.modules.state import Abstract, Arrays, abstract, apply, initialize
from research.nested.slicing import slice_like
from research.nested.space import Space
from research.tasks.base import Task
from research.train import sharding
from research.train.compiler import Compiler, Program
from research.train.hooks import Brought, Phase, number_of
from research.train.layout import Layout, Shapes, structs
from research.train.methods import Methods
from research.train.sections import RunConfig
from research.train.state import Held, State


class Programs:
    """What the compiled programs of a run are made of; `get` compiles one, see `research.train.compiler`.

    Args:
      task, space, methods: of the run.
      optimizer: of all phases.
      schedules: learning rate of each phase, as a function of the run's updates.
      mesh: where it runs.
      config: of the run.
      calls: batches of one recalibration, and of one evaluation.
      brought: networks that methods bring.
      waiting: called again and again while a program is waited for.

    Attributes:
      layout: where arrays lie.
      shapes, shardings: of the state.
    """

    def __init__(
        self,
        task: Task,
        space: Space,
        methods: Methods,
        optimizer: optax.GradientTransformation,
        schedules: Mapping[str, optax.Schedule],
        mesh: Mesh,
        config: RunConfig,
        calls: tuple[int, int],
        brought: Mapping[str, Brought],
        waiting: Callable[[], None] = lambda: None,
    ):
        self.task, self.space, self.methods, self.config = task, space, methods, config
        self.optimizer, self.schedules, self.calls = optimizer, schedules, calls
        self.seed: int = config.seed
        self.layout = Layout(
            space,
            mesh,
            methods.extras(abstract(space.full)),
            precision=config.train.precision,
            tensor_shards=config.nested.tensor_shards,
            min_size=config.mesh.min_size,
        )
        self.phases: dict[str, Phase] = {phase.name: phase for phase in methods.phases(space.full)}
        self.shapes: State = jax.eval_shape(self._init, jax.eval_shape(lambda: jax.random.key(0)))
        self.shardings = State(
            self.layout.params,
            self.layout.stats,
            sharding.like_params(self.shapes.opt_state, self.full.params, self.layout.params, mesh),
            self.layout.extras,
        )
        self.networks = brought
        self.brought = {name: self._placed(network) for name, network in brought.items()}
        self.compiler = Compiler(self, self.layout.on_cpu, waiting)

    @property
    def full(self) -> Abstract:
        """Of the full network and what methods train."""
        return self.layout.full

    @property
    def mesh(self) -> Mesh:
        return self.layout.mesh

    # -- state -------------------------------------------------------------------------------------------------

    def _init(self, key: Array) -> State:
        params, stats = initialize(self.space.full, key)
        return self._fresh(params, stats, key)

    def _fresh(self, params: Arrays, stats: Arrays, key: Array) -> State:
        params, methods = dict(params), {}
        for method, extras in self.layout.added.items():
            own = {}
            for name, extra in extras.items():
                own_key = jax.random.fold_in(jax.random.fold_in(key, number_of(method)), number_of(name))
                value = extra.initial(own_key, params)
                if extra.kind is None:
                    own[name] = value
                else:
                    params[f"{method}/{name}"] = value
            if own:
                methods[method] = own
        return State(params, stats, self.optimizer.init(params), methods)

    def init_state(self) -> State:
        """Draws the initial state, each array where it belongs."""
        key = seeds.key(self.seed)
        lowered = jax.jit(self._init, out_shardings=self.shardings).lower(key)
        # It runs once: on a CPU the compiler's effort costs more than it saves.
        effort: dict[str, Any] | None = {"xla_backend_optimization_level": 1} if self.layout.on_cpu else None
        state: State = lowered.compile(compiler_options=effort)(key)
        return state

    def state_from(self, params: Arrays, stats: Arrays) -> State:
        """Returns an initial state that starts from given weights; those that are not given are drawn."""

        def start(params: Arrays, stats: Arrays, key: Array) -> State:
            if params.keys() < self.layout.model.params.keys() or stats.keys() < self.layout.model.stats.keys():
                drawn = initialize(self.space.full, key)
                params, stats = {**drawn[0], **params}, {**drawn[1], **stats}
            return self._fresh(params, stats, key)

        state: State = jax.jit(start, out_shardings=self.shardings)(params, stats, seeds.key(self.seed))
        return state

    def drawn(self, key: Array) -> State:
        """Returns a fresh state of another key than the seed's."""
        state: State = jax.jit(self._init, out_shardings=self.shardings)(key)
        return state

    def zero_grads(self) -> Arrays:
        """Returns the gradient buffer, zeros with the layout of the parameters; no process ever holds all of it."""

        def zeros(shape: Any, sharding: NamedSharding) -> Array:
            cut = lambda index: np.zeros(_size(index, shape.shape), shape.dtype)
            return jax.make_array_from_callback(shape.shape, sharding, cut)

        return {k: zeros(s, self.layout.params[k]) for k, s in self.full.params.items()}

    def held(self, state: State, stats: Arrays | None = None) -> Held:
        """Returns what gradients of a state are made of.

        Args:
          stats: in place of the state's.
        """
        return Held(state.params, state.stats if stats is None else stats, state.methods, self.brought)

    def held_shapes(self) -> Held:
        """The shapes of `held`."""
        return self.held(self.shapes)

    def held_shardings(self) -> Held:
        brought = jax.tree.map(lambda array: array.sharding, self.brought)
        return Held(self.layout.params, self.layout.stats, self.layout.extras, brought)

    def _placed(self, network: Brought) -> tuple[Arrays, Arrays]:
        """Returns (params, stats) of a network that a method brings, on the devices by its own axis names."""
        shapes, axes = {**network.params, **network.stats}, abstract(network.config).axes
        places, _ = sharding.layout(axes, shapes, self.mesh, self.config.mesh.min_size)

        def put(arrays: Arrays) -> Arrays:
            return {name: jax.device_put(array, places[name]) for name, array in arrays.items()}

        return put(network.params), put(network.stats)

    def network(self, method: str) -> Any:
        """Returns the config of the network that a method brings."""
        return self.networks[method].config

    # -- weights -----------------------------------------------------------------------------------------------

    def weights(self, name: str, params: Arrays, methods: Mapping[str, Arrays], clock: Any = None) -> Arrays:
        """Returns the weights of `effective`, in the type of activations."""
        return self.layout.cast(self.effective(name, params, methods, clock))

    def effective(self, name: str, params: Arrays, methods: Mapping[str, Arrays], clock: Any = None) -> Arrays:
        """Returns what methods make of a sub-network's weights, inside a program.

        Args:
          params, methods: of the full network, see `State`.
          clock: of training, None outside.
        """
        sliced = self.layout.sliced(name, params)
        if self.methods.items:
            own = self.layout.sliced_extras(name, methods)
            sliced = self.layout.model_only(self.methods.weights(sliced, own, clock))
        return sliced

    def stand_alone(self, name: str, params: Arrays, methods: Mapping[str, Arrays]) -> Arrays:
        """Returns the effective weights of a sub-network in float32, for extraction."""
        sliced = slice_like(params, self.full, self.layout.extended(name), self.layout.shards)
        own = self.layout.sliced_extras(name, methods)
        return self.layout.model_only(self.methods.weights(sliced, own, None))

    def outputs(self, batch: Shapes) -> jax.ShapeDtypeStruct:
        """Returns the shape of the full network's outputs for a batch."""
        params, stats = dict(self.layout.model.params), dict(self.full.stats)

        def run(params: Arrays, stats: Arrays, batch: Any) -> Any:
            inputs = self.layout.cast_inputs(self.task.inputs(batch))
            return apply(self.space.full, self.layout.cast(params), stats, *inputs, mode="eval")[0]

        shape: jax.ShapeDtypeStruct = jax.eval_shape(run, params, stats, structs(batch))
        return shape

    # -- compiling ---------------------------------------------------------------------------------------------

    def get(self, program: Program) -> Any:
        """Returns a compiled program, waiting for it when needed."""
        return self.compiler.get(program)

    def prefetch(self, *programs: Program) -> None:
        """Starts compiling programs."""
        self.compiler.prefetch(*programs)

    def busy(self) -> bool:
        """Whether a program is being compiled, or is to be."""
        return self.compiler.busy()

    def compiling(self) -> str:
        """Returns a line on the program that is being compiled."""
        return self.compiler.status()

    def memory(self) -> str:
        """Returns a line on the memory of a device: what the state takes, and the largest program beside it."""
        largest, size = self.compiler.largest()
        state = sum(
            math.prod(p.shard_shape(s.shape)) * jnp.dtype(s.dtype).itemsize
            for s, p in zip(jax.tree.leaves(self.shapes), jax.tree.leaves(self.shardings), strict=True)
        )
        more = f", the {largest} program {size / 2**20:,.1f} MiB beside it" if largest else ""
        return f"memory of a device: state {state / 2**20:,.1f} MiB{more}"

    def close(self) -> None:
        self.compiler.close()


def _size(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of what an index cuts out of an array of `shape`."""
    return tuple(len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True))
