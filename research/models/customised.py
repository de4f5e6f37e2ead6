"""A network made one user's own: a frozen global expert, a small local expert and a gate (Sathe et al. 2018, arXiv
1811.00056).

The paper gives the parts and their cost, about 2.5 % of the global expert; sizes and what they read are our choice:
both read what the global expert's classifier reads, the local expert is a low-rank head on it, the gate has one hidden
layer. The global expert may be any classifier of images that has such an embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from research.errors import UserError
from research.models.base import ModelConfig
from research.models.lenet import LeNetConfig
from research.models.registry import Entry, register
from research.modules import elastic
from research.modules.axes import Init
from research.modules.layers import Linear
from research.modules.mesh import whole_features
from research.modules.state import Arrays, ToldReal, abstract, told

GLOBAL, LOCAL, GATE = "global_expert/", ("down/", "up/"), ("gate1/", "gate2/")
"""What the names of the arrays of each part start with."""
SIZES = ("num_classes", "in_channels", "image_size")

he = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")
torch_default = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclass(frozen=True)
class CustomisedConfig(ModelConfig, ToldReal):
    """Description of a customised network.

    Attributes:
      backbone: config of the global expert.
      rank: of the local expert's head.
      hidden: hidden units of the gate.
      threshold: the local expert answers where the gate is above it.
      budget: parameters of local expert and gate over those of the global expert, at most.
      num_classes, in_channels, image_size: of the backbone; 0: as its config has them.

    Raises:
      UserError: local expert and gate cost more than the budget, or the backbone has no embedding.
    """

    backbone: ModelConfig = field(default_factory=LeNetConfig)
    rank: int = 8
    hidden: int = 8
    threshold: float = 0.5
    budget: float = 0.025
    num_classes: int = 0
    in_channels: int = 0
    image_size: int = 0

    renamed: ClassVar[dict[str, str]] = {"expert": "backbone"}
    family: ClassVar[str] = "customised"
    elastic: ClassVar[dict[str, str]] = {
        "width": "fraction of the global expert's channels",
        "rank": "fraction of the local expert's rank, or a whole number",
    }

    def __post_init__(self):
        self.check_sizes("rank", "hidden")
        if self.backbone.embedding is None:
            raise UserError(
                f"customised: a {self.backbone.family} of this config gives no embedding that others could read; valid "
                "backbones: classifiers of images without routed pathways, e.g. lenet5, resnet18, unireplknet_a"
            )
        if given := {name: vars(self)[name] for name in SIZES if vars(self)[name]}:
            object.__setattr__(self, "backbone", replace(self.backbone, **given))
        for name in SIZES:
            object.__setattr__(self, name, vars(self.backbone)[name])
        if not 0 <= self.threshold <= 1:
            raise UserError(f"customised: threshold={self.threshold}; valid: a number in [0, 1]")
        if self.overhead > self.budget:
            raise UserError(
                f"customised: {self.added_params} parameters of local expert and gate are {100 * self.overhead:.2f} % "
                "of the global expert's, "
                f"more than the budget of {100 * self.budget:g} %; lower rank={self.rank} or hidden={self.hidden}"
            )

    @property
    def merges(self) -> bool:
        return self.backbone.merges

    @property
    def width(self) -> int:
        """Size of the embedding."""
        assert self.backbone.embedding is not None  # refused above
        return self.backbone.embedding[0]

    @property
    def added_params(self) -> int:
        """Parameters of local expert and gate."""
        classes = self.num_classes
        return (self.width + classes) * self.rank + classes + (self.width + 2) * self.hidden + 1

    @property
    def overhead(self) -> float:
        """Parameters of local expert and gate over those of the global expert."""
        return self.added_params / abstract(self.backbone).num_params()

    def build(self, init: Init) -> nnx.Module:
        return Customised(self, init)

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        return self.backbone.kept()

    def input_shape(self) -> tuple[int, ...]:
        return self.backbone.input_shape()

    def shrink(self, *, width=1.0, rank=1.0) -> "CustomisedConfig":
        """Returns the sub-network with these choices (see `elastic`).

        Raises:
          UserError: a choice outside its space, or a global expert so small that the others exceed the budget.
        """
        return replace(self, backbone=self.backbone.shrink(width=width), rank=elastic.count(rank, self.rank, "rank"))

    def with_implementation(self, implementation: str) -> "CustomisedConfig":
        return replace(self, backbone=self.backbone.with_implementation(implementation))

    def on_cpu(self) -> "CustomisedConfig":
        return replace(self, backbone=self.backbone.on_cpu())

    def counted(self) -> tuple["CustomisedConfig", int]:
        backbone, count = self.backbone.counted()
        return replace(self, backbone=backbone), count

    def deployed(self) -> "CustomisedConfig":
        """The budget is that of training: a merged global expert may have fewer parameters."""
        backbone = self.backbone.deployed()
        share = self.added_params / abstract(backbone).num_params()
        return replace(self, backbone=backbone, budget=max(self.budget, share))

    def merge(self, params: Arrays, stats: Arrays) -> tuple["CustomisedConfig", Arrays, Arrays]:
        _, merged, rest = self.backbone.merge(global_part(params), global_part(stats))
        own = {name: array for name, array in params.items() if not name.startswith(GLOBAL)}
        return self.deployed(), {**within(merged), **own}, within(rest)


def global_part(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the global expert's arrays out of a customised network's."""
    return {name.removeprefix(GLOBAL): array for name, array in arrays.items() if name.startswith(GLOBAL)}


