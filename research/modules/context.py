"""Sequences cut over the mesh axis `context`: every device holds a shard of every sequence.

Mixers that remember the past in a state hand it on: device i takes a part of the batch once device i - 1 has passed its
state for that part, so that all devices work after i steps (a pipeline over parts of the batch). Mixers that read all
tokens gather what they read. Everything else of a network is token by token, and left to XLA's partitioner.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from research.modules.mesh import CONTEXT_AXIS, batch_axes_of, own_size
from research.modules.mixers.base import Call, Gathers
from research.modules.state import merge, split


def mix(mixer: Any, x: Float[Array, "B T D"], call: Call, carries: bool) -> Float[Array, "B T D"]:
    """Returns `mixer(x, call)[0]` from the start of the sequences, each device of the mesh on its local shard of the
    batch and its sequence shard of it.

    Args:
      mixer: of one layer.
      x: whole sequences.
      call: as for the mixer.
      carries: whether its state is all that later tokens need of earlier ones, see `research.modules.mixers.base.Spec`.

    Without a mesh, where neither rows nor tokens divide over it, or where the mixer keeps statistics of all tokens, it
    sees whole sequences.
    """
    batch, devices = batch_axes_of(x), own_size(CONTEXT_AXIS)
    cut = devices > 1 and x.shape[1] % devices == 0 and carries
    graphdef, params, stats, _ = split(mixer)
    if stats or not (batch or cut):
        return mixer(x, call, None)[0]
    tokens = PartitionSpec(batch or None, CONTEXT_AXIS if cut else None)
    operands = (params, x, *(() if call.segment_ids is None else (call.segment_ids,)))

    def own_part(params, x, *ids):
        own, here = merge(graphdef, params, {}), replace(call, segment_ids=ids[0] if ids else None)
        if not cut:
            return own(x, here, None)[0]
        here = replace(here, position=lax.axis_index(CONTEXT_AXIS) * x.shape[1])
        return own.gathered(x, here, CONTEXT_AXIS) if isinstance(own, Gathers) else _passed_on(own, x, here, devices)

    run = jax.shard_map(
        own_part,
        in_specs=(PartitionSpec(), *([tokens] * (len(operands) - 1))),
        out_specs=tokens,
        axis_names={*batch, *((CONTEXT_AXIS,) if cut else ())},
        check_vma=False,
    )
    return run(*operands)


def _passed_on(mixer: Any, x: Float[Array, "B T D"], call: Call, devices: int) -> Float[Array, "B T D"]:
    """The pipeline: at step t device i works on part t - i, with the state that device i - 1 had after that part.

    A row whose sequence shard begins another document than the one before ended with starts afresh.
    """
    size, length, dim = x.shape
    parts = max(n for n in range(1, min(2 * devices, size) + 1) if size % n == 0)
    index = lax.axis_index(CONTEXT_AXIS)
    cut = lambda a: None if a is None else a.reshape(parts, size // parts, *a.shape[1:])
    pieces, ids = cut(x), cut(call.segment_ids)
    start = mixer.init_state(size // parts, devices * length, x.dtype)
    to_the_right = [(i, i + 1) for i in range(devices - 1)]

    def step(carry, t):
        state, last = carry
        part = jnp.clip(t - index, 0, parts - 1)
        take = lambda a: None if a is None else lax.dynamic_index_in_dim(a, part, keepdims=False)
        own_ids = take(ids)
        fresh = jnp.full((size // parts,), index == 0) if own_ids is None else (index == 0) | (own_ids[:, 0] != last)
        mine = jax.tree.map(
            lambda new, old: jnp.where(fresh.reshape(-1, *(1,) * (old.ndim - 1)), new, old), start, state
        )
        y, after = mixer(take(pieces), replace(call, segment_ids=own_ids), mine)
        after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, start)
        ended = last if own_ids is None else own_ids[:, -1]
        return jax.tree.map(lambda a: lax.ppermute(a, CONTEXT_AXIS, to_the_right), (after, ended)), y

    carry = start, jnp.zeros((size // parts,), jnp.int32 if ids is None else ids.dtype)
    _, ys = lax.scan(step, carry, jnp.arange(parts + devices - 1))
    return lax.dynamic_slice_in_dim(ys, index, parts, 0).reshape(size, length, dim)
