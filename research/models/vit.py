"""ViT (Dosovitskiy et al. 2021, arXiv 2010.11929) and DeiT with its distillation token (Touvron et al. 2021, arXiv
2012.12877).

Pre-norm blocks, LN eps 1e-6, a class token, learnt positions. Sub-networks: `width` (channels), `heads`, `ffn`
and `depth`; heads keep their size, so DeiT-B at width 0.5 has the shape of DeiT-S, and at 0.25 that of DeiT-Ti.

FFNs may be mixtures of experts: V-MoE (Riquelme et al. 2021, arXiv 2106.05974) has one in every second
block, or in the last few of these; with `moe.router` "soft" it is Soft MoE (Puigcerver et al. 2023, arXiv 2308.00951).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from research.errors import UserError
from research.models.implementations import check_implementation
from research.models.mixtures import MixtureConfig
from research.models.registry import Entry, register
from research.modules import elastic, mesh
from research.modules.attention import Attention
from research.modules.axes import Init, Kind
from research.modules.features import named
from research.modules.layers import Conv, Linear, drop_path, drop_path_rates, normal_02
from research.modules.mixers.base import Call
from research.modules.mlp import Mlp
from research.modules.moe import MoeFfn
from research.modules.moe_options import FAMILIES, Moe
from research.modules.norms import LayerNorm
from research.modules.state import Stack
from research.ops import attention, grouped_matmul
from research.values import Layers, Rate

torch_default = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclass(frozen=True)
class ViTConfig(MixtureConfig):
    """Description of one vision Transformer.

    `mlp_dim` 0 means 4 * dim. `distilled` adds a second token with a head of its own. `ffn` names the FFNs
    of consecutive blocks, "mlp" or "moe", and repeats ("mlp moe": every second block has a mixture with the
    options `moe`), after `dense_blocks` with "mlp" alone. `kept_layers` holds, for a sub-network, the indices in the
    full model of the repetitions of `ffn`, `kept_dense` those of the blocks before. `implementation`: of the ops, see
    `research.ops.dispatch`.
    """

    dim: int = 192
    depth: Layers = 12
    num_heads: int = 3
    head_dim: int = 64
    mlp_dim: int = 0
    patch_size: int = 16
    num_classes: int = 1000
    in_channels: int = 3
    image_size: int = 224
    distilled: bool = False
    drop_path_rate: Rate = 0.0
    ffn: str = "mlp"
    dense_blocks: int = 0
    moe: Moe = FAMILIES["v_moe"]
    kept_layers: tuple[int, ...] = ()
    kept_dense: tuple[int, ...] = ()
    unroll: bool = False
    implementation: str = "auto"
    remat: str = "none"

    renamed: ClassVar[dict[str, str]] = {"heads": "num_heads"}
    family: ClassVar[str] = "vit"
    derived: ClassVar[dict[str, tuple[str, ...]]] = {
        "mlp_dim": ("dim",),
        "kept_layers": ("depth", "ffn", "dense_blocks"),
        "kept_dense": ("dense_blocks",),
    }
    elastic: ClassVar[dict[str, str]] = {
        "width": "fraction of the channels; hidden units and, unless given, heads follow",
        "depth": "fraction of the blocks, or a whole number of them",
        "ffn": "fraction of the hidden units of each FFN, or of each expert",
        "experts": "fraction of the experts of every mixture, or a whole number of them",
        "active": "fraction of the experts of a token, or a whole number of them",
        "heads": "fraction of the heads, or a whole number of them",
        "keep": "which blocks stay: first or even",
    }

    def __post_init__(self):
        ops = {attention.OP: attention.IMPLEMENTATIONS}
        check_implementation(
            "vit",
            self.implementation,
            ops | ({grouped_matmul.OP: grouped_matmul.IMPLEMENTATIONS} if self.has_mixtures else {}),
        )
        if not self.mlp_dim:
            object.__setattr__(self, "mlp_dim", 4 * self.dim)
        self.check_sizes(
            "dim", "depth", "num_heads", "head_dim", "mlp_dim", "patch_size", "image_size", "num_classes", "in_channels"
        )
        if self.image_size % self.patch_size:
            valid = [p for p in range(2, self.image_size + 1) if self.image_size % p == 0]
            raise UserError(
                f"vit: image_size={self.image_size} is no multiple of patch_size={self.patch_size}; valid patch sizes: "
                f"{valid}"
            )
        if not set(self.period) <= {"mlp", "moe"} or not self.period:
            raise UserError(f"vit: ffn={self.ffn!r}; valid: mlp and moe, separated by spaces")
        if self.has_mixtures:
            if self.moe.router in ("hash", "domain"):
                raise UserError(
                    f"vit: moe.router={self.moe.router!r} is for tokens of a vocabulary or examples of a domain"
                )
            self.mixture  # noqa: B018 - says what does not fit
        rest = self.depth - self.dense_blocks
        if self.dense_blocks < 0 or rest < 1 or rest % len(self.period):
            raise UserError(
                f"vit: depth={self.depth} less dense_blocks={self.dense_blocks} is no multiple of the FFNs of "
                f"ffn={self.ffn!r}"
            )
        if not self.kept_layers:
            object.__setattr__(self, "kept_layers", tuple(range(self.periods)))
        if not self.kept_dense:
            object.__setattr__(self, "kept_dense", tuple(range(self.dense_blocks)))
        if len(self.kept_layers) != self.periods or len(self.kept_dense) != self.dense_blocks:
            kept = f"kept_layers={self.kept_layers}, kept_dense={self.kept_dense}"
            raise UserError(
                f"vit: {kept} must have one entry for each of {self.periods} repetitions of ffn and "
                f"{self.dense_blocks} blocks"
            )

    @property
    def num_tokens(self) -> int:
        """Length of the sequence: patches, the class token and, if distilled, the distillation token."""
        return (self.image_size // self.patch_size) ** 2 + 1 + self.distilled

    @property
    def period(self) -> tuple[str, ...]:
        """The FFNs of one repetition."""
        return tuple(self.ffn.split())

    @property
    def periods(self) -> int:
        return (self.depth - self.dense_blocks) // len(self.period)

    @property
    def has_mixtures(self) -> bool:
        return "moe" in self.period

    @property
    def mixture(self) -> Moe:
        """The options of the mixtures of experts, every size filled in."""
        return self.moe.resolve(self.mlp_dim)

    def layer_places(self) -> tuple[tuple[str, int], ...]:
        """Where the arrays of each block lie, in their order: (prefix of their names, index on their first axis)."""
        first = [("dense_blocks/layer", i) for i in range(self.dense_blocks)]
        inner = [f"/blocks/{j}" for j in range(len(self.period))] if len(self.period) > 1 else [""]
        return (*first, *((f"blocks/layer{part}", i) for i in range(self.periods) for part in inner))

    def build(self, init: Init) -> nnx.Module:
        return ViT(self, init)

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        return {"layers": self.kept_layers, **({"dense/layers": self.kept_dense} if self.dense_blocks else {})}

    @property
    def embedding(self) -> tuple[int, str] | None:
        return None if self.distilled else (self.dim, "embed")

    def input_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, self.in_channels)

    def shrink(
        self, *, width=1.0, depth=1.0, ffn=1.0, experts=None, active=None, heads=None, keep="first"
    ) -> "ViTConfig":
        """Returns the sub-network with these choices (see `elastic`).

        Raises:
          UserError: a choice lies outside the space.
        """
        dim = elastic.scaled(self.dim, width, 8, "width")
        hidden = round(self.mlp_dim * dim / self.dim)
        dense, kept = self._kept(depth, keep)
        cut = self.mixture.shrink(dim / self.dim, ffn, experts, active) if self.has_mixtures else self.moe
        return replace(
            self,
            dim=dim,
            mlp_dim=elastic.scaled(hidden, ffn, 8, "ffn"),
            num_heads=elastic.depth_count(float(width) if heads is None else heads, self.num_heads, 1, "heads"),
            depth=len(dense) + len(kept) * len(self.period),
            dense_blocks=len(dense),
            moe=self.moe if self.has_mixtures and cut == self.mixture else cut,
            kept_layers=kept,
            kept_dense=dense,
        )

    def _kept(self, depth, keep: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Which blocks before the repetitions, and which repetitions, a smaller depth keeps: the same part of both."""
        part, whole = len(self.period), self.depth - self.dense_blocks
        if not self.dense_blocks:
            return (), elastic.kept_layers(
                self.kept_layers, elastic.depth_count(depth, whole, part, "depth") // part, keep
            )
        fraction = depth / self.depth if isinstance(depth, int) and not isinstance(depth, bool) else depth
        dense = elastic.depth_count(fraction, self.dense_blocks, 1, "depth")
        rest = elastic.depth_count(fraction, whole, part, "depth")
        if isinstance(depth, int) and dense + rest != depth:
            raise UserError(
                f"sub-network depth={depth} would keep {dense} of the dense blocks and {rest} of the rest; "
                "give a fraction"
            )
        return elastic.kept_layers(self.kept_dense, dense, keep), elastic.kept_layers(
            self.kept_layers, rest // part, keep
        )


