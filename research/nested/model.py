"""A model with its numbers, for notebooks: run it, or sample a sub-network from it. The loop uses plain arrays."""

import functools
import warnings
from typing import Any

import jax
from jaxtyping import Array, Float

from research import seeds
from research.models import registry
from research.modules.axes import StatKind
from research.modules.features import chosen, reading
from research.modules.state import Arrays, abstract, apply, initialize
from research.nested.slicing import extract
from research.nested.space import shrink

BATCH = 128
"""Inputs of a batch of recalibration."""


class Model:
    """A config with its params and statistics; `model(x)` runs it in evaluation mode."""

    def __init__(self, config: Any, params: Arrays, stats: Arrays):
        self.config, self.params, self.stats = config, params, stats

    def __call__(self, x: Array, *, mode: str = "eval", key: Array | None = None) -> Any:
        return apply(self.config, self.params, self.stats, x, mode=mode, key=key)[0]

    def features(self, x: Array, *names: str) -> dict[str, Array]:
        """Returns values inside the model in evaluation mode, e.g. "stage2", "hidden", "embedding"; all that it names
        where none is given.

        Raises:
          UserError: a name that the model does not have.
        """
        with reading() as found:
            self(x)
        return chosen(found, names or tuple(found))

    def sample(self, *, calibrate: Float[Array, " N *S"] | None = None, **choices: Any) -> "Model":
        """Returns a sub-network that shares nothing with this model: `model.sample(width=0.5, depth=0.5)`.

        Args:
          calibrate: inputs, some hundreds of the training ones: the moments of batch norm become the sub-network's own,
            the averages over them (Once-for-All, universally slimmable networks). Without them they stay those of this
            model, which costs accuracy; a warning says so.
          choices: of the family's dimensions.

        Raises:
          UserError: a dimension that the family does not have, or a choice outside its space.
        """
        config = shrink(self.config, choices)
        params, stats = extract(self.config, config, self.params, self.stats)
        moments = abstract(config).stats_of(StatKind.MOMENT)
        if moments and calibrate is not None:
            stats |= _recalibrated(config, params, stats, calibrate, moments)
        elif moments and config != self.config:
            warnings.warn(
                "the sub-network keeps the larger model's moments of batch norm, which are not its own; "
                "give it training images: model.sample(..., calibrate=images)",
                stacklevel=2,
            )
        return Model(config, params, stats)


def _recalibrated(config: Any, params: Arrays, stats: Arrays, inputs: Array, moments: list[str]) -> Arrays:
    """The averages of the moments over batches of the inputs, by their sizes."""
    run = jax.jit(
        lambda x: {k: v for k, v in apply(config, params, stats, x, mode="calibrate")[1].items() if k in moments}
    )
    total: Arrays = {}
    for start in range(0, len(inputs), BATCH):
        batch = inputs[start : start + BATCH]
        total = {k: total.get(k, 0) + v * (len(batch) / len(inputs)) for k, v in run(batch).items()}
    return total


def create_model(name: str, *, seed: int = 0, **overrides: Any) -> Model:
    """Returns a named model with freshly drawn weights: `create_model("unireplknet_t", num_classes=10)`.

    Raises:
      UserError: unknown model or field, a value that the model refuses, or a seed out of range.
    """
    config = registry.model_config(name, **overrides)
    return Model(config, *jax.jit(functools.partial(initialize, config))(seeds.key(seed)))
