"""What families have in common some of whose FFNs may be mixtures of experts (`research.modules.moe`): costs, and how
alike the experts of each layer have become."""

import math
from collections.abc import Mapping
from typing import Self

import jax
import numpy as np
from jaxtyping import Array

from research.models.base import ChoosesImplementations
from research.modules.axes import role
from research.modules.moe import HEADING, MoeFfn
from research.modules.moe_options import HasMixtures
from research.modules.moe_similarity import KERNELS, similarity
from research.modules.state import Arrays, ToldReal, abstract
from research.ops import grouped_matmul


class MixtureConfig(ChoosesImplementations, HasMixtures, ToldReal):
    """Base of their configs, which give `has_mixtures` and `mixture`, and `layer_places` for names in the log."""

    def counted(self) -> tuple[Self, int]:
        """By the reference implementations, but for the experts, of which a token visits only some."""
        if not self.has_mixtures:
            return super().counted()
        return self.with_implementation(f"naive, {grouped_matmul.OP}=ragged"), self.mixture.counted_batch

    def active_params(self) -> int:
        """Of the experts those that a token is sent to; all of soft mixtures, whose tokens are spread over all
        experts. The embedding counts whole, as is usual."""
        full, count = abstract(self), abstract(self).num_params()
        if not self.has_mixtures or self.mixture.router == "soft":
            return count
        first = lambda name: [role(axis) for axis in full.axes[name] if role(axis) != "layers"][:1]
        of_experts = sum(math.prod(shape.shape) for name, shape in full.params.items() if first(name) == ["experts"])
        return count - round((1 - self.mixture.num_experts_per_tok / self.mixture.num_experts) * of_experts)

    def observations(self, params: Arrays, stats: Arrays) -> Mapping[str, float]:
        """Returns {"experts/LAYER/similarity": see `research.modules.moe_similarity.similarity`}."""
        del stats
        out: dict[str, float] = {}
        paths = abstract(self).modules_of(MoeFfn)
        kernels = {path: {k: params[f"{path}/{k}"] for k in KERNELS if f"{path}/{k}" in params} for path in paths}
        for path, values in jax.device_get(_similarities(kernels)).items():
            names = self.layer_labels(path, values.shape)
            out |= {f"{HEADING}/{name}/similarity": float(v) for name, v in zip(names, np.ravel(values), strict=True)}
        return out


@jax.jit
def _similarities(kernels: dict[str, dict[str, Array]]) -> dict[str, Array]:
    return {path: similarity(own) for path, own in kernels.items()}
