"""What of a state its checkpoint holds: all but the statistics that are zero between updates, and the optimizer's state
only for training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from research.modules.state import Abstract
from research.train.restore import OPTIMIZER, Wanted
from research.train.state import State

FORMER: Mapping[tuple[str, ...], tuple[str, ...]] = {("methods", "ema"): ("ema",)}
"""Branch -> where runs of earlier versions hold it."""


def kept(state: State, full: Abstract) -> State:
    """Returns a state, or the shapes of one, without the sums over an update.

    Args:
      state: between updates.
      full: of its network.
    """
    names = full.kept_stats()
    return dataclasses.replace(state, stats={k: v for k, v in state.stats.items() if k in names})


def wanted(shapes: State, shardings: State, full: Abstract, *, optimizer: bool) -> Wanted:
    """Returns what a checkpoint is asked for.

    Args:
      shapes, shardings: of a whole state.
      full: of its network.
      optimizer: whether the optimizer's state is among it.
    """
    others: set[tuple[str, ...]] = {("stats", k) for k in full.stats.keys() - full.kept_stats().keys()}
    others |= set() if optimizer else {(OPTIMIZER,)}

    def branches(state: State) -> dict[str, Any]:
        own = kept(state, full)
        held: dict[str, Any] = {"params": dict(own.params), "stats": dict(own.stats)}
        held |= {"methods": {k: dict(v) for k, v in own.methods.items()}} if own.methods else {}
        return held | ({OPTIMIZER: own.opt_state} if optimizer else {})

    return Wanted(branches(shapes), branches(shardings), frozenset(others), FORMER)


def whole(found: Mapping[str, Any], full: Abstract, shardings: Mapping[str, Any]) -> State:
    """Returns the state that a checkpoint holds, its sums over an update zero; without an optimizer's state where none
    was asked for.

    Args:
      found: what was restored.
      full: of its network.
      shardings: of all its statistics.
    """

    def zeros(name: str) -> jax.Array:
        shape = full.stats[name]
        return jax.make_array_from_callback(
            shape.shape, shardings[name], lambda index: np.zeros(shape.shape, shape.dtype)[index]
        )

    stats = {k: found["stats"][k] if k in found["stats"] else zeros(k) for k in full.stats}
    return State(found["params"], stats, found.get(OPTIMIZER), found.get("methods", {}))
