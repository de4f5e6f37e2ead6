"""Actor and critic of soft actor-critic: small multi-layer perceptrons whose sub-networks are slices, like every
model's here.

The actor's head is a Gaussian mixture (`research.modules.gaussian_mixture`); with one expert it is SAC's own.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from research.errors import UserError
from research.modules import elastic
from research.modules.axes import Init, Kind
from research.modules.gaussian_mixture import GaussianMixtureHead, Mixture, small_uniform
from research.modules.layers import Linear

torch_default = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclass(frozen=True)
class ActorConfig:
    """A policy of `experts` Gaussians over `actions` numbers; `depth` ReLU layers of `hidden` units."""

    observations: int
    actions: int
    experts: int = 2
    hidden: int = 64
    depth: int = 2

    family: ClassVar[str] = "actor"
    elastic: ClassVar[dict[str, str]] = {
        "width": "fraction of the hidden units",
        "experts": "fraction of the primitives, or a whole number of them",
    }

    def __post_init__(self):
        _positive("actor", self, ("observations", "actions", "experts", "hidden", "depth"))

    def build(self, init: Init) -> nnx.Module:
        return Actor(self, init)

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        return {}

    def input_shape(self) -> tuple[int]:
        return (self.observations,)

    def shrink(self, *, width=1.0, experts=1.0) -> "ActorConfig":
        """Returns the sub-network with these choices (see `elastic`)."""
        hidden = elastic.scaled(self.hidden, width, 4, "width")
        return replace(self, hidden=hidden, experts=elastic.count(experts, self.experts, "experts"))


@dataclass(frozen=True)
class CriticConfig:
    """A value Q(s, a); `depth` ReLU layers of `hidden` units, the first of which reads state and action."""

    observations: int
    actions: int
    hidden: int = 64
    depth: int = 2

    family: ClassVar[str] = "critic"
    elastic: ClassVar[dict[str, str]] = {"width": "fraction of the hidden units"}

    def __post_init__(self):
        _positive("critic", self, ("observations", "actions", "hidden", "depth"))

    def build(self, init: Init) -> nnx.Module:
        return Critic(self, init)

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        return {}

    def input_shape(self) -> tuple[int]:
        return (self.observations,)

    def shrink(self, *, width=1.0) -> "CriticConfig":
        """Returns the sub-network with these choices (see `elastic`)."""
        return replace(self, hidden=elastic.scaled(self.hidden, width, 4, "width"))


def _positive(family: str, config: ActorConfig | CriticConfig, fields: tuple[str, ...]) -> None:
    for name, value in dataclasses.asdict(config).items():
        if name in fields and value < 1:
            raise UserError(f"{family}: {name}={value}; valid: whole numbers from 1")


class Trunk(nnx.Module):
    """ReLU layers after the first, each of the same width."""

    def __init__(self, hidden: int, layers: int, scope: str, init: Init):
        name = lambda i: f"{scope}/layer{i}/mlp"
        self.layers = nnx.List(
            [
                Linear(hidden, hidden, (name(i), name(i + 1)), init.child(i), kernel_init=torch_default)
                for i in range(layers)
            ]
        )

    def __call__(self, x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        x = jax.nn.relu(x)
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return x


class Actor(nnx.Module):
    """Observation to mixture over actions before squashing."""

    def __init__(self, config: ActorConfig, init: Init):
        state = "actor/input"
        self.first = Linear(
            config.observations,
            config.hidden,
            (state, "actor/layer0/mlp"),
            init.child("first"),
            kernel_init=torch_default,
        )
        self.trunk = Trunk(config.hidden, config.depth - 1, "actor", init.child("trunk"))
        sizes = (config.hidden, config.observations, config.actions, config.experts)
        self.head = GaussianMixtureHead(
            sizes, (f"actor/layer{config.depth - 1}/mlp", state), "actor", init.child("head")
        )

    def __call__(self, observation: Float[Array, "*B O"], *, mode: str = "eval", key: Array | None = None) -> Mixture:
        return self.head(self.trunk(self.first(observation)), observation)


class Critic(nnx.Module):
    """Observation and squashed action to a value."""

    def __init__(self, config: CriticConfig, init: Init):
        first = "critic/layer0/mlp"
        make = lambda size, axis: Linear(
            size, config.hidden, (axis, first), init.child(axis), kernel_init=torch_default
        )
        self.state, self.action = make(config.observations, "critic/input"), make(config.actions, "critic/actions")
        self.trunk = Trunk(config.hidden, config.depth - 1, "critic", init.child("trunk"))
        self.value = init.param(
            "value", (config.hidden,), (f"critic/layer{config.depth - 1}/mlp",), small_uniform, Kind.MATRIX
        )
        self.bias = init.param("bias", (), (), small_uniform, Kind.BIAS)

    def __call__(
        self,
        observation: Float[Array, "*B O"],
        action: Float[Array, "*B A"],
        *,
        mode: str = "eval",
        key: Array | None = None,
    ) -> Float[Array, "*B"]:
        return self.trunk(self.state(observation) + self.action(action)) @ self.value[...] + self.bias[...]
