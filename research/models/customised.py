"""A network made one user's own: a frozen global expert, a small local expert and a gate (Sathe et al. 2018, arXiv
1811.00056).

The paper gives the parts and their cost, about 2.5 % of the global expert; sizes and what they read are our choice:
both read the global expert's last features, the local expert is a low-rank head on them, the gate has one hidden layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.errors import UserError
from research.models.base import ModelConfig
from research.models.lenet import LeNetConfig
from research.modules import elastic
from research.modules.axes import Init
from research.modules.layers import Linear
from research.modules.state import abstract

GLOBAL = "global_expert/"
"""Where the frozen arrays lie in the parameters of a customised network."""

he = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")
torch_default = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclass(frozen=True)
class CustomisedConfig(ModelConfig):
    """Description of a customised network.

    Attributes:
      expert: config of the global expert.
      rank: of the local expert's head.
      hidden: hidden units of the gate.
      threshold: the local expert answers where the gate is above it.
      budget: parameters of local expert and gate over those of the global expert, at most.

    Raises:
      UserError: local expert and gate cost more than the budget.
    """

    expert: LeNetConfig = field(default_factory=LeNetConfig)
    rank: int = 8
    hidden: int = 8
    threshold: float = 0.5
    budget: float = 0.025

    family: ClassVar[str] = "customised"
    elastic: ClassVar[dict[str, str]] = {
        "width": "fraction of the global expert's channels",
        "rank": "fraction of the local expert's rank, or a whole number",
    }

    def __post_init__(self):
        self.check_sizes("rank", "hidden")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"customised: threshold={self.threshold}; valid: a number in [0, 1]")
        if self.overhead > self.budget:
            raise UserError(
                f"customised: {self.added_params} parameters of local expert and gate are {100 * self.overhead:.2f} % "
                "of the global expert's, "
                f"more than the budget of {100 * self.budget:g} %; lower rank={self.rank} or hidden={self.hidden}"
            )

    @property
    def added_params(self) -> int:
        """Parameters of local expert and gate."""
        features, classes = self.expert.hidden[-1], self.expert.num_classes
        return (features + classes) * self.rank + classes + (features + 2) * self.hidden + 1

    @property
    def overhead(self) -> float:
        """Parameters of local expert and gate over those of the global expert."""
        return self.added_params / abstract(self.expert).num_params()

    def build(self, init: Init) -> nnx.Module:
        return Customised(self, init)

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        return self.expert.kept()

    def input_shape(self) -> tuple[int, int, int]:
        return self.expert.input_shape()

    def shrink(self, *, width=1.0, rank=1.0) -> "CustomisedConfig":
        """Returns the sub-network with these choices (see `elastic`).

        Raises:
          UserError: a choice outside its space, or a global expert so small that the others exceed the budget.
        """
        return replace(self, expert=self.expert.shrink(width=width), rank=elastic.count(rank, self.rank, "rank"))


class Customised(nnx.Module):
    """The network. Mode "train" mixes softly, and gives log y as logits; else one of the two experts answers with its
    own logits.

    y = g softmax(local) + (1 - g) softmax(global). Where the gate is not above its threshold, the output is the global
    expert's to the last bit.
    """

    def __init__(self, config: CustomisedConfig, init: Init):
        self.config = config
        features, classes = config.expert.hidden[-1], config.expert.num_classes
        self.global_expert: Any = config.expert.build(init.child("global_expert"))
        read, rank, hidden = "layer2/mlp", "local/rank", "gate/mlp"
        self.down = Linear(
            features, config.rank, (read, rank), init.child("down"), bias=False, kernel_init=torch_default
        )
        self.up = Linear(config.rank, classes, (rank, "classes"), init.child("up"), kernel_init=torch_default)
        self.gate1 = Linear(features, config.hidden, (read, hidden), init.child("gate1"), kernel_init=he, exact=True)
        self.gate2 = Linear(
            config.hidden, 1, (hidden, "gate/observed"), init.child("gate2"), kernel_init=torch_default, exact=True
        )

    def local(self, features: Float[Array, "B D"]) -> Float[Array, "B N"]:
        """Returns the local expert's logits."""
        return self.up(self.down(features))

    def gate(self, features: Float[Array, "B D"]) -> Float[Array, " B"]:
        """Returns the logit of g, the share of the local expert."""
        return self.gate2(jax.nn.relu(self.gate1(features)))[:, 0]

    def __call__(
        self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None
    ) -> Float[Array, "B N"]:
        features = self.global_expert.embed(x, mode=mode, key=key)
        both, gate = (self.global_expert.classify(features), self.local(features)), self.gate(features)
        if mode != "train":
            return jnp.where((jax.nn.sigmoid(gate) > self.config.threshold)[:, None], both[1], both[0])
        shares = jax.nn.log_sigmoid(-gate)[:, None], jax.nn.log_sigmoid(gate)[:, None]
        return jnp.logaddexp(*(share + jax.nn.log_softmax(logits) for share, logits in zip(shares, both, strict=True)))
