"""UniRepLKNet (Ding et al., CVPR 2024, arXiv 2311.15599): a convnet of dilated re-parameterised large kernels.

Nine variants, training and merged (deployed) form. Its sub-networks: `width`, `depth` per stage,
`ffn` (hidden units of the FFN) and `kernel` (centre crop along the released tables).
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.errors import UserError
from research.models.base import ChoosesImplementations
from research.models.implementations import check_implementation
from research.models.registry import Entry, register
from research.modules import elastic
from research.modules.axes import Init, Kind
from research.modules.dilated_reparam import (
    BRANCHES,
    DilatedReparam,
    batch_norm_affine,
    kernel_nests,
    merge_dilated_reparam,
)
from research.modules.features import named
from research.modules.layers import Conv, DepthwiseConv, Linear, drop_path, drop_path_rates, normal_02
from research.modules.norms import BatchNorm, GeluGRN, LayerNorm
from research.modules.squeeze_excite import SqueezeExcite
from research.modules.state import Arrays, Stack
from research.ops import depthwise, reparam_conv
from research.values import Layers, Rate


@dataclass(frozen=True)
class UniRepLKNetConfig(ChoosesImplementations):
    """Description of one UniRepLKNet.

    `kernel_sizes` holds one repeating pattern per stage: ((3,), (13,), (13, 3), (13,)). `stem_strides` are the
    strides of the stem's two convolutions: (2, 2) for 224 pixels, (1, 1) or (2, 1) for small images.
    `kept_layers` holds, for a sub-network, the indices in the full model of each stage's repetitions.
    """

    depths: tuple[Layers, ...] = (2, 2, 6, 2)
    dims: tuple[int, ...] = (40, 80, 160, 320)
    kernel_sizes: tuple[tuple[int, ...], ...] = ((3,), (13,), (13,), (13,))
    mlp_dims: tuple[int, ...] = ()
    num_classes: int = 1000
    in_channels: int = 3
    image_size: int = 224
    stem_strides: tuple[int, int] = (2, 2)
    drop_path_rate: Rate = 0.0
    layer_scale_init_value: float = 1e-6
    head_init_scale: float = 1.0
    deploy: bool = False
    kept_layers: tuple[tuple[int, ...], ...] = ()
    implementation: str = "auto"
    unroll: bool = False
    remat: str = "none"

    renamed: ClassVar[dict[str, str]] = {
        "kernels": "kernel_sizes",
        "layer_scale": "layer_scale_init_value",
        "head_scale": "head_init_scale",
    }
    family: ClassVar[str] = "unireplknet"
    derived: ClassVar[dict[str, tuple[str, ...]]] = {"mlp_dims": ("dims",), "kept_layers": ("depths", "kernel_sizes")}
    elastic: ClassVar[dict[str, str]] = {
        "width": "fraction of the channels of every stage",
        "depth": "fraction of the blocks of each stage, or whole numbers joined by ':'",
        "ffn": "fraction of the hidden units of each FFN",
        "kernel": "largest kernel size, cropped around its centre (13 > 11 > 9 > 7, 15 > 7)",
        "keep": "which blocks stay: first or even",
    }

    def __post_init__(self):
        check_implementation(
            "unireplknet",
            self.implementation,
            {depthwise.OP: depthwise.IMPLEMENTATIONS, reparam_conv.OP: reparam_conv.IMPLEMENTATIONS},
        )
        if not self.mlp_dims:
            object.__setattr__(self, "mlp_dims", tuple(4 * d for d in self.dims))
        stages = len(self.depths)
        if not len(self.dims) == len(self.kernel_sizes) == len(self.mlp_dims) == stages:
            raise UserError("unireplknet: depths, dims, kernels and mlp_dims need one entry per stage")
        if not self.kept_layers:
            reps = [d // len(k) for d, k in zip(self.depths, self.kernel_sizes, strict=True)]
            object.__setattr__(self, "kept_layers", tuple(tuple(range(r)) for r in reps))
        for i, (depth, pattern) in enumerate(zip(self.depths, self.kernel_sizes, strict=True)):
            if depth % len(pattern):
                raise UserError(
                    f"unireplknet: stage {i + 1} has {depth} blocks, not a multiple of its kernel pattern {pattern}"
                )
            bad = [k for k in pattern if k not in (0, 3, 5) and (k not in BRANCHES or k < 7)]
            if bad:
                raise UserError(
                    f"unireplknet: kernel size {bad[0]} in stage {i + 1}; valid: 0, 3, 5, 7, 9, 11, 13, 15, 17"
                )
        if any(d % 4 for d in self.dims):
            raise UserError(f"unireplknet: channels {self.dims} must be multiples of 4")
        if len(self.stem_strides) != 2 or not all(isinstance(s, int) and s >= 1 for s in self.stem_strides):
            raise UserError(f"unireplknet: stem_strides={self.stem_strides}; valid: two whole numbers from 1")
        stride = self.stem_strides[0] * self.stem_strides[1] * 2 ** (stages - 1)
        if self.image_size < stride:
            raise UserError(
                f"unireplknet: images of {self.image_size} pixels are smaller than the total stride {stride}; "
                "use stem_strides=(1, 1) or larger images"
            )

    def build(self, init: Init) -> nnx.Module:
        return UniRepLKNet(self, init)

    @property
    def merges(self) -> bool:
        return True

    def deployed(self) -> "UniRepLKNetConfig":
        return replace(self, deploy=True)

    def merge(self, params: Arrays, stats: Arrays) -> tuple["UniRepLKNetConfig", Arrays, Arrays]:
        return merge_reparam(self, params, stats)

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        return {f"stage{i + 1}/layers": kept for i, kept in enumerate(self.kept_layers)}

    @property
    def embedding(self) -> tuple[int, str] | None:
        return (self.dims[-1], f"stage{len(self.dims)}/embed")

    def input_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, self.in_channels)

    def shrink(self, *, width=1.0, depth=1.0, ffn=1.0, kernel=None, keep="first") -> "UniRepLKNetConfig":
        """Returns the sub-network with these choices (see `elastic`).

        Raises:
          UserError: a choice lies outside the space.
        """
        stages = len(self.depths)
        dims = tuple(
            elastic.scaled(d, w, 4, "width")
            for d, w in zip(self.dims, elastic.per_stage(width, stages, "width"), strict=True)
        )
        fractions = elastic.per_stage(ffn, stages, "ffn")
        ratios = [m / d for m, d in zip(self.mlp_dims, self.dims, strict=True)]
        mlp = tuple(elastic.scaled(round(d * r), f, 4, "ffn") for d, r, f in zip(dims, ratios, fractions, strict=True))
        kept = []
        for i, choice in enumerate(elastic.per_stage(depth, stages, "depth")):
            period = len(self.kernel_sizes[i])
            count = elastic.depth_count(choice, self.depths[i], period, "depth") // period
            kept.append(elastic.kept_layers(self.kept_layers[i], count, keep))
        kernels = tuple(
            tuple(crop_kernel(k, limit) for k in pattern)
            for pattern, limit in zip(self.kernel_sizes, elastic.per_stage(kernel, stages, "kernel"), strict=True)
        )
        depths = tuple(len(k) * len(p) for k, p in zip(kept, self.kernel_sizes, strict=True))
        return replace(self, dims=dims, mlp_dims=mlp, depths=depths, kernel_sizes=kernels, kept_layers=tuple(kept))


def crop_kernel(size: int, limit: int | None) -> int:
    """Returns the size of a kernel cropped to at most `limit`; small kernels (3, 5) stay.

    Raises:
      UserError: the released branch tables do not nest.
    """
    if limit is None or size < 7 or limit == size:
        return size
    valid = [k for k in BRANCHES if 7 <= k <= size and kernel_nests(k, size)]
    if limit not in valid and limit < size:
        raise UserError(f"sub-network kernel={limit} is outside its space; a kernel of {size} crops to {valid}")
    return min(size, limit)


class Block(nnx.Module):
    """One block (section 3.2): x + drop_path(layer_scale * FFN(SE(BN(depthwise(x)))))."""

    def __init__(self, config: UniRepLKNetConfig, stage: int, size: int, scope: str, init: Init):
        channels, hidden = config.dims[stage], config.mlp_dims[stage]
        embed, mlp = f"stage{stage + 1}/embed", f"{scope}/mlp"
        self.drop, self.deploy, self.large = config.drop_path_rate > 0, config.deploy, size >= 7 and not config.deploy
        dw: Any = None
        if self.large:
            dw = DilatedReparam(channels, size, embed, init.child("dw"), implementation=config.implementation)
        elif size:
            dw = DepthwiseConv(
                channels, size, embed, init.child("dw"), bias=config.deploy, implementation=config.implementation
            )
        self.dw = dw
        self.norm = None if config.deploy or size == 0 else BatchNorm(channels, embed, init.child("norm"))
        self.se = SqueezeExcite(channels, embed, f"{scope}/squeeze", init.child("se"))
        self.up = Linear(channels, hidden, (embed, mlp), init.child("up"))
        self.grn = GeluGRN(hidden, mlp, init.child("grn"), bias=not config.deploy)
        self.down = Linear(hidden, channels, (mlp, embed), init.child("down"), bias=config.deploy)
        if not config.deploy:
            self.down_norm = BatchNorm(channels, embed, init.child("down_norm"))
            scale = jax.nn.initializers.constant(config.layer_scale_init_value)
            self.layer_scale = init.param("layer_scale", (channels,), (embed,), scale, Kind.GAIN)

    def __call__(
        self, x: Float[Array, "B H W C"], rate: Array, key: Array | None, mode: str
    ) -> Float[Array, "B H W C"]:
        u = x
        if self.dw is not None:
            u = self.dw(x, mode=mode) if self.large else self.dw(x)
        if self.norm is not None:
            u = self.norm(u, mode=mode)
        y = self.down(self.grn(self.up(self.se(u))))
        if not self.deploy:
            y = self.down_norm(y, mode=mode) * self.layer_scale[...].astype(y.dtype)
        if self.drop and mode == "train" and key is not None:
            y = drop_path(y, rate, key)
        return x + y


class Repetition(nnx.Module):
    """The blocks of one repetition of a stage's kernel pattern."""

    def __init__(self, config: UniRepLKNetConfig, stage: int, init: Init):
        pattern = config.kernel_sizes[stage]
        self.phases = nnx.List(
            [
                Block(config, stage, k, f"stage{stage + 1}/layer/phase{j}", init.child(f"phase{j}"))
                for j, k in enumerate(pattern)
            ]
        )

    def __call__(self, x, per_layer, *, mode, key):
        for j, block in enumerate(self.phases):
            block_key = None if key is None else jax.random.fold_in(key, per_layer["index"] * len(self.phases) + j)
            x = block(x, per_layer["rate"][j], block_key, mode)
        return x


