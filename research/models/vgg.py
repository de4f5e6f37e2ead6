"""VGG with batch norm (Simonyan and Zisserman 2014, arXiv 1409.1556) in the variant for CIFAR-sized images of the
AdvMoE release.

Convolutions have no bias, no pooling follows the last stage, the head averages to 2x2 pixels and has three layers. Its
sub-networks: `width` and `depth` per stage, where the first convolution of a stage stays. With `num_experts` all
convolutions but the first are mixtures, an expert for each image (AdvMoE, arXiv 2308.10110), and `dims` the widths of
one pathway.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from research.models.registry import Entry, register
from research.models.resnet import ConvNorm
from research.models.routing import (
    ADVMOE,
    EXPERTS_SHRINK,
    ROUTER_COUNT,
    TINY_ROUTER,
    RoutedConfig,
)
from research.models.stages import check_image, check_stages, kept_after_first, shrunk_depths, shrunk_dims
from research.modules import elastic
from research.modules.axes import Init
from research.modules.features import named
from research.modules.layers import Conv, Linear
from research.modules.routed_conv import Route, RoutedNetwork, normal_01
from research.modules.state import Stack
from research.values import Layers

GRID = 2  # side of the map that the head reads


@dataclass(frozen=True)
class VGGConfig(RoutedConfig):
    """Description of one VGG: VGG-16 has `depths` (2, 2, 3, 3, 3); `hidden_dim` units in both hidden layers of the
    head.

    The other fields are as in `ResNetConfig`; `kept_layers` counts the convolutions of a stage.
    """

    depths: tuple[Layers, ...] = (2, 2, 3, 3, 3)
    dims: tuple[int, ...] = (64, 128, 256, 512, 512)
    hidden_dim: int = 256
    num_classes: int = 10
    in_channels: int = 3
    image_size: int = 32
    kept_layers: tuple[tuple[int, ...], ...] = ()
    unroll: bool = False
    remat: str = "none"

    renamed: ClassVar[dict[str, str]] = {"hidden": "hidden_dim"}
    family: ClassVar[str] = "vgg"
    derived: ClassVar[dict[str, tuple[str, ...]]] = {"kept_layers": ("depths",)}
    elastic: ClassVar[dict[str, str]] = {
        "width": "fraction of the channels of every stage",
        "depth": "fraction of the convolutions of each stage, or whole numbers joined by ':'; the first stays",
        "ffn": "fraction of the hidden units of the head",
        "experts": EXPERTS_SHRINK,
        "keep": "which convolutions stay: first or even",
    }

    def __post_init__(self):
        self.check_routing()
        check_stages(self, ("dims",), (self.hidden_dim, self.num_classes, self.in_channels))
        check_image(self, 2 ** (len(self.depths) - 1), "larger images or fewer stages")

    def build(self, init: Init) -> nnx.Module:
        return VGG(self, init)

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        return kept_after_first(self)

    @property
    def embedding(self) -> tuple[int, str] | None:
        return (self.hidden_dim, "second/mlp") if self.num_experts < 2 else None

    def input_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, self.in_channels)

    def shrink(self, *, width=1.0, depth=1.0, ffn=1.0, experts=1.0, keep="first") -> "VGGConfig":
        """Returns the sub-network with these choices (see `elastic`).

        Raises:
          UserError: a choice lies outside the space.
        """
        dims, kept = shrunk_dims(self.dims, width), shrunk_depths(self.kept_layers, depth, keep)
        hidden, count = elastic.scaled(self.hidden_dim, ffn, 4, "ffn"), self.shrunk_experts(experts)
        return replace(
            self, dims=dims, depths=tuple(map(len, kept)), kept_layers=kept, hidden_dim=hidden, num_experts=count
        )


class Layer(nnx.Module):
    """relu(norm(conv(x)))."""

    def __init__(self, config: VGGConfig, stage: int, n_in: int, source: str, init: Init, *, experts: int):
        embed = f"stage{stage + 1}/embed"
        self.conv = ConvNorm(
            n_in, config.dims[stage], 3, (source, embed), init, experts=experts, implementation=config.implementation
        )

    def __call__(
        self, x: Float[Array, "B H W I"], per_layer=None, *, mode: str, route: Route | None
    ) -> Float[Array, "B H W O"]:
        return jax.nn.relu(self.conv(x, mode, route))


class Stage(nnx.Module):
    """The first convolution, which changes the width, then the equal ones."""

    def __init__(self, config: VGGConfig, stage: int, init: Init):
        embed, experts = f"stage{stage + 1}/embed", config.num_experts
        n_in, source = (config.dims[stage - 1], f"stage{stage}/embed") if stage else (config.in_channels, "image")
        self.remat = config.remat
        self.first = Layer(config, stage, n_in, source, init.child("first"), experts=experts if stage else 0)
        rest = config.depths[stage] - 1
        make = lambda sub: Layer(config, stage, config.dims[stage], embed, sub, experts=experts)
        self.rest = (
            Stack(make, rest, f"stage{stage + 1}/layers", init.child("rest"), unroll=config.unroll) if rest else None
        )

    def __call__(self, x: Float[Array, "B H W I"], mode: str, route: Route | None) -> Float[Array, "B H W O"]:
        x = self.first(x, mode=mode, route=route)
        return x if self.rest is None else self.rest(x, remat=self.remat, mode=mode, route=route)


def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Maximum over 2x2 windows of stride 2; a last odd row or column is left out."""
    return jax.lax.reduce_window(x, np.array(-np.inf, x.dtype), jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def adaptive_mean(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B S S C"]:
    """Averages to size x size pixels: the i-th of a side of H reads rows floor(i H / size) to ceil((i + 1) H / size),
    as PyTorch's does."""
    for axis in (1, 2):
        length = x.shape[axis]
        ends = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
        x = jnp.stack([jax.lax.slice_in_dim(x, start, end, axis=axis).mean(axis) for start, end in ends], axis)
    return x


class VGG(RoutedNetwork):
    """The network; `mode` is "train", "eval" or "calibrate" (see `research.modules.norms`); no `key` is needed."""

    def __init__(self, config: VGGConfig, init: Init):
        self.config = config
        self.stages = nnx.List([Stage(config, i, init.child(f"stage{i}")) for i in range(len(config.depths))])
        embed, hidden = f"stage{len(config.dims)}/embed", config.hidden_dim
        # A convolution over all GRID x GRID pixels is the linear layer on the flattened map, with its axes kept apart.
        axes = (embed, "first/mlp")
        self.flat = Conv(config.dims[-1], hidden, GRID, axes, init.child("flat"), padding=0, kernel_init=normal_01)
        self.middle = Linear(hidden, hidden, ("first/mlp", "second/mlp"), init.child("middle"), kernel_init=normal_01)
        self.head = Linear(
            hidden, config.num_classes, ("second/mlp", "classes"), init.child("head"), kernel_init=normal_01
        )
        self.router = config.build_router(init)

    def embed(
        self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None, route: Route | None = None
    ) -> Float[Array, "B D"]:
        """Returns what the classifier reads; mixtures need the route."""
        for i, stage in enumerate(self.stages):
            x = named(f"stage{i + 1}", stage(max_pool(x) if i else x, mode, route))
        x = jax.nn.relu(self.flat(adaptive_mean(x, GRID))[:, 0, 0])
        return named("embedding", jax.nn.relu(self.middle(x)))


VARIANTS = {
    "vgg16": VGGConfig(),
    "advmoe_vgg16": VGGConfig(dims=(32, 64, 128, 256, 256), num_experts=2),
}
"""VGG-16 (configuration D) for CIFAR, and AdvMoE's: two pathways of half the width."""


_COUNTS = {"vgg16": 15_311_818, "advmoe_vgg16": 7_690_218 + ROUTER_COUNT}
for _name, _config in VARIANTS.items():
    _tiny: dict[str, Any] = dict(dims=(8, 12, 16), num_classes=10, image_size=8, depths=(2, 2, 3), hidden_dim=8)
    _origin = ADVMOE if _config.num_experts else ("arXiv 1409.1556", ADVMOE[1])
    register(Entry(_name, _config, *_origin, _tiny | (TINY_ROUTER if _config.num_experts else {}), _COUNTS[_name]))
