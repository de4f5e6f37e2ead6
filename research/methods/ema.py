"""An exponential moving average of the parameters, which is evaluated, extracted and exported in their place.

Source: Polyak and Juditsky 1992; the warm-up of the decay, min(decay, (1 + t) / (10 + t)), is TensorFlow's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp

from research.modules.state import Abstract, Arrays
from research.train.hooks import Clock, Extra, Made
from research.train.method import Method
from research.train.method_registry import register
from research.values import Rule


@register("ema")
@dataclass(frozen=True)
class Ema(Method):
    """The method.

    Attributes:
      decay: share of the average that stays in an update.
    """

    paper = "Polyak and Juditsky 1992"

    decay: Annotated[float, Rule(above=0, below=1)] = 0.999

    def arrays(self, model: Abstract) -> Mapping[str, Extra]:
        def copy(name: str) -> Extra:
            initial = lambda key, params: jnp.copy(params[name])
            return Extra(model.params[name].shape, model.axes[name], initial, dtype=model.params[name].dtype)

        return {name: copy(name) for name in model.params}

    def after_update(self, params: Arrays, arrays: Arrays, made: Made, clock: Clock) -> tuple[Arrays, Arrays]:
        del made
        rate = jnp.minimum(self.decay, (1.0 + clock.update) / (10.0 + clock.update))
        own = {name: params[name] for name in arrays}
        return params, jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, arrays, own)

    def evaluated(self, params: Arrays, arrays: Arrays) -> Arrays:
        return {**params, **arrays}
