"""What sub-networks cost: nominal FLOPs, parameters, latency and memory of the form that runs at inference."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from research.modules.state import Arrays, abstract, apply
from research.report import flops as flop_counter
from research.report import timing

_Arrays = Mapping[str, Array | np.ndarray]
"""Of a network, on a device or on the host."""


def input_dtype(config: Any) -> jnp.dtype:
    """The dtype of the model's input: float32 for images and vectors, int32 for tokens."""
    return jnp.dtype("float32" if len(config.input_shape()) > 1 else "int32")


@functools.lru_cache(maxsize=1024)
def forward_flops(config: Any) -> int:
    """FLOPs of one example's forward pass, a multiply-add counted as two, over the naive implementations of the ops.

    Where examples compete for places in groups (mixtures of experts), it is the mean over the examples of a group.
    """
    config, count = config.counted()
    shapes = abstract(config)
    image = jax.ShapeDtypeStruct((count, *config.input_shape()), input_dtype(config))
    run = lambda p, s, x: apply(config, p, s, x, mode="eval")[0]
    flops: int = flop_counter.count_flops(run, dict(shapes.params), dict(shapes.stats), image) // count
    return flops


def training_flops(config: Any) -> int:
    """FLOPs of one example's training step: three times the forward pass of the training form."""
    return 3 * forward_flops(config)


def static_costs(config: Any) -> dict[str, int]:
    """Returns {"params", "flops"} of the inference implementation, without arrays; "active_params" of mixtures, "state"
    of models that continue token by token."""
    small = config.deployed()
    costs = {"params": abstract(small).num_params(), "flops": forward_flops(small)}
    active: int = small.active_params()
    costs |= {"active_params": active} if active < costs["params"] else {}
    return costs | ({"state": state_size(small)} if small.streams else {})


def state_size(config: Any) -> int:
    """Returns how many numbers a sequence model remembers of one sequence of its length, over all layers."""
    state = jax.eval_shape(
        lambda p, s: apply(config, p, s, 1, config.length, method="init_state")[0], *arrays_of(config)
    )
    return sum(int(leaf.size) for leaf in jax.tree.leaves(state["layers"]))


def arrays_of(config: Any) -> tuple[Any, Any]:
    """Returns the shapes of (params, stats)."""
    shapes = abstract(config)
    return dict(shapes.params), dict(shapes.stats)


def _compile(config: Any, params: Arrays, stats: Arrays, *, batch: int) -> tuple[Any, Any]:
    image = jnp.zeros((batch, *config.input_shape()), input_dtype(config))
    if jax.default_backend() == "cpu":
        config = config.on_cpu()
    run = jax.jit(lambda p, s, x: apply(config, p, s, x, mode="eval")[0])
    program = run.lower(params, stats, image).compile()
    return program, functools.partial(program, params, stats, image)


def measured_costs(
    models: Mapping[str, tuple[Any, _Arrays, _Arrays]], batches: Sequence[int], repeats: int = 20
) -> dict[str, dict[str, float | None]]:
    """Measures latency and memory on this machine, all models interleaved.

    Args:
      models: name -> (config, params, stats) of stand-alone networks; merged here where they can be.
      batches: batch sizes; the first gives `latency_ms`, another size n gives `latency_ms_n`.
      repeats: timed calls per model and batch size.

    Returns:
      name -> {"latency_ms", "latency_ms_32", ..., "peak_memory_bytes" (largest batch; None where the backend does
        not tell)}.
    """
    ready = {name: config.merge(params, stats) for name, (config, params, stats) in models.items()}
    jobs = [(name, batch) for batch in batches for name in ready]
    compiled = {(name, batch): _compile(*ready[name], batch=batch) for name, batch in jobs}
    out: dict[str, dict[str, float | None]] = {name: {} for name in ready}
    for batch in batches:
        stats = timing.latency({name: compiled[name, batch][1] for name in ready}, repeats=repeats)
        key = "latency_ms" if batch == batches[0] else f"latency_ms_{batch}"
        for name in ready:
            out[name][key] = stats[name]["median_ms"]
    for name in ready:
        out[name]["peak_memory_bytes"] = timing.memory(compiled[name, max(batches)][0])
    return out
