"""Where the arrays of a run lie and what its networks are made of: mesh, shardings, slices, types of activations."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from research.modules.axes import Axes
from research.modules.mesh import BATCH_AXES
from research.modules.state import Abstract, Arrays, abstract
from research.nested.slicing import slice_like
from research.nested.space import Space
from research.train import sharding
from research.train.hooks import Extra
from research.train.methods import extended, shapes_in
from research.train.processes import batch_share

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
Shapes = tuple[tuple[str, tuple[int, ...], str], ...]
"""(name, shape, type) of each array of a batch."""


def shapes_of(batch: Mapping[str, Any]) -> Shapes:
    """Returns the shapes of a batch, hashable; what nothing computes with is left out."""
    return tuple(
        sorted(
            (k, tuple(v.shape), str(jax.dtypes.canonicalize_dtype(v.dtype))) for k, v in batch.items() if k != "index"
        )
    )


def structs(shapes: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
    """The inverse of `shapes_of`."""
    return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, shape, dtype in shapes}


class Layout:
    """The networks of a space over a mesh.

    Args:
      space: of the run.
      extras: arrays that methods add.
      precision: of activations, a key of DTYPES.
      tensor_shards: parts from each of which a leading slice is taken.
      min_size: entries of the smallest array that is laid over devices.

    Attributes:
      full: of the full network and what methods train.
      params, stats, extras: sharding of each array; of extras by method and name.
      share: (index, count), which part of every batch this process holds.
      refused: array -> rules of sharding that could not be applied.
    """

    def __init__(
        self,
        space: Space,
        mesh: Mesh,
        extras: Mapping[str, Mapping[str, Extra]],
        *,
        precision: str,
        tensor_shards: int,
        min_size: int,
    ):
        self.space, self.mesh, self.dtype = space, mesh, DTYPES[precision]
        self.added = extras
        self.model: Abstract = abstract(space.full)
        self.full: Abstract = extended(self.model, self.model, extras)
        self.on_cpu = all(d.platform == "cpu" for d in mesh.devices.flat)
        self.share = batch_share(mesh)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.batch = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        laid, self.refused = sharding.layout(self.full.axes, {**self.full.params, **self.full.stats}, mesh, min_size)
        self.params = {k: laid[k] for k in self.full.params}
        self.stats = {k: laid[k] for k in self.full.stats}
        self.moved = {m: {k: e for k, e in own.items() if e.kind is None} for m, own in extras.items()}
        self.moved = {method: own for method, own in self.moved.items() if own}
        self.extras = {
            method: sharding.layout({k: e.axes for k, e in own.items()}, own, mesh, min_size)[0]
            for method, own in self.moved.items()
        }
        self.shards = {r: int(tensor_shards) for r in ("mlp", "heads", "bottleneck")}
        self._canonical = {}
        for name, config in space.configs.items():
            self._canonical[name] = next((n for n, c in space.configs.items() if c == config), name)

    def canonical(self, name: str) -> str:
        """Returns the first name of a network that may have several."""
        return self._canonical.get(name, name)

    def distinct(self) -> tuple[str, ...]:
        """Returns the names of different networks."""
        return tuple(dict.fromkeys(self._canonical.values()))

    def compute(self, name: str) -> Any:
        """The config to run with: on a CPU mesh the ops' implementations are chosen for it."""
        config = self.space.configs[name]
        return config.on_cpu() if self.on_cpu else config

    def small(self, name: str) -> Abstract:
        """Returns the abstract state of a network, without what methods add."""
        return abstract(self.space.configs[name])

    def extended(self, name: str) -> Abstract:
        """Returns the abstract state of a network and of what methods train."""
        return extended(self.small(name), self.model, self.added)

    def sliced(self, name: str, arrays: Arrays) -> Arrays:
        """Returns the slices of full-size arrays that sub-network `name` is made of, and of what methods train."""
        small = self.extended(name)
        shardings = {**self.params, **self.stats}
        whole = sharding.whole_where_cut(arrays, shardings, self.full, small, self.shards)
        return slice_like(whole, self.full, small, self.shards)

    def sliced_extras(self, name: str, arrays: Mapping[str, Arrays]) -> dict[str, Arrays]:
        """Returns methods' own arrays, cut to sub-network `name`."""
        small = self.small(name)
        return {method: self._cut(self.moved[method], own, small) for method, own in arrays.items()}

    def _cut(self, extras: Mapping[str, Extra], arrays: Arrays, small: Abstract) -> Arrays:
        axes = {name: extra.axes for name, extra in extras.items()}

        def of(model: Abstract) -> Abstract:
            return dataclasses.replace(model, params=shapes_in(extras, model, self.model), stats={}, axes=axes)

        return slice_like(arrays, of(self.model), of(small), self.shards)

    def axes_of(self, method: str, name: str) -> Axes:
        """Returns the names of the axes of an array that a method has added, () of one that it has not."""
        extra = self.added.get(method, {}).get(name)
        return () if extra is None else extra.axes

    def cast(self, arrays: Arrays) -> Arrays:
        """Returns weights in the type of activations, but for those that stay float32."""
        return {k: v if k in self.full.precise else v.astype(self.dtype) for k, v in arrays.items()}

    def cast_inputs(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """Returns a model's inputs in the type of activations; whole numbers stay."""
        return tuple(x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in inputs)

    def model_only(self, arrays: Arrays) -> Arrays:
        """Returns parameters without what methods train beside the model."""
        return {k: v for k, v in arrays.items() if k in self.model.params} if self.added else arrays
