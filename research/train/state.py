"""What a checkpoint holds, and the program that moves it: gradients in, parameters, statistics, optimizer state and EMA
out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from research.modules.axes import Axes, StatKind, role
from research.modules.state import Arrays, abstract, after_update


@jax.tree_util.register_dataclass
@dataclass
class State:
    """What a checkpoint holds: params, running statistics, optimizer state and the EMA of the params (or None)."""

    params: Arrays
    stats: Arrays
    opt_state: Any
    ema: Arrays | None


def update_program(
    config: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    train: Mapping[str, Any],
    phase: str,
    phases: int,
) -> Callable:
    """Returns program(state, grads, step, before, moved) -> (state, zeros, metrics), traced by the caller.

    `state` comes without statistics, which are not donated: `before` are those before the update, `moved` those that
    its gradient programs left. Under train.nan=skip an update whose gradient or statistics are not finite changes
    nothing at all.

    Args:
      config: of the full network.
      optimizer, schedule: of the run.
      train: the config's section.
      phase: of the update, "" where there is only one.
      phases: how many there are.
    """
    decay, skip = train["ema"], train["nan"] == "skip"
    more, shapes = {"phase": phase} if phase else {}, abstract(config)
    lasting = shapes.stats_of(StatKind.MOMENT, StatKind.SUM, StatKind.STATE)

    def program(state: State, grads: Arrays, step: Array, before: Arrays, moved: Arrays):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **more)
        params = {**state.params, **optax.apply_updates({k: state.params[k] for k in updates}, updates)}
        ema = state.ema
        if decay:
            rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
            ema = jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, ema, params)
        norm = optax.global_norm(grads)
        new = State(params, after_update(config, state.params, moved), opt_state, ema)
        finite = jnp.isfinite(norm)
        if skip:
            for name in lasting:
                finite &= jnp.isfinite(moved[name]).all()
            new = jax.tree.map(
                lambda a, b: jnp.where(finite, a, b), new, State(state.params, before, state.opt_state, state.ema)
            )
        metrics = {"grad_norm": norm, "lr": schedule(step // phases), "finite": finite}
        if train["norms"]:
            metrics["norms"] = {f"grad/{k}": v for k, v in _norms(grads, shapes.axes).items()}
            metrics["norms"] |= {f"param/{k}": v for k, v in _norms(new.params, shapes.axes).items()}
        return new, jax.tree.map(jnp.zeros_like, grads), metrics

    return program


def _norms(arrays: Arrays, axes: Mapping[str, Axes]) -> dict[str, Array]:
    """Returns the norm of all arrays whose axes have the same roles, by these, e.g. "embed*mlp"."""
    groups: dict[str, list[Array]] = {}
    for name, array in arrays.items():
        groups.setdefault("*".join(role(axis) for axis in axes[name]) or "scalar", []).append(array)
    return {roles: optax.global_norm(group) for roles, group in groups.items()}
