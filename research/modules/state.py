"""Between modules and plain arrays: split, merge, abstract state and stacked layers, all in this file.

Outside this file a model is a frozen config, `params` and `stats` (flat dictionaries from "path/of/array"
to an array), and the pure function `apply`. Modules exist only inside `apply`.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from research.errors import UserError
from research.modules.axes import EXTENTS, Axes, Init, Kind, Log, Param, Stat, StatKind, role

Arrays = dict[str, Array]


@runtime_checkable
class ModelConfig(Protocol):
    """A frozen, hashable description of a model: equal configs build equal models."""

    def __hash__(self) -> int: ...

    def build(self, init: Init) -> nnx.Module:
        """Builds the module, called as `module(x, mode=..., key=...)`."""
        ...

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        """Indices, in the full model, of the layers that each stack of this model holds (by axis name)."""
        ...


class ToldReal:
    """What a config derives from whose tokens or examples may compete: its model takes `real=` ([B], or [B, T] of
    sequences), False for filler."""


def told(config: Any, real: Array | None) -> dict[str, Array]:
    """Returns the keyword arguments that tell a model which of its input is real; none where it does not ask or all is
    (None)."""
    return {"real": real} if real is not None and isinstance(config, ToldReal) else {}


@dataclass(frozen=True)
class Abstract:
    """The shapes, names and structure of a model, without its numbers.

    Attributes:
      kinds: what each parameter does.
      precise: the parameters that stay float32.
      stat_kinds: how each statistic moves.
      logs: what those that are logged are called.
      modules: the class of the module at each path.
    """

    graphdef: Any
    params: Mapping[str, jax.ShapeDtypeStruct]
    stats: Mapping[str, jax.ShapeDtypeStruct]
    axes: Mapping[str, Axes]
    kept: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, Kind]
    precise: frozenset[str]
    stat_kinds: Mapping[str, StatKind] = field(default_factory=dict)
    logs: Mapping[str, Log] = field(default_factory=dict)
    modules: Mapping[str, type[nnx.Module]] = field(default_factory=dict)

    def num_params(self) -> int:
        """Number of trained values; running statistics are not among them."""
        return sum(int(_size(s.shape)) for s in self.params.values())

    def num_stats(self) -> int:
        """Number of running-statistic values."""
        return sum(int(_size(s.shape)) for s in self.stats.values())

    def stats_of(self, *kinds: StatKind) -> list[str]:
        """Returns the names of the statistics of these kinds."""
        return [name for name in self.stats if self.stat_kinds[name] in kinds]

    def modules_of(self, *sorts: type[nnx.Module]) -> list[str]:
        """Returns the paths of the modules of these classes, sorted; what a module holds is called PATH/NAME."""
        return sorted(path for path, sort in self.modules.items() if issubclass(sort, sorts))

    def kept_stats(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the statistics that files hold: all but the sums, which are zero between updates."""
        return {name: shape for name, shape in self.stats.items() if self.stat_kinds.get(name) is not StatKind.SUM}


def _size(shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def _flat(state: nnx.State) -> tuple[Arrays, dict[str, Axes]]:
    arrays, axes = {}, {}
    for path, variable in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        arrays[name] = variable[...]
        axes[name] = variable.axes
    return arrays, axes


def _unflat(arrays: Mapping[str, Array]) -> nnx.State:
    """Arrays of numpy become JAX's: a variable would write into them in place."""
    return nnx.from_flat_state(
        [
            (tuple(int(p) if p.isdigit() else p for p in name.split("/")), _device_array(value))
            for name, value in sorted(arrays.items())
        ]
    )


def _device_array(value: Array | np.ndarray) -> Array:
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def split(module: nnx.Module) -> tuple[Any, Arrays, Arrays, dict[str, Axes]]:
    """Splits a module into (graphdef, params, stats, axes), the last three keyed by path."""
    graphdef, *states = nnx.split(module, Param, Stat)
    (params, param_axes), (stats, stat_axes) = map(_flat, states)
    return graphdef, params, stats, {**param_axes, **stat_axes}


def merge(graphdef: Any, params: Mapping[str, Array], stats: Mapping[str, Array]) -> nnx.Module:
    """The inverse of `split`."""
    return nnx.merge(graphdef, _unflat(params), _unflat(stats))


@functools.lru_cache(maxsize=4096)
def abstract(config: ModelConfig, dtype: Any = jnp.float32) -> Abstract:
    """Returns shapes, axis names and structure of the model that `config` describes; no arrays are made.

    Raises:
      UserError: axes of one name with different sizes.
    """
    seen: dict[str, Any] = {}

    def build(key):
        module = config.build(Init(key, dtype))
        graphdef, params, stats, axes = split(module)
        declared = _declared(module, Param)
        kinds = {name: variable.kind for name, variable in declared.items()}
        precise = frozenset(name for name, variable in declared.items() if variable.precise)
        stats_declared = _declared(module, Stat)
        seen.update(graphdef=graphdef, axes=axes, kinds=kinds, precise=precise)
        seen["stat_kinds"] = {name: variable.kind for name, variable in stats_declared.items()}
        seen["logs"] = {name: variable.log for name, variable in stats_declared.items() if variable.log is not None}
        seen["modules"] = {"/".join(map(str, path)): type(part) for path, part in nnx.iter_modules(module)}
        return params, stats

    params, stats = jax.eval_shape(build, jax.eval_shape(lambda: jax.random.key(0)))
    _check_coupled({**params, **stats}, seen["axes"])
    return Abstract(params=params, stats=stats, kept=dict(config.kept()), **seen)


def _check_coupled(arrays: Mapping[str, jax.ShapeDtypeStruct], axes: Mapping[str, Axes]) -> None:
    """Raises UserError where axes of one name, which are cut together, have different sizes."""
    first: dict[str, tuple[int, str]] = {}
    for array, shape in arrays.items():
        for axis, size in zip(axes[array], shape.shape, strict=True):
            other, where = first.setdefault(axis, (size, array))
            if size != other and role(axis) not in EXTENTS:
                raise UserError(
                    f"axis {axis} has {other} entries in {where} {_named(arrays[where], axes[where])} and {size} in "
                    f"{array} {_named(shape, axes[array])}: axes of one name are cut together and have one size; are "
                    "names swapped?"
                )


def _named(array: jax.ShapeDtypeStruct, axes: Axes) -> str:
    return f"[{', '.join(f'{axis}={size}' for axis, size in zip(axes, array.shape, strict=True))}]"


def _declared(module: nnx.Module, sort: type[Param] | type[Stat]) -> dict[str, Any]:
    """Returns the variables of a sort, which hold what was declared of each, by path."""
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(module, sort))}


