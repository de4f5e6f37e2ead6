"""ResNet (He et al. 2016, arXiv 1512.03385) in torchvision's implementation: stride on the 3x3 of the bottleneck
(v1.5).

Its sub-networks: `width` (stage and inner channels), `inner` (channels inside the blocks) and `depth` per stage,
where the first block of a stage, which may stride and project, always stays. `stem` "small" is for CIFAR-sized images,
"medium" halves them at once, for little compute. With `num_experts` the convolutions of the blocks are mixtures, an
expert for each image (AdvMoE, arXiv 2308.10110), and `dims` the widths of one pathway.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from research.errors import UserError
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
from research.modules.layers import Linear, ones, zeros
from research.modules.norms import BatchNorm
from research.modules.routed_conv import Route, RoutedNetwork, convolution, convolve
from research.modules.state import Stack
from research.values import Layers

EXPANSION = {"basic": 1, "bottleneck": 4}
STEMS = {"imagenet": (7, 2, 2), "medium": (5, 2, 1), "small": (3, 1, 1)}
"""Stem -> (kernel size, stride, stride of the max-pool behind it, 1 = none)."""

torch_default = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclass(frozen=True)
class ResNetConfig(RoutedConfig):
    """Description of one ResNet.

    `dims` are the output channels of the stages; `inner_dims` those inside its blocks, () for dims / 4 in a
    bottleneck and dims in a basic block; `stem_dim` 0 stands for inner_dims[0]. `zero_init_residual` starts the last
    norm of each block at zero. `kept_layers` holds, for a sub-network, the indices of each stage's blocks in the full
    model. The fields of routing are those of `RoutedConfig`.
    """

    block: str = "basic"
    depths: tuple[Layers, ...] = (2, 2, 2, 2)
    dims: tuple[int, ...] = (64, 128, 256, 512)
    inner_dims: tuple[int, ...] = ()
    stem_dim: int = 0
    stem: str = "imagenet"
    num_classes: int = 1000
    in_channels: int = 3
    image_size: int = 224
    zero_init_residual: bool = False
    kept_layers: tuple[tuple[int, ...], ...] = ()
    unroll: bool = False
    remat: str = "none"

    renamed: ClassVar[dict[str, str]] = {"zero_init": "zero_init_residual"}
    family: ClassVar[str] = "resnet"
    derived: ClassVar[dict[str, tuple[str, ...]]] = {
        "inner_dims": ("dims", "block"),
        "stem_dim": ("dims", "block", "inner_dims"),
        "kept_layers": ("depths",),
    }
    elastic: ClassVar[dict[str, str]] = {
        "width": "fraction of the channels of every stage, inner ones included",
        "depth": "fraction of the blocks of each stage, or whole numbers joined by ':'; the first block stays",
        "inner": "fraction of the channels inside the blocks",
        "experts": EXPERTS_SHRINK,
        "keep": "which blocks stay: first or even",
    }

    def __post_init__(self):
        self.check_routing()
        if self.block not in EXPANSION:
            raise UserError(f"resnet: unknown block {self.block!r}; valid: {', '.join(EXPANSION)}")
        if self.stem not in STEMS:
            raise UserError(f"resnet: unknown stem {self.stem!r}; valid: {', '.join(STEMS)}")
        if not self.inner_dims:
            object.__setattr__(self, "inner_dims", tuple(d // EXPANSION[self.block] for d in self.dims))
        if not self.stem_dim:
            object.__setattr__(self, "stem_dim", self.dims[0] if self.block == "basic" else self.inner_dims[0])
        check_stages(self, ("dims", "inner_dims"), (self.num_classes, self.in_channels))
        _, stem_stride, pool = STEMS[self.stem]
        stride = stem_stride * pool * 2 ** (len(self.depths) - 1)
        check_image(self, stride, "stem='small' or larger images")

    def build(self, init: Init) -> nnx.Module:
        return ResNet(self, init)

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        return kept_after_first(self)

    @property
    def embedding(self) -> tuple[int, str] | None:
        return (self.dims[-1], f"stage{len(self.dims)}/embed") if self.num_experts < 2 else None

    def input_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, self.in_channels)

    def shrink(self, *, width=1.0, depth=1.0, inner=1.0, experts=1.0, keep="first") -> "ResNetConfig":
        """Returns the sub-network with these choices (see `elastic`).

        Raises:
          UserError: a choice lies outside the space.
        """
        dims, kept = shrunk_dims(self.dims, width), shrunk_depths(self.kept_layers, depth, keep)
        inner_dims = shrunk_dims(shrunk_dims(self.inner_dims, width), inner, "inner")
        stem_dim = shrunk_dims((self.stem_dim, *self.dims[1:]), width)[0]
        small = replace(
            self, dims=dims, inner_dims=inner_dims, stem_dim=stem_dim, depths=tuple(map(len, kept)), kept_layers=kept
        )
        if stem_axis(small) != stem_axis(self):
            raise UserError(
                f"sub-network width={width} gives stem and stage 1 equally many channels ({stem_dim}), "
                "which the full network projects; "
                "valid: a larger width"
            )
        return replace(small, num_experts=self.shrunk_experts(experts))


class ConvNorm(nnx.Module):
    """Convolution without bias, of each image's expert where `experts` > 0, then batch norm, which the experts
    share."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        size: int,
        axes: tuple[str, str],
        init: Init,
        *,
        stride: int = 1,
        scale_init=ones,
        experts: int = 0,
        implementation: str = "auto",
    ):
        self.conv = convolution(
            n_in, n_out, size, axes, init.child("conv"), stride=stride, experts=experts, implementation=implementation
        )
        self.norm = BatchNorm(n_out, axes[1], init.child("norm"), scale_init=scale_init)

    def __call__(self, x: Float[Array, "B H W I"], mode: str, route: Route | None = None) -> Float[Array, "B h w O"]:
        return self.norm(convolve(self.conv, x, route), mode=mode)


