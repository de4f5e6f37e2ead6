"""The names of the mesh's axes, and layers that run part of themselves on each device's own tokens.

XLA's partitioner would gather what a sort, a search, a convolution's gradient or a loop over experts reads. A program
that is traced under a mesh (`jax.set_mesh`) runs such a part under `jax.shard_map` instead; without a mesh it is called
as it is.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from research.modules.axes import role
from research.modules.state import merge, split

MESH_AXES = ("data", "fsdp", "tensor", "expert", "context")
BATCH_AXES = ("data", "fsdp", "expert")
TENSOR_AXIS, EXPERT_AXIS, CONTEXT_AXIS = "tensor", "expert", "context"
TENSOR_ROLES = ("mlp", "heads", "bottleneck", "inner", "classes", "vocab")
"""Roles of axes that are cut over `tensor`, in order of preference."""


def own_sizes(names: tuple[str, ...]) -> dict[str, int]:
    """Returns axis -> devices along it, of the mesh that the program is traced under; 1 without a mesh and where the
    code is a device's own."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: 1 if mesh.empty or name in mesh.manual_axes else mesh.shape.get(name, 1) for name in names}


def own_size(name: str) -> int:
    """Returns how many devices an axis of the mesh has, as `own_sizes` tells it."""
    return own_sizes((name,))[name]


def laid_out(x: Any, *spec: Any) -> Any:
    """Returns x with this layout, one entry an axis as in `PartitionSpec`, where the program is traced for several
    devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def by_rows(x: Any) -> Any:
    """Returns x with its first axis over the batch axes of the mesh, which a parameter that was put beside it may have
    changed."""
    names = batch_axes_of(x)
    return laid_out(x, names, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)) if names else x


def tensor_axis(axes: Sequence[str], shape: Sequence[int], parts: int) -> int | None:
    """Returns which axis of an array the rules cut over the mesh axis `tensor` of `parts` devices: the last one of the
    first role that fits."""
    for wanted in TENSOR_ROLES:
        if fits := [i for i, name in enumerate(axes) if role(name) == wanted and shape[i] % parts == 0]:
            return fits[-1]
    return None


def input_of(kernel: Any, x: Any) -> Any:
    """Returns the input of a layer as the layout of its kernel [..., in, out] wants it: features whole where the
    outputs are cut over `tensor`.

    Left to itself the partitioner cuts such a product in other ways, and moves results and gradients to where they
    belong.
    """
    parts = own_size(TENSOR_AXIS)
    shape = kernel[...].shape
    if parts == 1 or tensor_axis(kernel.axes[-len(shape) :], shape, parts) != len(shape) - 1:
        return x
    return whole_features(x)


def whole_features(x: Any) -> Any:
    """Returns x with its last axis whole on every device, the others as the partitioner has them."""
    return laid_out(x, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1), None)


def batch_axes_of(*arrays: Any) -> tuple[str, ...]:
    """Returns the mesh axes over which the first axis of these arrays is sharded; none without a mesh, or where it
    does not divide."""
    sizes = own_sizes(BATCH_AXES)
    devices = math.prod(sizes.values())
    divides = all(array.shape[0] % devices == 0 for array in jax.tree.leaves(arrays))
    return tuple(name for name, size in sizes.items() if size > 1) if divides else ()


def on_local_shard(function: Callable[..., Any], rows: Any, whole: Any = (), results: Any = True) -> Any:
    """Calls `function(rows, whole, axes)` with each device's share of `rows`.

    Args:
      function: `axes` are the names of the mesh axes over which it must sum what all rows take part in, none where it
        sees all.
      rows: tree of arrays, cut along their first axis over the batch axes of the mesh. Other axes of the mesh are left
        to the partitioner.
      whole: tree of arrays that every device has whole, e.g. weights; their gradients are summed over the devices.
      results: tree prefix of what the function returns: True where the first axis is that of rows, False where all
        devices have the same.

    Returns:
      What the function returns, of all rows.
    """
    names = batch_axes_of(rows)
    if not names:
        return function(rows, whole, ())
    run = jax.shard_map(
        lambda rows, whole: function(rows, whole, names),
        in_specs=(PartitionSpec(names), PartitionSpec()),
        out_specs=jax.tree.map(lambda cut: PartitionSpec(names if cut else None), results),
        axis_names=set(names),
        check_vma=False,
    )
    return run(rows, whole)


def module_on_local_shard(module: Any, x: Any) -> Any:
    """Returns `module(x)`, each device on its local shard of the batch; for modules whose rows have nothing to do with
    each other and that keep no statistics."""
    if not batch_axes_of(x):
        return module(x)
    graphdef, params, _, _ = split(module)
    return on_local_shard(lambda x, params, _: merge(graphdef, params, {})(x), x, params)


def on_local_tokens(function: Callable[..., Any], tokens: tuple[Any, ...], experts: Any) -> Any:
    """Calls `function(tokens, experts, axis)` with each device's share of both.

    Args:
      function: of the arrays of `tokens`, whose first axis is cut along the batch axes of the mesh, as are its results,
        and of the tree `experts`, whose arrays are cut along their first axis over the mesh axis of experts; `axis` is
        the name of that, or None where one device holds all experts. Other axes of the mesh are left to the
        partitioner.
      tokens: arrays.
      experts: tree of arrays.

    Returns:
      What the function returns, of all tokens. Without a mesh, or where the tokens do not divide, the function sees all
      of both.
    """
    names = batch_axes_of(tokens)
    if not names:
        return function(tokens, experts, None)
    axis = EXPERT_AXIS if EXPERT_AXIS in names else None
    run = jax.shard_map(
        lambda tokens, experts: function(tokens, experts, axis),
        in_specs=(PartitionSpec(names), PartitionSpec(axis)),
        out_specs=PartitionSpec(names),
        axis_names=set(names),
        check_vma=False,
    )
    return run(tokens, experts)
