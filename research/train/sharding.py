"""Where arrays live: a named mesh from the config, a layout from the axis names.

Ordered rules go from role to mesh axis; the first that divides the axis wins, each mesh axis is used once per
array, small arrays are replicated. Meshes have Auto axis types: the compiler inserts the collectives.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from research.errors import UserError
from research.modules.axes import Axes, role
from research.modules.mesh import MESH_AXES, TENSOR_AXIS, TENSOR_ROLES, laid_out
from research.modules.state import Abstract
from research.nested.slicing import cut_in_parts

RULES: tuple[tuple[str, str | None], ...] = (
    ("experts", "expert"),
    *((role, TENSOR_AXIS) for role in TENSOR_ROLES),
    ("embed", "fsdp"),
    ("mlp", "fsdp"),
    ("bottleneck", "fsdp"),
    ("inner", "fsdp"),
    ("squeeze", None),
    ("stem", None),
    ("head_dim", None),
    ("image", None),
    ("layers", None),
    ("kernel_h", None),
    ("kernel_w", None),
    ("window_h", None),
    ("window_w", None),
    ("tokens", None),
    ("input", None),
    ("state", None),
    ("groups", None),
    ("rank", None),
    ("taps", None),
    ("angles", None),
    ("features", None),
    ("clusters", None),
    ("directions", None),
    ("domains", None),
    ("slots", None),
    ("actions", None),
    ("router", None),
    ("observed", None),
    ("choices", None),
)
"""Role -> mesh axis, in order of preference; None replicates. A role without a rule is an error."""

MIN_SIZE = 2**14
"""Arrays of fewer elements are replicated: a collective would cost more than they do."""


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None, across: str = "data") -> Mesh:
    """Builds the mesh; one of the sizes may be -1 (what remains). One device is a mesh of ones.

    Args:
      sizes: axis -> devices along it; 1 where it is left out.
      devices: by default all of the run's.
      across: the axis that goes from slice to slice where there are several, over the slow network.

    Raises:
      UserError: unknown axis, sizes that do not multiply to the number of devices, or slices that do not divide
        `across`.
    """
    devices = list(jax.devices() if devices is None else devices)
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise UserError(f"unknown mesh axis {unknown[0]!r}; valid: {', '.join(MESH_AXES)}")
    shape = [int(sizes.get(name, 1)) for name in MESH_AXES]
    for name, size in zip(MESH_AXES, shape, strict=True):
        if size < 1 and size != -1:
            raise UserError(f"mesh.{name}={size}; valid: whole numbers from 1, or -1 for what remains")
    fixed = math.prod(s for s in shape if s != -1)
    wanted = " x ".join(f"{n}={s}" for n, s in zip(MESH_AXES, shape, strict=True) if s != 1) or "1"
    shape = [len(devices) // fixed if s == -1 else s for s in shape]
    if math.prod(shape) != len(devices) or min(shape) < 1:
        raise UserError(
            f"mesh {wanted} does not fit {len(devices)} devices; the sizes must multiply to it (one may be -1)"
        )
    return Mesh(arrange(devices, shape, across), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arrange(devices: Sequence[Any], shape: Sequence[int], across: str = "data") -> np.ndarray:
    """Returns the devices in the shape of a mesh: near ones along every axis but `across`, whose outer part counts the
    slices.

    On TPUs JAX lays axes along the links of the chips; elsewhere the devices come in their order.

    Raises:
      UserError: `across` is no axis, or the slices do not divide it.
    """
    from jax.experimental import mesh_utils

    if across not in MESH_AXES:
        raise UserError(f"mesh.across={across!r}; valid: {', '.join(MESH_AXES)}")
    slices, place = len({getattr(d, "slice_index", 0) for d in devices}), MESH_AXES.index(across)
    if slices > 1:
        if shape[place] % slices:
            raise UserError(
                f"mesh.{across}={shape[place]} does not divide over {slices} slices; choose a multiple, or another "
                "mesh.across"
            )
        outer = [slices if i == place else 1 for i in range(len(shape))]
        inner = [size // many for size, many in zip(shape, outer, strict=True)]
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.array(devices).reshape(shape)


def partition_spec(
    axes: Axes, shape: Sequence[int], mesh: Mesh, min_size: int = MIN_SIZE
) -> tuple[PartitionSpec, list[str]]:
    """Returns the layout of one array and the rules that were wanted but could not be applied.

    Raises:
      ValueError: an axis has no rule.
    """
    assigned: list[str | None] = [None] * len(shape)
    refused: list[str] = []
    known = {r for r, _ in RULES}
    for name in axes:
        if role(name) not in known:
            raise ValueError(f"axis {name!r} has no sharding rule; add its role to RULES in research/train/sharding.py")
    if math.prod(shape) < min_size:
        return PartitionSpec(), refused
    for wanted, mesh_axis in RULES:
        if mesh_axis is None or mesh.shape[mesh_axis] == 1 or mesh_axis in assigned:
            continue
        places = [i for i, name in enumerate(axes) if role(name) == wanted and assigned[i] is None]
        fits = [i for i in places if shape[i] % mesh.shape[mesh_axis] == 0]
        if fits:
            assigned[fits[-1]] = mesh_axis
        elif places:
            refused.append(f"{axes[places[-1]]}={shape[places[-1]]} over {mesh_axis}={mesh.shape[mesh_axis]}")
    while assigned and assigned[-1] is None:
        assigned.pop()
    return PartitionSpec(*assigned), refused


def layout(
    axes: Mapping[str, Axes], shapes: Mapping[str, Any], mesh: Mesh, min_size: int = MIN_SIZE
) -> tuple[dict[str, NamedSharding], dict[str, list[str]]]:
    """Returns (array -> sharding, array -> rules that did not divide)."""
    shardings, refused = {}, {}
    for name, shape in shapes.items():
        spec, missed = partition_spec(axes[name], shape.shape, mesh, min_size)
        shardings[name] = NamedSharding(mesh, spec)
        if missed:
            refused[name] = missed
    return shardings, refused


def like_params(tree: Any, shapes: Mapping[str, Any], shardings: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Returns shardings for a tree (an optimizer state) whose leaves under a parameter's name follow the parameter."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def choose(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for entry in reversed(path):
            name: Any = entry.key if isinstance(entry, jax.tree_util.DictKey) else None
            if name in shardings and shapes[name].shape == leaf.shape:
                return shardings[name]
        return replicated

    return jax.tree_util.tree_map_with_path(choose, tree)


def whole_where_cut(
    arrays: Mapping[str, Any],
    shardings: Mapping[str, NamedSharding],
    full: Abstract,
    small: Abstract,
    shards: Mapping[str, int],
) -> dict[str, Any]:
    """Gathers, inside a program, the axes of weights along which a smaller network is about to be cut from them.

    A slice of a sharded axis would move weights from device to device; a whole axis is cut where it is. Axes that are
    cut in as many parts as they have shards need nothing, see `research.nested.slicing.slice_like`.
    """
    targets, out = {**small.params, **small.stats}, dict(arrays)
    for name, x in arrays.items():
        spec = shardings[name].spec
        if name not in targets or not any(spec):
            continue
        axes, shape, sizes = full.axes[name], targets[name].shape, shardings[name].mesh.shape

        def stays(
            i: int,
            where: str,
            axes: Axes = axes,
            shape: tuple[int, ...] = shape,
            x: Any = x,
            sizes: Mapping[str, int] = sizes,
        ) -> bool:
            parts = shards.get(role(axes[i]), 1)
            return shape[i] == x.shape[i] or (
                parts % sizes[where] == 0 and cut_in_parts(axes[i], x.shape[i], shape[i], parts)
            )

        wanted = [where if where is None or stays(i, where) else None for i, where in enumerate(spec)]
        if wanted != list(spec):
            out[name] = laid_out(x, *wanted)
    return out


def dump(shardings: Mapping[str, NamedSharding]) -> dict[str, str]:
    """Returns array -> layout as text, for humans and for comparison with a stored file."""
    return {name: str(tuple(s.spec)) for name, s in sorted(shardings.items())}


def device_bytes(shapes: Any, shardings: Any) -> int:
    """Returns the bytes of one device's part of arrays."""
    sizes = jax.tree.map(lambda s, p: math.prod(p.shard_shape(s.shape)) * np.dtype(s.dtype).itemsize, shapes, shardings)
    return sum(jax.tree.leaves(sizes))
