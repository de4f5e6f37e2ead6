"""What a run tells of its mixtures of experts: load and the like of every layer, and how alike its experts are.

Layers are called layer0, layer1, ... in the order of the network where its config tells it (`layer_places`), else by
their path.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from research.modules.moe import OBSERVED
from research.modules.state import Abstract, Arrays

LOAD, NUMBERS = "/load", "/observed"
KERNELS = ("up", "gate", "down")


def has_mixtures(shapes: Abstract) -> bool:
    return any(name.endswith(LOAD) for name in shapes.stats)


def observed(stats: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the statistics that `records` reads, out of all of a network's."""
    mixtures = [name.removesuffix(LOAD) for name in stats if name.endswith(LOAD)]
    return {path + end: stats[path + end] for path in mixtures for end in (LOAD, NUMBERS)}


def labels(config: Any, path: str, shape: tuple[int, ...]) -> list[str]:
    """Returns a name for each layer of the mixtures at `path`, whose arrays of `shape` may have a first axis of
    layers."""
    places = config.layer_places()
    count = shape[0] if len(shape) > 1 else 1
    names = {i: f"layer{n}" for n, (prefix, i) in enumerate(places) if path.startswith(prefix + "/")}
    return [names.get(i, path if len(shape) == 1 else f"{path}[{i}]") for i in range(count)]


def records(config: Any, host: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns {"experts/LAYER/load": [E] shares of the tokens, "experts/LAYER/NUMBER": one of `OBSERVED`} of what
    `observed` gave."""
    out: dict[str, Any] = {}
    for path in (name.removesuffix(LOAD) for name in host if name.endswith(LOAD)):
        load, numbers = host[path + LOAD], host[path + NUMBERS]
        for layer, own, several in zip(
            labels(config, path, load.shape), np.atleast_2d(load), np.atleast_2d(numbers), strict=True
        ):
            out[f"experts/{layer}/load"] = [float(v) for v in own]
            out |= {f"experts/{layer}/{name}": float(v) for name, v in zip(OBSERVED, several, strict=True)}
    return out


@jax.jit
def _similarities(kernels: dict[str, dict[str, Array]]) -> dict[str, Array]:
    return {path: similarity(own) for path, own in kernels.items()}


def similarity(kernels: Mapping[str, Float[Array, "*L E A B"]]) -> Float[Array, " *L"]:
    """Returns the mean cosine of the angle between the kernels of two experts, over all pairs and kernels: 1 for
    copies, about 0 for strangers."""
    means = []
    for kernel in kernels.values():
        flat = kernel.reshape(*kernel.shape[:-2], -1).astype(jnp.float32)
        unit = flat / jnp.maximum(jnp.linalg.norm(flat, axis=-1, keepdims=True), 1e-20)
        count = flat.shape[-2]
        # The squared length of the sum of unit vectors is their number plus twice the sum over pairs.
        pairs = jnp.square(unit.sum(-2)).sum(-1) - count
        means.append(pairs / max(count * (count - 1), 1))
    return jnp.stack(means).mean(0)


def similarity_records(config: Any, params: Arrays, stats: Mapping[str, Array]) -> dict[str, float]:
    """Returns {"experts/LAYER/similarity": see `similarity`} of a network's mixtures."""
    paths = [name.removesuffix(LOAD) for name in stats if name.endswith(LOAD)]
    found = {path: {k: params[f"{path}/{k}"] for k in KERNELS if f"{path}/{k}" in params} for path in paths}
    out: dict[str, float] = {}
    for path, values in jax.device_get(_similarities({k: v for k, v in found.items() if v})).items():
        names = labels(config, path, stats[path + LOAD].shape)
        out |= {f"experts/{name}/similarity": float(v) for name, v in zip(names, np.atleast_1d(values), strict=True)}
    return out