def within(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a global expert's arrays by their names in a customised network, the inverse of `global_part`."""
    return {GLOBAL + name: array for name, array in arrays.items()}


class Parts(NamedTuple):
    """What the three parts say of a batch: logits of the two experts, and the logit of the gate."""

    everybody: Float[Array, "B N"]
    local: Float[Array, "B N"]
    gate: Float[Array, " B"]


class Customised(nnx.Module):
    """The network. Mode "train" mixes softly, and gives log y as logits; else one of the two experts answers with its
    own logits.

    y = g softmax(local) + (1 - g) softmax(global). Where the gate is not above its threshold, the output is the global
    expert's to the last bit. The global expert runs in mode "eval" whatever the mode, and nothing moves its statistics.
    """

    def __init__(self, config: CustomisedConfig, init: Init):
        self.config = config
        assert config.backbone.embedding is not None  # refused by the config
        (features, read), classes = config.backbone.embedding, config.num_classes
        self.global_expert: Any = config.backbone.build(replace(init.child("global_expert"), frozen=True))
        rank, hidden = "local/rank", "gate/mlp"
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

    def parts(
        self,
        x: Float[Array, "B H W C"],
        *,
        mode: str = "eval",
        key: Array | None = None,
        real: Bool[Array, " B"] | None = None,
    ) -> Parts:
        """Returns what each part says."""
        del mode, key
        features = self.global_expert.embed(x, mode="eval", **told(self.config.backbone, real))
        everybody, local = self.global_expert.head(features), self.local(features)
        return Parts(whole_features(everybody), whole_features(local), self.gate(features))

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        *,
        mode: str = "eval",
        key: Array | None = None,
        real: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B N"]:
        parts = self.parts(x, mode=mode, key=key, real=real)
        if mode != "train":
            return answers(self.config, parts)
        shares = jax.nn.log_sigmoid(-parts.gate)[:, None], jax.nn.log_sigmoid(parts.gate)[:, None]
        both = parts.everybody, parts.local
        return jnp.logaddexp(*(share + jax.nn.log_softmax(logits) for share, logits in zip(shares, both, strict=True)))


def is_local(config: CustomisedConfig, parts: Parts) -> Bool[Array, " B"]:
    """Returns where the local expert answers."""
    return jax.nn.sigmoid(parts.gate) > config.threshold


def answers(config: CustomisedConfig, parts: Parts) -> Float[Array, "B N"]:
    """Returns the logits of the expert that answers."""
    return jnp.where(is_local(config, parts)[:, None], parts.local, parts.everybody)


register(
    Entry(
        "customised",
        CustomisedConfig(),
        "arXiv 1811.00056",
        "this repository",
        dict(backbone={"name": "lenet5", "maps": (4, 6), "hidden": (12, 8)}, rank=2, hidden=2, budget=0.2),
    )
)