class Block(nnx.Module):
    """relu(shortcut(x) + branch(x)): 3x3 - 3x3 (basic), or 1x1 - 3x3 - 1x1 (bottleneck); the first 3x3 strides.

    Args:
      n_in, source: size and name of the input's channels; a projection is the shortcut where `source` is not the
        stage's own.
      scope: scope of the axes that belong to this block alone.
    """

    def __init__(
        self, config: ResNetConfig, stage: int, n_in: int, source: str, scope: str, init: Init, *, stride: int = 1
    ):
        width, n_out, embed = config.inner_dims[stage], config.dims[stage], f"stage{stage + 1}/embed"
        first, second = f"{scope}/first/bottleneck", f"{scope}/second/bottleneck"
        last = zeros if config.zero_init_residual else ones
        sizes: list[tuple[int, int, int, tuple[str, str], int]]
        if config.block == "basic":
            sizes = [(n_in, width, 3, (source, first), stride), (width, n_out, 3, (first, embed), 1)]
        else:
            sizes = [
                (n_in, width, 1, (source, first), 1),
                (width, width, 3, (first, second), stride),
                (width, n_out, 1, (second, embed), 1),
            ]
        routed: dict[str, Any] = {"experts": config.num_experts, "implementation": config.implementation}
        self.convs = nnx.List(
            [
                ConvNorm(
                    inputs,
                    outputs,
                    kernel,
                    axes,
                    init.child(f"conv{i}"),
                    stride=s,
                    scale_init=last if i == len(sizes) - 1 else ones,
                    **routed,
                )
                for i, (inputs, outputs, kernel, axes, s) in enumerate(sizes)
            ]
        )
        # The released networks route the projections of ImageNet's sizes and not those of CIFAR's.
        routed = routed if config.stem == "imagenet" else {}
        project = lambda: ConvNorm(n_in, n_out, 1, (source, embed), init.child("shortcut"), stride=stride, **routed)
        self.shortcut = None if source == embed else project()

    def __call__(
        self, x: Float[Array, "B H W I"], per_layer=None, *, mode: str, route: Route | None = None
    ) -> Float[Array, "B h w O"]:
        y = x
        for i, conv in enumerate(self.convs):
            y = conv(jax.nn.relu(y) if i else y, mode, route)
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x, mode, route)))


class Stage(nnx.Module):
    """The first block, which may stride and project, then the equal ones."""

    def __init__(self, config: ResNetConfig, stage: int, init: Init):
        scope, embed = f"stage{stage + 1}", f"stage{stage + 1}/embed"
        n_in, source = (
            (config.stem_dim, stem_axis(config)) if stage == 0 else (config.dims[stage - 1], f"stage{stage}/embed")
        )
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