class Block(nnx.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)), or a mixture of experts in its place; each branch under drop path."""

    def __init__(self, config: ViTConfig, ffn: str, scope: str, init: Init):
        self.drop, self.depth = config.drop_path_rate > 0, config.depth
        self.norm1 = LayerNorm(config.dim, "embed", init.child("norm1"))
        self.attention = Attention(
            config.dim,
            config.num_heads,
            config.head_dim,
            "embed",
            scope,
            init.child("attention"),
            implementation=config.implementation,
        )
        self.norm2 = LayerNorm(config.dim, "embed", init.child("norm2"))
        axes = "embed", f"{scope}/mlp"
        self.mlp = (
            MoeFfn(config.mixture, config.dim, axes, scope, init.child("mlp"), config.implementation)
            if ffn == "moe"
            else Mlp(config.dim, config.mlp_dim, axes, init.child("mlp"))
        )

    def _feed_forward(self, x: Array, index: Array, call: Call) -> Array:
        if not isinstance(self.mlp, MoeFfn):
            return self.mlp(x)
        return self.mlp(
            x, replace(call, key=None if call.key is None else jax.random.fold_in(call.key, 2 * self.depth + index))
        )

    def __call__(self, x: Float[Array, "B T D"], per_layer: dict, *, call: Call) -> Float[Array, "B T D"]:
        mode, key = call.mode, call.key
        feed_forward = lambda x: self._feed_forward(self.norm2(x), per_layer["index"], call)
        for j, branch in enumerate((lambda x: self.attention(self.norm1(x)), feed_forward)):
            y = branch(x)
            if self.drop and mode == "train" and key is not None:
                y = drop_path(y, per_layer["rate"], jax.random.fold_in(key, 2 * per_layer["index"] + j))
            x = x + y
        return x


class Period(nnx.Module):
    """The blocks of one repetition of the FFNs."""

    def __init__(self, config: ViTConfig, init: Init):
        parts = enumerate(config.period)
        self.blocks = nnx.List([Block(config, ffn, f"layer/block{j}", init.child(f"block{j}")) for j, ffn in parts])

    def __call__(self, x: Float[Array, "B T D"], per_layer: dict, *, call: Call) -> Float[Array, "B T D"]:
        for j, block in enumerate(self.blocks):
            x = block(x, {name: values[j] for name, values in per_layer.items()}, call=call)
        return x


class ViT(nnx.Module):
    """The network; `mode` "train" turns on drop path, which needs a `key`. `real` says which images are no filler of a
    batch; None: all."""

    def __init__(self, config: ViTConfig, init: Init):
        self.config = config
        self.patches = Conv(
            config.in_channels,
            config.dim,
            config.patch_size,
            ("image", "embed"),
            init.child("patches"),
            stride=config.patch_size,
            padding=0,
            kernel_init=torch_default,
        )
        self.cls_token = init.param("cls_token", (config.dim,), ("embed",), normal_02, Kind.POSITION)
        self.dist_token = (
            init.param("dist_token", (config.dim,), ("embed",), normal_02, Kind.POSITION) if config.distilled else None
        )
        self.positions = init.param(
            "positions", (config.num_tokens, config.dim), ("tokens", "embed"), normal_02, Kind.POSITION
        )
        dense = lambda sub: Block(config, "mlp", "dense/layer", sub)
        first, unroll = config.dense_blocks, config.unroll
        self.dense_blocks = (
            Stack(dense, first, "dense/layers", init.child("dense_blocks"), unroll=unroll) if first else None
        )
        several = len(config.period) > 1
        make = lambda sub: Period(config, sub) if several else Block(config, config.period[0], "layer", sub)
        self.blocks = Stack(make, config.periods, "layers", init.child("blocks"), unroll=unroll)
        self.norm = LayerNorm(config.dim, "embed", init.child("norm"))
        self.head = Linear(config.dim, config.num_classes, ("embed", "classes"), init.child("head"))
        self.dist_head = (
            Linear(config.dim, config.num_classes, ("embed", "classes"), init.child("dist_head"))
            if config.distilled
            else None
        )

    def features(
        self,
        x: Float[Array, "B H W C"],
        *,
        mode: str = "eval",
        key: Array | None = None,
        real: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the normalised tokens: class, distillation (if any), then the patches row by row."""
        call = Call(mode, key, real=real)
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        own = [token[...] for token in (self.cls_token, self.dist_token) if token is not None]
        tokens = [jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, x.shape[-1])) for token in own]
        x = mesh.by_rows(jnp.concatenate([*tokens, x], 1) + self.positions[...])
        depth, first, several = self.config.depth, self.config.dense_blocks, len(self.config.period)
        per_layer = {
            "rate": jnp.asarray(drop_path_rates(self.config.drop_path_rate, depth), jnp.float32),
            "index": jnp.arange(depth),
        }
        if self.dense_blocks is not None:
            xs = {name: values[:first] for name, values in per_layer.items()}
            x = self.dense_blocks(x, xs=xs, remat=self.config.remat, call=call)
        rest = {name: values[first:] for name, values in per_layer.items()}
        if several > 1:
            rest = {name: values.reshape(-1, several) for name, values in rest.items()}
        return named("hidden", self.norm(self.blocks(x, xs=rest, remat=self.config.remat, call=call)))

    def embed(
        self,
        x: Float[Array, "B H W C"],
        *,
        mode: str = "eval",
        key: Array | None = None,
        real: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """Returns what the classifier reads: the class token."""
        return named("embedding", self.features(x, mode=mode, key=key, real=real)[:, 0])

    def both_heads(
        self,
        x: Float[Array, "B H W C"],
        *,
        mode: str = "eval",
        key: Array | None = None,
        real: Bool[Array, " B"] | None = None,
    ) -> tuple[Array, Array]:
        """Returns the logits (from the class token, from the distillation token) of a distilled model, for its two
        losses."""
        x = self.features(x, mode=mode, key=key, real=real)
        assert self.dist_head is not None  # of a distilled model
        return self.head(x[:, 0]), self.dist_head(x[:, 1])

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        *,
        mode: str = "eval",
        key: Array | None = None,
        real: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B N"]:
        if self.dist_head is None:
            return self.head(self.embed(x, mode=mode, key=key, real=real))
        first, second = self.both_heads(x, mode=mode, key=key, real=real)
        return (first + second) / 2


def _variant(dim: int, depth: int, heads: int, **more) -> ViTConfig:
    return ViTConfig(dim=dim, depth=depth, num_heads=heads, **more)


SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Size -> (dim, depth, heads): Table 1 of both papers."""

VARIANTS = {
    **{f"vit_{size}_patch16_224": _variant(*shape) for size, shape in SIZES.items()},
    **{f"deit_{size}_patch16_224": _variant(*SIZES[size], drop_path_rate=0.1) for size in ("tiny", "small", "base")},
    **{
        f"deit_{size}_distilled_patch16_224": _variant(*SIZES[size], drop_path_rate=0.1, distilled=True)
        for size in ("tiny", "small", "base")
    },
    **{
        f"vmoe_{size}_patch{patch}_{kind}": _variant(
            *shape,
            patch_size=patch,
            ffn="mlp moe",
            dense_blocks=shape[1] - last,
            moe=replace(FAMILIES["v_moe"], ffn_dim=4 * shape[0]),
        )
        for size, patch, shape, kind, last in (
            ("small", 32, (512, 8, 8), "last2", 4),
            ("base", 16, SIZES["base"], "last2", 4),
            ("base", 16, SIZES["base"], "every2", 12),
        )
    },
    "soft_moe_small_patch16": _variant(
        *SIZES["small"],
        dense_blocks=6,
        ffn="moe",
        moe=replace(FAMILIES["soft"], num_experts=128, slots_per_expert=1, ffn_dim=1536),
    ),
}
"""Names as in timm; DeiT's recipe trains with a drop-path rate of 0.1. V-MoE: 8 experts of full width, the last two of
the odd blocks or all of them (its section 3 and appendix B)."""


_COUNTS = {
    "tiny": 5_717_416, "small": 22_050_664, "base": 86_567_656, "large": 304_326_632,
    "tiny_distilled": 5_910_800, "small_distilled": 22_436_432, "base_distilled": 87_338_192,
}  # fmt: skip
_PAPERS = {
    "vit": "arXiv 2010.11929",
    "deit": "arXiv 2012.12877",
    "vmoe": "arXiv 2106.05974",
    "soft": "arXiv 2308.00951",
}
_SOURCES = {"vit": "google-research/vision_transformer", "deit": "facebookresearch/deit"}
for _name, _config in VARIANTS.items():
    _kind, _size = _name.removesuffix("_patch16_224").split("_", 1)
    _tiny: dict[str, Any] = dict(dim=32, depth=4, num_heads=4, head_dim=8, patch_size=4, image_size=16, num_classes=10)
    if _config.has_mixtures:
        _tiny |= dict(dense_blocks=min(_config.dense_blocks, 2), moe=dict(num_experts=4, ffn_dim=16))
    _source = f"github.com/{_SOURCES.get(_kind, 'google-research/vmoe')}"
    register(Entry(_name, _config, _PAPERS[_kind], _source, _tiny, _COUNTS.get(_size)))