def initialize(config: ModelConfig, key: Array, dtype: Any = jnp.float32) -> tuple[Arrays, Arrays]:
    """Returns freshly drawn (params, stats) of the model that `config` describes; call under `jit` when large."""
    _, params, stats, _ = split(config.build(Init(key, dtype)))
    return params, stats


def apply(config: ModelConfig, params: Mapping[str, Array], stats: Mapping[str, Array], *args, **kwargs):
    """Runs the model; returns (output, stats after the call). Pure: the arguments are not changed.

    `kwargs` may hold `method`, the name of another method of the module than `__call__`.
    """
    method = kwargs.pop("method", "__call__")
    module = merge(abstract(config).graphdef, params, stats)
    out = getattr(module, method)(*args, **kwargs)
    return out, _flat(nnx.state(module, Stat))[0]


class OncePerUpdate:
    """A module with statistics of kind STATE: its calls in training only add to those of kind SUM."""

    def after_update(self) -> None:
        """Moves the STATE by the SUMs of a whole update and sets these to zero; arrays of stacked layers have axes of
        layers in front."""
        raise NotImplementedError


def after_update(config: ModelConfig, params: Mapping[str, Array], stats: Mapping[str, Array]) -> Arrays:
    """Returns the statistics after an update, of all modules that are `OncePerUpdate`. Pure."""
    if not abstract(config).stats_of(StatKind.STATE):
        return dict(stats)
    module = merge(abstract(config).graphdef, params, stats)
    for _, part in nnx.iter_modules(module):
        if isinstance(part, OncePerUpdate):
            part.after_update()
    return _flat(nnx.state(module, Stat))[0]


class Stack(nnx.Module):
    """Equal layers in one set of arrays with a first axis `name`, run by `lax.scan`.

    Scanning compiles one layer instead of `size`. `make` builds one layer from an Init.
    """

    def __init__(self, make: Callable[[Init], nnx.Module], size: int, name: str, init: Init, *, unroll: bool = False):
        self.size, self.unroll = size, unroll
        self.layer: Any = make(init.stacked(size, name))

    def __call__(self, x, *, xs: Any = None, remat: str = "none", **kwargs):
        """Applies the layers in order: `x = layer(x, per_layer, **kwargs)` with `per_layer` one entry of `xs`."""
        return self._run(lambda layer, carry, inputs: (layer(carry, inputs, **kwargs), None), x, xs, remat)[0]

    def scan(self, method: str, x, xs: Any, *args, remat: str = "none"):
        """Applies `x, y = layer.method(x, per_layer, *args)` in order; returns x and the y of all layers, stacked."""
        return self._run(lambda layer, carry, inputs: getattr(layer, method)(carry, inputs, *args), x, xs, remat)

    def _run(self, call: Callable, x, xs: Any, remat: str):
        graphdef, params, stats, _ = split(self.layer)

        def body(carry, inputs):
            params, stats, per_layer = inputs
            layer = merge(graphdef, params, stats)
            carry, out = call(layer, carry, per_layer)
            return carry, (split(layer)[2], out)

        body = rematerialize(body, remat)
        if self.unroll or self.size == 1:
            rows = []
            for i in range(self.size):
                x, row = body(x, jax.tree.map(lambda a, i=i: a[i], (params, stats, xs)))
                rows.append(row)
            stats, out = jax.tree.map(lambda *row: jnp.stack(row), *rows)
        else:
            x, (stats, out) = jax.lax.scan(body, x, (params, stats, xs))
        nnx.update(self.layer, _unflat(stats))
        return x, out


REMAT_POLICIES = {
    "none": None,
    "full": "nothing_saveable",
    "dots": "dots_saveable",
    "dots_no_batch": "dots_with_no_batch_dims_saveable",
}


def rematerialize(body: Callable, name: str) -> Callable:
    """Wraps `body` so that its activations are recomputed in the backward pass, by named policy.

    Raises:
      ValueError: `name` is not one of REMAT_POLICIES.
    """
    if name not in REMAT_POLICIES:
        raise ValueError(f"unknown remat policy {name!r}; valid: {sorted(REMAT_POLICIES)}")
    policy = REMAT_POLICIES[name]
    if policy is None:
        return body
    return jax.checkpoint(body, policy=getattr(jax.checkpoint_policies, policy))


def require_finite(arrays: Mapping[str, Any], where: str) -> None:
    """Judges the weights that something is about to be computed with.

    Raises:
      UserError: an array holds NaN or infinities; the first by name is told.
    """
    for name in sorted(arrays):
        array = arrays[name]
        if (
            jnp.issubdtype(array.dtype, jnp.floating)
            and getattr(array, "is_fully_addressable", True)
            and not np.isfinite(np.asarray(array)).all()
        ):
            raise UserError(f"{where}: {name} holds numbers that are not finite; nothing can be computed with it")
