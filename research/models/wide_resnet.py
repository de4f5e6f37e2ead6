"""Wide ResNet (Zagoruyko and Komodakis 2016, arXiv 1605.07146): pre-activation blocks of two 3x3 convolutions for
CIFAR-sized images.

Its sub-networks: `width`, `inner` and `depth` per stage, where the first block of a stage stays. With `num_experts` the
convolutions of the blocks, projections included, are mixtures, an expert for each image (AdvMoE, arXiv 2308.10110), and
`dims` the widths of one pathway.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from research.models.registry import Entry, register
from research.models.routing import (
    ADVMOE,
    EXPERTS_SHRINK,
    ROUTER_COUNT,
    TINY_ROUTER,
    RoutedConfig,
)
from research.models.stages import check_image, check_stages, kept_after_first, shrunk_depths, shrunk_dims
from research.modules.axes import Init
from research.modules.features import named
from research.modules.layers import Conv, Linear, kaiming
from research.modules.norms import BatchNorm
from research.modules.routed_conv import Route, RoutedNetwork, convolution, convolve, normal_01
from research.modules.state import Stack
from research.values import Layers


@dataclass(frozen=True)
class WideResNetConfig(RoutedConfig):
    """Description of one Wide ResNet: WRN-28-10 has `depths` (4, 4, 4) and `dims` 16 x 10 x (1, 2, 4).

    `inner_dims` are the channels between the two convolutions of a block, () for dims; the other fields are as in
    `ResNetConfig`.
    """

    depths: tuple[Layers, ...] = (4, 4, 4)
    dims: tuple[int, ...] = (160, 320, 640)
    inner_dims: tuple[int, ...] = ()
    stem_dim: int = 16
    num_classes: int = 10
    in_channels: int = 3
    image_size: int = 32
    kept_layers: tuple[tuple[int, ...], ...] = ()
    unroll: bool = False
    remat: str = "none"

    family: ClassVar[str] = "wide_resnet"
    derived: ClassVar[dict[str, tuple[str, ...]]] = {"inner_dims": ("dims",), "kept_layers": ("depths",)}
    elastic: ClassVar[dict[str, str]] = {
        "width": "fraction of the channels of every stage, inner ones included",
        "depth": "fraction of the blocks of each stage, or whole numbers joined by ':'; the first block stays",
        "inner": "fraction of the channels inside the blocks",
        "experts": EXPERTS_SHRINK,
        "keep": "which blocks stay: first or even",
    }

    def __post_init__(self):
        self.check_routing()
        if not self.inner_dims:
            object.__setattr__(self, "inner_dims", self.dims)
        check_stages(self, ("dims", "inner_dims"), (self.stem_dim, self.num_classes, self.in_channels))
        check_image(self, 2 ** (len(self.depths) - 1), "larger images or fewer stages")

    def build(self, init: Init) -> nnx.Module:
        return WideResNet(self, init)

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        return kept_after_first(self)

    @property
    def embedding(self) -> tuple[int, str] | None:
        return (self.dims[-1], f"stage{len(self.dims)}/embed") if self.num_experts < 2 else None

    def input_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, self.in_channels)

    def shrink(self, *, width=1.0, depth=1.0, inner=1.0, experts=1.0, keep="first") -> "WideResNetConfig":
        """Returns the sub-network with these choices (see `elastic`); the stem follows the width of stage 1.

        Raises:
          UserError: a choice lies outside the space.
        """
        kept = shrunk_depths(self.kept_layers, depth, keep)
        return replace(
            self,
            dims=shrunk_dims(self.dims, width),
            inner_dims=shrunk_dims(shrunk_dims(self.inner_dims, width), inner, "inner"),
            stem_dim=shrunk_dims((self.stem_dim, *self.dims[1:]), width)[0],
            depths=tuple(map(len, kept)),
            kept_layers=kept,
            num_experts=self.shrunk_experts(experts),
        )


class Block(nnx.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))); where the shape changes the shortcut projects relu(norm(x))
    instead."""

    def __init__(
        self, config: WideResNetConfig, stage: int, n_in: int, source: str, scope: str, init: Init, *, stride: int = 1
    ):
        width, n_out, embed, inner = (
            config.inner_dims[stage],
            config.dims[stage],
            f"stage{stage + 1}/embed",
            f"{scope}/bottleneck",
        )
        self.first_norm = BatchNorm(n_in, source, init.child("norm0"))
        conv = functools.partial(convolution, experts=config.num_experts, implementation=config.implementation)
        self.first = conv(n_in, width, 3, (source, inner), init.child("conv0"), stride=stride)
        self.second_norm = BatchNorm(width, inner, init.child("norm1"))
        self.second = conv(width, n_out, 3, (inner, embed), init.child("conv1"))
        self.shortcut = (
            None if source == embed else conv(n_in, n_out, 1, (source, embed), init.child("shortcut"), stride=stride)
        )

    def __call__(
        self, x: Float[Array, "B H W I"], per_layer=None, *, mode: str, route: Route | None
    ) -> Float[Array, "B h w O"]:
        active = jax.nn.relu(self.first_norm(x, mode=mode))
        y = jax.nn.relu(self.second_norm(convolve(self.first, active, route), mode=mode))
        return convolve(self.second, y, route) + (
            x if self.shortcut is None else convolve(self.shortcut, active, route)
        )


