"""The names of the mesh's axes, and layers that run part of themselves on each device's own tokens.

XLA's partitioner would gather what a sort, a search or a loop over experts reads. A program that is traced under a mesh
(`jax.set_mesh`) runs such a part under `jax.shard_map` instead; without a mesh it is called as it is.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "expert", "context")
BATCH_AXES = ("data", "fsdp", "expert")
EXPERT_AXIS, CONTEXT_AXIS = "expert", "context"


def own_sizes(names: tuple[str, ...]) -> dict[str, int]:
    """Returns axis -> devices along it, of the mesh that the program is traced under; 1 without a mesh and where the code is a device's own."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: 1 if mesh.empty or name in mesh.manual_axes else mesh.shape.get(name, 1) for name in names}


def on_own_tokens(function: Callable[..., Any], tokens: tuple[Any, ...], experts: Any) -> Any:
    """Calls `function(tokens, experts, axis)` with each device's share of both.

    Args:
      function: of the arrays of `tokens`, whose first axis is cut along the batch axes of the mesh, as are its results, and of the
        tree `experts`, whose arrays are cut along their first axis over the mesh axis of experts; `axis` is the name of that, or None
        where one device holds all experts. Other axes of the mesh are left to the partitioner.
      tokens: arrays.
      experts: tree of arrays.

    Returns:
      What the function returns, of all tokens. Without a mesh, or where the tokens do not divide, the function sees all of both.
    """
    sizes = own_sizes(BATCH_AXES)
    devices = math.prod(sizes.values())
    leading = {array.shape[0] for array in jax.tree.leaves(tokens)}
    if devices == 1 or any(size % devices for size in leading):
        return function(tokens, experts, None)
    axis = EXPERT_AXIS if sizes[EXPERT_AXIS] > 1 else None
    names = tuple(name for name, size in sizes.items() if size > 1)
    run = jax.shard_map(
        lambda tokens, experts: function(tokens, experts, axis),
        in_specs=(PartitionSpec(names), PartitionSpec(axis)),
        out_specs=PartitionSpec(names),
        axis_names=set(names),
        check_vma=False,
    )
    return run(tokens, experts)
