"""Stacked layers: what an optimizer computes from a whole array is computed for each layer by itself."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array

from research.modules.axes import Axes, role
from research.modules.state import Arrays

STACKS = ("layers", "directions", "experts")
"""Roles of axes along which matrices lie beside one another."""


def by_layer(inner: optax.GradientTransformation, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
    """Returns `inner`, which takes norms of whole arrays, applied to each of the stacked layers by itself."""

    def over_stacks(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        for axis in axes[name]:
            if role(axis) in STACKS:
                call = jax.vmap(call)
            else:
                break  # a stack lies before the axes of its layers
        return call

    def init(params: Arrays) -> dict[str, Any]:
        return {name: over_stacks(inner.init, name)(param) for name, param in params.items()}

    def update(
        updates: Arrays, state: Mapping[str, Any], params: Arrays | None = None
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        own = params or updates
        out = {name: over_stacks(inner.update, name)(u, state[name], own[name]) for name, u in updates.items()}
        return {name: new for name, (new, _) in out.items()}, {name: kept for name, (_, kept) in out.items()}

    return optax.GradientTransformation(init, update)