class Stage(nnx.Module):
    """The first block, which projects and may stride, then the equal ones."""

    def __init__(self, config: WideResNetConfig, stage: int, init: Init):
        scope, embed = f"stage{stage + 1}", f"stage{stage + 1}/embed"
        n_in, source = (config.stem_dim, "stem") if stage == 0 else (config.dims[stage - 1], f"stage{stage}/embed")
        self.remat = config.remat
        self.block0 = Block(
            config, stage, n_in, source, f"{scope}/block0", init.child("block0"), stride=1 if stage == 0 else 2
        )
        rest = config.depths[stage] - 1
        make = lambda sub: Block(config, stage, config.dims[stage], embed, f"{scope}/layer", sub)
        self.blocks = Stack(make, rest, f"{scope}/layers", init.child("blocks"), unroll=config.unroll) if rest else None

    def __call__(self, x: Float[Array, "B H W I"], mode: str, route: Route | None) -> Float[Array, "B h w O"]:
        x = self.block0(x, mode=mode, route=route)
        return x if self.blocks is None else self.blocks(x, remat=self.remat, mode=mode, route=route)


class WideResNet(RoutedNetwork):
    """The network; `mode` is "train", "eval" or "calibrate" (see `research.modules.norms`); no `key` is needed."""

    def __init__(self, config: WideResNetConfig, init: Init):
        self.config = config
        stem = ("image", "stem")
        self.stem = Conv(
            config.in_channels, config.stem_dim, 3, stem, init.child("stem"), bias=False, kernel_init=kaiming
        )
        self.stages = nnx.List([Stage(config, i, init.child(f"stage{i}")) for i in range(len(config.depths))])
        embed = f"stage{len(config.dims)}/embed"
        self.norm = BatchNorm(config.dims[-1], embed, init.child("norm"))
        self.head = Linear(
            config.dims[-1], config.num_classes, (embed, "classes"), init.child("head"), kernel_init=normal_01
        )
        self.router = config.build_router(init)

    def embed(
        self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None, route: Route | None = None
    ) -> Float[Array, "B D"]:
        """Returns what the classifier reads; mixtures need the route."""
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            x = named(f"stage{i + 1}", stage(x, mode, route))
        return named("embedding", jax.nn.relu(self.norm(x, mode=mode)).mean((1, 2)))


VARIANTS = {
    "wrn28_10": WideResNetConfig(),
    "advmoe_wrn28_10": WideResNetConfig(dims=(80, 160, 320), stem_dim=8, num_experts=2),
}
"""WRN-28-10 for CIFAR (section 3), and AdvMoE's: two pathways of half the width, the stem halved too."""


_COUNTS = {"wrn28_10": 36_479_194, "advmoe_wrn28_10": 18_239_602 + ROUTER_COUNT}
for _name, _config in VARIANTS.items():
    _tiny: dict[str, Any] = dict(dims=(8, 12, 16), num_classes=10, image_size=8, depths=(2, 3, 2), stem_dim=8)
    _origin = ADVMOE if _config.num_experts else ("arXiv 1605.07146", "github.com/szagoruyko/wide-residual-networks")
    register(Entry(_name, _config, *_origin, _tiny | (TINY_ROUTER if _config.num_experts else {}), _COUNTS[_name]))