def stem_axis(config: ResNetConfig) -> str:
    """Name of the stem's output channels: basic blocks add them to stage 1 as they are, unless stage 1 has another
    width."""
    return "stage1/embed" if config.block == "basic" and config.stem_dim == config.dims[0] else "stem"


def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Maximum over 3x3 windows of stride 2, padded by one on every side with -inf."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, np.array(-np.inf, x.dtype), jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


class ResNet(RoutedNetwork):
    """The network; `mode` is "train", "eval" or "calibrate" (see `research.modules.norms`); no `key` is needed."""

    def __init__(self, config: ResNetConfig, init: Init):
        self.config = config
        size, stride, _ = STEMS[config.stem]
        self.stem = ConvNorm(
            config.in_channels, config.stem_dim, size, ("image", stem_axis(config)), init.child("stem"), stride=stride
        )
        self.stages = nnx.List([Stage(config, i, init.child(f"stage{i}")) for i in range(len(config.depths))])
        axes = (f"stage{len(config.dims)}/embed", "classes")
        self.head = Linear(config.dims[-1], config.num_classes, axes, init.child("head"), kernel_init=torch_default)
        self.router = config.build_router(init)

    def features(
        self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None, route: Route | None = None
    ) -> list[Array]:
        """Returns the outputs of the stem and of every stage, in order; mixtures need the route."""
        x = jax.nn.relu(self.stem(x, mode))
        outs = [max_pool(x) if STEMS[self.config.stem][2] == 2 else x]
        for i, stage in enumerate(self.stages):
            outs.append(named(f"stage{i + 1}", stage(outs[-1], mode, route)))
        return outs

    def embed(
        self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None, route: Route | None = None
    ) -> Float[Array, "B D"]:
        """Returns what the classifier reads; mixtures need the route."""
        return named("embedding", self.features(x, mode=mode, route=route)[-1].mean((1, 2)))


def _variant(block: str, depths: tuple[int, ...], width: int = 64, **more) -> ResNetConfig:
    dims = tuple(width * EXPANSION[block] * 2**i for i in range(len(depths)))
    return ResNetConfig(block=block, depths=depths, dims=dims, **more)


_CIFAR: dict[str, Any] = {"stem": "small", "num_classes": 10, "image_size": 32}

VARIANTS = {
    "resnet18": _variant("basic", (2, 2, 2, 2)),
    "resnet34": _variant("basic", (3, 4, 6, 3)),
    "resnet50": _variant("bottleneck", (3, 4, 6, 3)),
    "resnet101": _variant("bottleneck", (3, 4, 23, 3)),
    "resnet152": _variant("bottleneck", (3, 8, 36, 3)),
    "resnet18_cifar": _variant("basic", (2, 2, 2, 2), **_CIFAR),
    "resnet20_cifar": _variant("basic", (3, 3, 3), 16, **_CIFAR),
    "resnet56_cifar": _variant("basic", (9, 9, 9), 16, **_CIFAR),
    "advmoe_resnet18": _variant("basic", (2, 2, 2, 2), 32, stem_dim=64, num_experts=2, **_CIFAR),
}
"""Table 1 and section 4.2 of the paper; the CIFAR nets project where they change width (option B). The last is
AdvMoE's: two pathways of half the width behind a stem of the whole."""


_COUNTS = {
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160,
    "resnet152": 60_192_808, "resnet18_cifar": 11_173_962, "advmoe_resnet18": 5_565_450 + ROUTER_COUNT,
}  # fmt: skip
for _name, _config in VARIANTS.items():
    _width = 8 * EXPANSION[_config.block]
    _depths = (2, 3, 1, 2)[: len(_config.depths)]
    _dims = (_width, 3 * _width // 2, 2 * _width, 3 * _width)[: len(_depths)]
    _tiny: dict[str, Any] = dict(
        dims=_dims, depths=_depths, num_classes=10, image_size=16 if _config.stem == "small" else 32
    )
    _origin = ADVMOE if _config.num_experts else ("arXiv 1512.03385", "github.com/pytorch/vision")
    register(
        Entry(
            _name,
            _config,
            *_origin,
            _tiny | ({**TINY_ROUTER, "stem_dim": 12} if _config.num_experts else {}),
            _COUNTS.get(_name),
        )
    )