class Stem(nnx.Module):
    """conv3x3 - LN - GELU - conv3x3 - LN, to half the channels and then all."""

    def __init__(self, config: UniRepLKNetConfig, init: Init):
        c = config.dims[0]
        first, second = config.stem_strides
        self.conv1 = Conv(config.in_channels, c // 2, 3, ("image", "stem"), init.child("conv1"), stride=first)
        self.norm1 = LayerNorm(c // 2, "stem", init.child("norm1"))
        self.conv2 = Conv(c // 2, c, 3, ("stem", "stage1/embed"), init.child("conv2"), stride=second)
        self.norm2 = LayerNorm(c, "stage1/embed", init.child("norm2"))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w E"]:
        x = jax.nn.gelu(self.norm1(self.conv1(x)), approximate=False)
        return self.norm2(self.conv2(x))


class Downsample(nnx.Module):
    """conv3x3 of stride 2, then LN (the opposite order of ConvNeXt)."""

    def __init__(self, config: UniRepLKNetConfig, stage: int, init: Init):
        c_in, c_out = config.dims[stage - 1 : stage + 1]
        axes = (f"stage{stage}/embed", f"stage{stage + 1}/embed")
        self.conv = Conv(c_in, c_out, 3, axes, init.child("conv"), stride=2)
        self.norm = LayerNorm(c_out, axes[1], init.child("norm"))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w E"]:
        return self.norm(self.conv(x))


class UniRepLKNet(nnx.Module):
    """The network; `mode` is "train", "eval" or "calibrate" (see `research.modules.norms`)."""

    def __init__(self, config: UniRepLKNetConfig, init: Init):
        self.config = config
        stages = range(len(config.depths))
        self.reduce = nnx.List(
            [Stem(config, init.child("stem"))] + [Downsample(config, i, init.child(f"down{i}")) for i in stages[1:]]
        )
        self.stages = nnx.List(
            [
                Stack(
                    functools.partial(Repetition, config, i),
                    config.depths[i] // len(config.kernel_sizes[i]),
                    f"stage{i + 1}/layers",
                    init.child(f"stage{i}"),
                    unroll=config.unroll,
                )
                for i in stages
            ]
        )
        last = f"stage{len(config.dims)}/embed"
        self.norm = LayerNorm(config.dims[-1], last, init.child("norm"))
        head_init = lambda key, shape, dtype: config.head_init_scale * normal_02(key, shape, dtype)
        self.head = Linear(
            config.dims[-1], config.num_classes, (last, "classes"), init.child("head"), kernel_init=head_init
        )

    def features(self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None) -> list[Array]:
        """Returns the outputs of the stem or downsampling and of the blocks of every stage, in order."""
        rates = drop_path_rates(self.config.drop_path_rate, sum(self.config.depths))
        outs, start = [], 0
        for i, (reduce, stage) in enumerate(zip(self.reduce, self.stages, strict=True)):
            x = reduce(x)
            outs.append(x)
            depth, period = self.config.depths[i], len(self.config.kernel_sizes[i])
            per_layer = {
                "rate": jnp.asarray(rates[start : start + depth], jnp.float32).reshape(-1, period),
                "index": jnp.arange(depth // period),
            }
            stage_key = None if key is None else jax.random.fold_in(key, i)
            x = stage(x, xs=per_layer, remat=self.config.remat, mode=mode, key=stage_key)
            outs.append(named(f"stage{i + 1}", x))
            start += depth
        return outs

    def embed(self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None) -> Float[Array, "B D"]:
        """Returns what the classifier reads."""
        return named("embedding", self.norm(self.features(x, mode=mode, key=key)[-1].mean((1, 2))))

    def __call__(
        self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None
    ) -> Float[Array, "B N"]:
        return self.head(self.embed(x, mode=mode, key=key))


def merge_reparam(config: UniRepLKNetConfig, params: Arrays, stats: Arrays) -> tuple[UniRepLKNetConfig, Arrays, Arrays]:
    """Returns (config, params, stats) of the merged network, equal in "eval" mode (facts: section 1.4 of the sheet).

    Every branch, batch norm, GRN offset and layer scale is folded into one depthwise kernel and one linear layer.
    """
    if config.deploy:
        return config, params, stats
    merged = dict(params)
    for i, pattern in enumerate(config.kernel_sizes):
        for j, size in enumerate(pattern):
            prefix = f"stages/{i}/layer/phases/{j}"
            old = {name: merged.pop(name) for name in list(merged) if name.startswith(prefix + "/")}
            merged |= {k: v for k, v in old.items() if "/se/" in k or "/up/" in k} | _merge_block(
                old, stats, prefix, size
            )
    return replace(config, deploy=True), merged, {}


def _merge_block(params: Arrays, stats: Arrays, prefix: str, size: int) -> Arrays:
    out = {}
    bias: Array | float
    if size:
        if size >= 7:
            kernel, bias = merge_dilated_reparam(params, stats, f"{prefix}/dw")
        else:
            kernel, bias = params[f"{prefix}/dw/kernel"], 0.0
        factor, offset = batch_norm_affine(params, stats, f"{prefix}/norm")
        out[f"{prefix}/dw/kernel"] = kernel * factor[..., None, None, :]
        out[f"{prefix}/dw/bias"] = bias * factor + offset
    factor, offset = batch_norm_affine(params, stats, f"{prefix}/down_norm")
    scale, kernel = params[f"{prefix}/layer_scale"], params[f"{prefix}/down/kernel"]
    shift = jnp.einsum("...i,...io->...o", params[f"{prefix}/grn/bias"], kernel)
    out[f"{prefix}/down/kernel"] = kernel * (scale * factor)[..., None, :]
    out[f"{prefix}/down/bias"] = scale * (shift * factor + offset)
    out[f"{prefix}/grn/scale"] = params[f"{prefix}/grn/scale"]
    return out


def _variant(depths, dims, kernels, drop_path_rate) -> UniRepLKNetConfig:
    return UniRepLKNetConfig(depths=depths, dims=dims, kernel_sizes=kernels, drop_path_rate=drop_path_rate)


_PLAIN = ((3,), (13,), (13,), (13,))
_TINY = ((3,), (13,), (13, 3), (13,))
_LARGE = ((3,), (13,), (13, 3, 3), (13,))

VARIANTS = {
    "a": _variant((2, 2, 6, 2), (40, 80, 160, 320), _PLAIN, 0.0),
    "f": _variant((2, 2, 6, 2), (48, 96, 192, 384), _PLAIN, 0.0),
    "p": _variant((2, 2, 6, 2), (64, 128, 256, 512), _PLAIN, 0.1),
    "n": _variant((2, 2, 8, 2), (80, 160, 320, 640), _PLAIN, 0.1),
    "t": _variant((3, 3, 18, 3), (80, 160, 320, 640), _TINY, 0.2),
    "s": _variant((3, 3, 27, 3), (96, 192, 384, 768), _LARGE, 0.4),
    "b": _variant((3, 3, 27, 3), (128, 256, 512, 1024), _LARGE, 0.1),
    "l": _variant((3, 3, 27, 3), (192, 384, 768, 1536), _LARGE, 0.1),
    "xl": _variant((3, 3, 27, 3), (256, 512, 1024, 2048), _LARGE, 0.2),
}
"""Released variants at 1000 classes (Table 1 of the paper); drop-path rates are those of ImageNet-1K or 22K
pre-training."""


_COUNTS = {
    "a": 4_649_060, "f": 6_489_328, "p": 11_080_520, "n": 18_818_880, "t": 31_693_420,
    "s": 56_456_704, "b": 99_089_416, "l": 220_076_056, "xl": 388_690_984,
}  # fmt: skip
for _size, _config in VARIANTS.items():
    _depths = tuple(2 * len(p) if i == 2 else len(p) for i, p in enumerate(_config.kernel_sizes))
    _tiny = dict(
        dims=(8, 12, 16, 24),
        depths=_depths,
        num_classes=10,
        image_size=16,
        stem_strides=(1, 1),
        layer_scale_init_value=0.5,
    )
    register(
        Entry(
            f"unireplknet_{_size}",
            _config,
            "arXiv 2311.15599",
            "github.com/AILab-CVC/UniRepLKNet",
            _tiny,
            _COUNTS[_size],
        )
    )
