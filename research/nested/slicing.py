"""A sub-network's weights are slices of the full network's: this file takes them, from the axis names alone.

`slice_like` is differentiable, with exact zeros outside the slice, and is the identity for a full-size target.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from research.modules.axes import role
from research.modules.state import Abstract, Arrays, abstract

CUTS = {
    "image": "whole",
    "classes": "whole",
    "stem": "leading",
    "embed": "leading",
    "bottleneck": "leading",
    "mlp": "leading",
    "squeeze": "leading",
    "heads": "leading",
    "head_dim": "whole",
    "layers": "kept",
    "kernel_h": "centre",
    "kernel_w": "centre",
    "window_h": "whole",
    "window_w": "whole",
    "tokens": "whole",
    "vocab": "whole",
    "input": "whole",
    "inner": "leading",
    "state": "leading",
    "groups": "whole",
    "rank": "leading",
    "taps": "whole",
    "angles": "leading",
    "features": "leading",
    "clusters": "leading",
    "directions": "whole",
    "experts": "leading",
    "domains": "whole",
    "slots": "whole",
    "actions": "whole",
    "router": "whole",
    "observed": "whole",
    "choices": "whole",
}
"""Role -> how the sub-network is cut: leading slice, centre crop, the kept layers, or not at all."""


def axis_indices(
    name: str, full: int, small: int, full_kept: Sequence[int] | None, small_kept: Sequence[int] | None
) -> Sequence[int]:
    """Returns which of `full` indices along the axis `name` the sub-network of size `small` holds.

    Raises:
      ValueError: the role has no rule, or the sizes do not nest under it.
    """
    cut = CUTS.get(role(name))
    if cut is None:
        raise ValueError(f"axis {name!r} has no nesting rule; add its role to CUTS in research/nested/slicing.py")
    if cut == "kept" and full_kept is not None and small_kept is not None:
        missing = set(small_kept) - set(full_kept)
        if missing:
            raise ValueError(f"axis {name!r}: layers {sorted(missing)} are not in the larger network")
        return [list(full_kept).index(k) for k in small_kept]
    if small > full or (cut == "whole" and small != full):
        raise ValueError(f"axis {name!r} of size {full} cannot be cut ({cut}) to {small}")
    start = (full - small) // 2 if cut == "centre" else 0
    return range(start, start + small)


def _take(x: Array, axis: int, indices: Sequence[int]) -> Array:
    """Static indexing by slices, whose transpose is a pad and not a scatter."""
    indices = list(indices)
    if indices == list(range(x.shape[axis])):
        return x
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if step > 0 and indices == list(range(indices[0], indices[-1] + 1, step)):
        return jax.lax.slice_in_dim(x, indices[0], indices[-1] + 1, step, axis)
    return jnp.concatenate([jax.lax.slice_in_dim(x, i, i + 1, 1, axis) for i in indices], axis)


def slice_like(
    arrays: Mapping[str, Array], full: Abstract, small: Abstract, shards: Mapping[str, int] | None = None
) -> Arrays:
    """Cuts the arrays of a full network to those of a sub-network.

    Args:
      arrays: params or stats of the full network, or anything shaped like them (gradients, moments).
      full: abstract state of the full network.
      small: abstract state of the smaller one.
      shards: role -> number of equal parts from each of which the leading slice is taken, so that an axis that is
        sharded that many ways is cut without moving weights between devices. Part of the network's definition:
        train and extract with the same value. Sizes that it does not divide are cut as one part.

    Returns:
      The arrays of `arrays` that the smaller network has, cut.

    Raises:
      ValueError: the networks do not nest.
    """
    targets = {**small.params, **small.stats}
    out = {}
    for name, target in targets.items():
        if name not in full.axes:
            raise ValueError(f"{name} is in the smaller network but not in the larger one")
        if name in arrays:
            out[name] = _cut(arrays[name], full.axes[name], target.shape, full, small, shards or {})
    return out


def _cut(
    x: Array, axes: Sequence[str], shape: Sequence[int], full: Abstract, small: Abstract, shards: Mapping[str, int]
) -> Array:
    for i, (name, size) in enumerate(zip(axes, shape, strict=True)):
        parts = shards.get(role(name), 1)
        if cut_in_parts(name, x.shape[i], size, parts):
            before, after = x.shape[:i], x.shape[i + 1 :]
            x = x.reshape(*before, parts, x.shape[i] // parts, *after)
            x = jax.lax.slice_in_dim(x, 0, size // parts, 1, i + 1).reshape(*before, size, *after)
        else:
            x = _take(x, i, axis_indices(name, x.shape[i], size, full.kept.get(name), small.kept.get(name)))
    return x


def check_nests(full: Abstract, small: Abstract) -> None:
    """Raises ValueError unless every array of `small` is a slice of one of `full`."""
    for name, target in {**small.params, **small.stats}.items():
        if name not in full.axes:
            raise ValueError(f"{name} is in the smaller network but not in the larger one")
        shape = {**full.params, **full.stats}[name].shape
        for axis, before, after in zip(full.axes[name], shape, target.shape, strict=True):
            axis_indices(axis, before, after, full.kept.get(axis), small.kept.get(axis))


def cut_in_parts(axis: str, full: int, small: int, parts: int) -> bool:
    """Whether `slice_like` cuts an axis in each of its parts, so that none of them needs anything of another."""
    return parts > 1 and CUTS[role(axis)] == "leading" and full % parts == small % parts == 0 and small < full


def extract(
    full_config: Any, small_config: Any, params: Arrays, stats: Arrays, shards: Mapping[str, int] | None = None
) -> tuple[Arrays, Arrays]:
    """Returns (params, stats) of the stand-alone smaller network, independent copies."""
    full, small = abstract(full_config), abstract(small_config)

    def copied(arrays: Arrays) -> Arrays:
        return {k: jnp.array(v) for k, v in slice_like(arrays, full, small, shards).items()}

    return copied(params), copied(stats)
