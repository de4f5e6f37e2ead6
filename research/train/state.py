"""What a checkpoint holds, and the contract of an update's programs: what each takes and gives.

An update runs a gradient program for every sub-network and microbatch, each of which adds to one buffer of gradients,
then the update program, which moves the state. Whoever runs, compiles, plans or times an update speaks of the classes
here.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int, UInt

Leaf = Any
"""An array, or in a tree that tells of arrays (where they lie, how large they are) a sharding or a shape."""
Leaves = dict[str, Leaf]
"""Leaves by the names of the arrays."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a checkpoint holds.

    Attributes:
      params: trained arrays: the model's, and of methods as METHOD/NAME.
      stats: the model's statistics.
      opt_state: of the optimizer.
      methods: method -> its own arrays that the optimizer does not move.
    """

    params: Leaves
    stats: Leaves
    opt_state: Any
    methods: dict[str, Leaves] = field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Held:
    """What gradients are made of and all programs of an update share.

    Attributes:
      params: as of `State`.
      stats: moved by the gradient programs of the full network.
      methods: as of `State`.
      brought: method -> (params, stats) of the network that it brings.
    """

    params: Leaves
    stats: Leaves
    methods: dict[str, Leaves]
    brought: dict[str, tuple[Leaves, Leaves]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Microbatch:
    """What one gradient program trains on.

    Attributes:
      batches: stream -> its arrays, in place.
      clock: [update, microbatch, turn, draw], see `hooks.Clock`.
      scale: factors of the loss and of what layers add to it.
      teacher: outputs of the full network for these examples, a 0 where nothing is learned from them.
    """

    batches: dict[str, Leaves] | Leaf
    clock: UInt[Array, " 4"] | Leaf
    scale: tuple[Float[Array, ""], Float[Array, ""]] | Leaf
    teacher: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What the gradient program of all networks of an update trains on, in place of a `Microbatch`: devices train
    different networks, each on its rows.

    Attributes:
      batch: arrays of the whole batch, in place.
      clock: of every device, as of `Microbatch`.
      place: of every device's network among those of the program.
    """

    batch: Leaves | Leaf
    clock: UInt[Array, "D 4"] | Leaf
    place: Int[Array, " D"] | Leaf


class Gradients(NamedTuple):
    """What a gradient program gives: (held, buffer of gradients, `Microbatch` or `Rows`) -> this.

    Attributes:
      grads: the buffer with this gradient added.
      stats: of the full network afterwards.
      measured: numbers of the log, see `research.train.records`; of `Rows` (those of every device, their shares).
      outputs: what others learn from, a 0 where nobody does, nothing of `Rows`.
    """

    grads: Leaves
    stats: Leaves
    measured: Any
    outputs: Any


class Updated(NamedTuple):
    """What the update program gives: the state, the buffer of gradients (zeros again), numbers of the log."""

    state: State
    grads: Leaves
    measured: dict[str, Any] | Leaf


def due(state: State, step: Any, moved: Leaves) -> tuple[State, Any, Leaves, Leaves]:
    """Returns what the update program takes beside the buffer of gradients.

    Args:
      state: before the update.
      step: index of the update.
      moved: statistics as the gradient programs left them.

    Returns:
      (the state without statistics, which are not donated, step, statistics before, moved).
    """
    return dataclasses.replace(state, stats={}), step, state.stats, moved
