"""A model with its numbers, for notebooks: run it, or sample a smaller self from it. The loop uses plain arrays."""

import functools
from typing import Any

import jax

from research import seeds
from research.models import registry
from research.modules.state import Arrays, apply, initialize
from research.nested.slicing import extract
from research.nested.space import shrink


class Model:
    """A config with its params and statistics; `model(x)` runs it in evaluation mode."""

    def __init__(self, config: Any, params: Arrays, stats: Arrays):
        self.config, self.params, self.stats = config, params, stats

    def __call__(self, x, *, mode: str = "eval", key=None):
        return apply(self.config, self.params, self.stats, x, mode=mode, key=key)[0]

    def sample(self, **choices) -> "Model":
        """Returns a smaller self that shares nothing with this model: `model.sample(width=0.5, depth=0.5)`.

        Raises:
          UserError: a dimension that the family does not have, or a choice outside its space.
        """
        config = shrink(self.config, choices)
        params, stats = extract(self.config, config, self.params, self.stats)
        return Model(config, params, stats)


def create_model(name: str, *, seed: int = 0, **overrides) -> Model:
    """Returns a named model with freshly drawn weights: `create_model("unireplknet_t", num_classes=10)`.

    Raises:
      UserError: unknown model or field, a value that the model refuses, or a seed out of range.
    """
    config = registry.model_config(name, **overrides)
    return Model(config, *jax.jit(functools.partial(initialize, config))(seeds.key(seed)))
