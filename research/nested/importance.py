"""Importance sorting: permute coupled channels, most important first, so that leading slices keep what counts.

Importance is the L1 norm of the weights that read a channel, as in Once-for-All (arXiv 1908.09791, section 3.3), or of
those that write it where none reads it (the state of a state space); all arrays that share the axis name are permuted
alike, so the network's function does not change.
"""

import functools
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from research.modules.axes import layer_stack, role
from research.modules.state import Abstract, Arrays
from research.nested.slicing import CUTS


def coupled_groups(shapes: Abstract) -> dict[str, list[tuple[str, int]]]:
    """Returns axis name -> [(array, axis position)] for every name that is cut by a leading slice and may be sorted.

    Not so are states that turn in pairs (with `angles` in the same scope), where neighbours belong together, and axes
    of statistics alone, such as drawn projections.
    """
    groups: dict[str, list[tuple[str, int]]] = {}
    for array, axes in shapes.axes.items():
        for i, name in enumerate(axes):
            if CUTS[role(name)] == "leading":
                groups.setdefault(name, []).append((array, i))
    turning = {
        name.removesuffix("angles") + r for name in groups if role(name) == "angles" for r in ("state", "angles")
    }
    trained = {name for name, members in groups.items() if any(array in shapes.params for array, _ in members)}
    return {name: members for name, members in groups.items() if name in trained - turning}


def channel_importance(params: Arrays, shapes: Abstract, name: str) -> Array:
    """Returns the L1 norm of the weights that read each index of the axis `name`: [n], or [layers, n] per layer."""
    stack = layer_stack(name)
    members = [(array, axis) for array, axis in coupled_groups(shapes)[name] if array in params]
    readers = [(array, axis) for array, axis in members if axis < len(shapes.axes[array]) - 1]
    sums = []
    for array, axis in readers or members:
        x = jnp.moveaxis(jnp.abs(params[array]), axis, -1)
        keep = 1 if stack is not None else 0
        sums.append(x.sum(tuple(range(keep, x.ndim - 1))))
    return functools.reduce(jnp.add, sums)


def sort_by_importance(params: Arrays, stats: Arrays, shapes: Abstract) -> tuple[Arrays, Arrays]:
    """Returns (params, stats) with every leading-cut axis in descending importance; the function is preserved."""
    arrays: dict[str, Array] = {**params, **stats}
    for name, members in coupled_groups(shapes).items():
        importance = channel_importance(params, shapes, name)
        order = jnp.argsort(-importance, axis=-1, stable=True)
        for array, axis in members:
            arrays[array] = _permute(arrays[array], axis, order)
    return _like(params, arrays), _like(stats, arrays)


def _permute(x: Array, axis: int, order: Array) -> Array:
    if order.ndim == 1:
        return jnp.take(x, order, axis=axis)
    moved = jnp.moveaxis(x, axis, 1)
    index = order.reshape(order.shape + (1,) * (moved.ndim - 2))
    return jnp.moveaxis(jnp.take_along_axis(moved, index, axis=1), 1, axis)


def _like(template: Mapping[str, Array], arrays: Mapping[str, Array]) -> Arrays:
    return {name: arrays[name] for name in template}
