"""LeNet-5 (LeCun et al. 1998, "Gradient-based learning applied to document recognition", section II.B) in today's form.

Two 5x5 convolutions (6 and 16 maps), each with ReLU and 2x2 max-pooling, then layers of 120, 84 and the classes; every
map of the second convolution reads all of the first. The layer of 120 is a convolution over what is left of the image,
5x5. Images of 28 pixels are padded to 32. Its sub-networks: `width`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from research.errors import UserError
from research.models.base import ModelConfig
from research.models.registry import Entry, register
from research.modules import elastic
from research.modules.axes import Init
from research.modules.features import named
from research.modules.layers import Conv, Linear
from research.ops.pooling import max_pool_2x2

PADDING = {28: 2, 32: 0}
"""Side of the image in pixels -> padding on every side."""

he = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")
torch_default = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclass(frozen=True)
class LeNetConfig(ModelConfig):
    """Description of one LeNet-5: `maps` of the convolutions, `hidden` units of the two layers behind them."""

    maps: tuple[int, int] = (6, 16)
    hidden: tuple[int, int] = (120, 84)
    num_classes: int = 10
    in_channels: int = 1
    image_size: int = 28

    family: ClassVar[str] = "lenet"
    elastic: ClassVar[dict[str, str]] = {"width": "fraction of the maps and hidden units"}

    def __post_init__(self):
        if len(self.maps) != 2 or len(self.hidden) != 2:
            raise UserError(f"lenet: maps={self.maps} and hidden={self.hidden} need two entries each")
        bad = [n for n in (*self.maps, *self.hidden, self.num_classes, self.in_channels) if n < 1]
        if bad:
            raise UserError(
                f"lenet: {bad[0]} among maps, hidden units, channels or classes; valid: whole numbers from 1"
            )
        if self.image_size not in PADDING:
            raise UserError(
                f"lenet: image_size={self.image_size}; valid: {', '.join(map(str, PADDING))} (data.augment.pad_to=28)"
            )

    def build(self, init: Init) -> nnx.Module:
        return LeNet(self, init)

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        return {}

    @property
    def embedding(self) -> tuple[int, str] | None:
        return (self.hidden[-1], "layer2/mlp")

    def input_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, self.in_channels)

    def shrink(self, *, width=1.0) -> "LeNetConfig":
        """Returns the sub-network with this width.

        Raises:
          UserError: a width outside (0, 1].
        """

        def cut(sizes: tuple[int, int]) -> tuple[int, int]:
            first, second = (elastic.scaled(n, width, 2, "width") for n in sizes)
            return first, second

        return replace(self, maps=cut(self.maps), hidden=cut(self.hidden))


class LeNet(nnx.Module):
    """The network; nothing in it depends on `mode` or `key`."""

    def __init__(self, config: LeNetConfig, init: Init):
        (m1, m2), (h1, h2) = config.maps, config.hidden
        padding = PADDING[config.image_size]
        axes = ("image", "conv1/bottleneck", "conv2/bottleneck", "layer1/mlp", "layer2/mlp", "classes")
        conv = lambda i, n_in, n_out, pad: Conv(
            n_in, n_out, 5, (axes[i], axes[i + 1]), init.child(f"conv{i}"), padding=pad, kernel_init=he
        )
        self.conv1 = conv(0, config.in_channels, m1, padding)
        self.conv2 = conv(1, m1, m2, 0)
        self.layer1 = conv(2, m2, h1, 0)
        self.layer2 = Linear(h1, h2, axes[3:5], init.child("layer2"), kernel_init=he)
        self.head = Linear(h2, config.num_classes, axes[4:6], init.child("head"), kernel_init=torch_default)

    def embed(self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None) -> Float[Array, "B D"]:
        """Returns what the classifier reads: the layer of 84."""
        for i, conv in enumerate((self.conv1, self.conv2)):
            x = named(f"stage{i + 1}", max_pool_2x2(jax.nn.relu(conv(x))))
        x = jax.nn.relu(self.layer1(x))[:, 0, 0]
        return named("embedding", jax.nn.relu(self.layer2(x)))

    def __call__(
        self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None
    ) -> Float[Array, "B N"]:
        return self.head(self.embed(x, mode=mode, key=key))


VARIANTS = {"lenet5": LeNetConfig()}


register(
    Entry(
        "lenet5", VARIANTS["lenet5"], "LeCun et al. 1998", "this repository", dict(maps=(4, 6), hidden=(12, 8)), 61_706
    )
)
