"""A dense network becomes a mixture of experts: every expert starts as the dense FFN (sparse upcycling).

Where the weights of a token's experts sum to 1 and nobody is dropped, the mixture computes what the dense network did:
copies of one function, averaged. Experts drift apart by what the router sends them; `noise` and `reinit` make them
differ at once, and give that up.

Sources: Komatsuzaki et al. 2022 (arXiv 2212.05055), section 3; Drop-Upcycling, Nakamura et al. 2025 (arXiv 2502.19261),
section 3.2.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.errors import UserError
from research.modules.axes import Axes, role
from research.modules.moe import MoeFfn
from research.modules.moe_options import Moe
from research.modules.state import Arrays, abstract, initialize

DENSE_NAMES = {
    "up": ("up", "up/kernel"),
    "gate": ("gate", "gate/kernel"),
    "down": ("down", "down/kernel"),
    "up_bias": ("up/bias",),
    "down_bias": ("down/bias",),
}
"""Array of a mixture -> what the dense part calls it."""
HIDDEN_AXIS = {"up": -1, "gate": -1, "down": -2, "up_bias": -1}
COPIED = ("experts", "domains")
SALT = 11


def changes_function(moe: Moe) -> str:
    """Returns why a mixture of equal experts does not compute what one of them does; "" where it does."""
    if moe.router in ("expert_choice", "soft"):
        return f"router={moe.router!r} gives a token weights that do not sum to 1, or mixes tokens"
    if moe.capacity != "none":
        return f"capacity={moe.capacity!r} may drop tokens"
    if moe.router == "top_k" and not moe.renormalize:
        return "renormalize=False: the weights of a token's experts do not sum to 1"
    if moe.router == "top_k" and moe.routed_scaling_factor != 1.0:
        return f"routed_scaling_factor={moe.routed_scaling_factor}: the weights of a token's experts do not sum to 1"
    return ""


def upcycle(
    dense: Any,
    params: Mapping[str, Array],
    stats: Mapping[str, Array],
    config: Any,
    key: Array,
    *,
    noise: float = 0.0,
    reinit: float = 0.0,
) -> tuple[Arrays, Arrays]:
    """Returns (params, stats) of a network with mixtures of experts from those of the same network without.

    Args:
      dense: config of the dense network, or of one whose mixtures have a single expert. Of an encoder with one domain,
        every domain's token becomes a copy of its token too (arXiv 2401.15713, extension of a pretrained encoder).
      params, stats: its arrays.
      config: the network with mixtures; its experts are as wide as the dense parts that they replace.
      key: for the routers, which start from scratch, and for noise and reinit.
      noise: standard deviation of normal noise on every expert's kernels, relative to that of the kernel.
      reinit: part of the hidden units of each expert, drawn for each, whose weights are drawn anew with the mean and
        deviation of the weights that they replace (Drop-Upcycling).

    Raises:
      UserError: the networks differ in more than mixtures, or experts are shared, of another width or of another kind.
    """
    if not 0 <= reinit <= 1 or noise < 0:
        raise UserError(f"upcycling: noise={noise}, reinit={reinit}; valid: noise from 0, reinit from 0 to 1")
    target = abstract(config)
    mixtures = target.modules_of(MoeFfn)
    layers, others = _by_layer(dense, params)
    places = config.layer_places()
    if len(places) != len(layers):
        raise UserError(f"upcycling: the dense network has {len(layers)} layers, the mixture {len(places)}")
    result: Arrays = {}
    taken: set[tuple[int, str]] = set()
    for name, shape in target.params.items():
        part, _, tag = name.rpartition("/")
        if part in mixtures and tag not in DENSE_NAMES:
            continue  # the router's, drawn below
        prefix = next((p for p, _ in places if name.startswith(p + "/")), None)
        if prefix is None:
            result[name] = _fitting(name, others.get(name), shape.shape, target.axes[name])
            continue
        names = (tag, *DENSE_NAMES[tag]) if part in mixtures else (tag,)
        suffixes = [f"{part}/{n}".removeprefix(prefix + "/") for n in names]
        salted = jax.random.fold_in(jax.random.fold_in(key, SALT), mixtures.index(part)) if part in mixtures else key
        rows = []
        for n in sorted((n for n, (p, _) in enumerate(places) if p == prefix), key=lambda n: places[n][1]):
            found = next((s for s in suffixes if s in layers[n]), "")
            taken.add((n, found))
            row = _fitting(name, layers[n].get(found), shape.shape[1:], target.axes[name][1:])
            rows.append(_apart(row, tag, jax.random.fold_in(salted, n), noise, reinit) if part in mixtures else row)
        result[name] = jnp.stack(rows)
    _check_all_taken(layers, others, taken, result)
    drawn, fresh = initialize(config, key)
    same = {k: v for k, v in stats.items() if k in fresh and fresh[k].shape == v.shape}
    return {**drawn, **result}, {**fresh, **same}


def _check_all_taken(
    layers: list[dict[str, Array]], others: dict[str, Array], taken: set[tuple[int, str]], result: Arrays
) -> None:
    left = [s for n, layer in enumerate(layers) for s in layer if (n, s) not in taken] + sorted(
        set(others) - set(result)
    )
    if left:
        raise UserError(
            f"upcycling: the dense network has {left[0]}, for which the mixture has no place; "
            "experts are of the kind of what they replace"
        )


def _by_layer(config: Any, params: Mapping[str, Array]) -> tuple[list[dict[str, Array]], dict[str, Array]]:
    """Returns (arrays of each layer by what follows the layer's prefix, arrays of no layer)."""
    places = config.layer_places()

    def inside(prefix: str) -> dict[str, Array]:
        return {k.removeprefix(prefix + "/"): v for k, v in params.items() if k.startswith(prefix + "/")}

    layers = [{k: v[i] for k, v in inside(prefix).items()} for prefix, i in places]
    prefixes = tuple({prefix + "/" for prefix, _ in places})
    return layers, {k: v for k, v in params.items() if not k.startswith(prefixes)}


def _fitting(name: str, array: Array | None, shape: tuple[int, ...], axes: Axes) -> Array:
    """Returns the array in `shape`: along axes of experts and domains by copies, where it has one of them or no such
    axis."""
    found = "no such array" if array is None else f"one of {array.shape}"
    if array is not None:
        array = jnp.asarray(array)
        several = [i for i, axis in enumerate(axes) if role(axis) in COPIED]
        if array.ndim == len(shape) - len(several):
            array = jnp.expand_dims(array, several)
        for i in several:
            array = jnp.repeat(array, shape[i], i) if array.ndim == len(shape) and array.shape[i] == 1 else array
    if array is None or array.shape != shape:
        raise UserError(
            f"upcycling: {name} needs {shape}, the dense network has {found}; "
            "experts are of the kind and width of what they replace"
        )
    return array


def _apart(copies: Float[Array, " E *S"], tag: str, key: Array, noise: float, reinit: float) -> Float[Array, " E *S"]:
    """Returns the copies apart by `noise` and by units drawn anew; `key` is one for all kernels of a layer's
    experts."""
    if tag not in HIDDEN_AXIS or not (noise or reinit):
        return copies
    own = jax.random.fold_in(key, 1 + list(DENSE_NAMES).index(tag))
    std, mean, axis = copies.std(), copies.mean(), copies.ndim + HIDDEN_AXIS[tag]
    if noise:
        copies = copies + noise * std * jax.random.normal(jax.random.fold_in(own, 0), copies.shape, copies.dtype)
    if reinit:
        count, hidden = copies.shape[0], copies.shape[axis]
        order = jnp.argsort(jax.random.uniform(key, (count, hidden)), axis=-1)
        shape = [size if i in (0, axis) else 1 for i, size in enumerate(copies.shape)]
        chosen = (order < round(reinit * hidden)).reshape(shape)
        drawn = mean + std * jax.random.normal(jax.random.fold_in(own, 1), copies.shape, copies.dtype)
        copies = jnp.where(chosen, drawn, copies)
    return copies
