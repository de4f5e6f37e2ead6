"""Sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055): a mixture of experts starts as a trained dense network,
every expert as a copy of the FFN that it takes the place of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from jaxtyping import Array

from research.errors import UserError
from research.methods.bases.source import check_source, load_source
from research.modules.moe_options import mixture_of
from research.modules.state import Arrays
from research.nested.upcycle import changes_function, upcycle
from research.train.hooks import About
from research.train.method import Method
from research.train.method_registry import register
from research.values import SHARE, WEIGHT


@register("upcycling")
@dataclass(frozen=True)
class Upcycling(Method):
    """The method.

    Attributes:
      source: run of the dense network, or folder of its weights.
      noise: standard deviation of normal noise on every expert's kernels, relative to that of the kernel.
      reinit: share of each expert's hidden units whose weights are drawn anew (Drop-Upcycling, arXiv 2502.19261).
    """

    paper = "arXiv 2212.05055"

    source: str = ""
    noise: Annotated[float, WEIGHT] = 0.0
    reinit: Annotated[float, SHARE] = 0.0

    def check(self, about: About) -> None:
        if mixture_of(about.space.full) is None:
            raise UserError(
                f"method upcycling makes experts of FFNs, and model {about.config.model['name']} has no mixture of "
                "experts; give it one, e.g. config.model.ffn"
            )
        check_source(self.name, self.source, about)

    def start(self, model: Any, key: Array, say: Callable[[str], None]) -> tuple[Arrays, Arrays]:
        dense, params, stats = load_source(self.name, self.source, say)
        if dense.family != model.family:
            raise UserError(
                f"method.upcycling.source={self.source} does not fit this model: its model is {dense.family}, not "
                f"{model.family}"
            )
        made = upcycle(dense, params, stats, model, key, noise=self.noise, reinit=self.reinit)
        drawn = ", ".join(f"{name}={value}" for name, value in vars(self).items() if name != "source" and value)
        change = drawn or changes_function(model.mixture)
        told = f"which changes what it computes ({change})" if change else "which computes the same"
        say(f"every expert starts as the dense part of {self.source}, {told}")
        return made
