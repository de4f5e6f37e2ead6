"""ViT (Dosovitskiy et al. 2021, arXiv 2010.11929) and DeiT with its distillation token (Touvron et al. 2021, arXiv 2012.12877).

Pre-norm blocks, LN eps 1e-6, a class token, learnt positions. Smaller selves: `width` (channels), `heads`, `ffn`
and `depth`; heads keep their size, so DeiT-B at width 0.5 has the shape of DeiT-S, and at 0.25 that of DeiT-Ti.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.errors import UserError
from research.models.forms import check_form
from research.modules import elastic
from research.modules.attention import Attention
from research.modules.axes import Init
from research.modules.layers import Conv, Linear, drop_path, drop_path_rates, normal_02
from research.modules.mlp import Mlp
from research.modules.norms import LayerNorm
from research.modules.state import Stack
from research.ops import attention

torch_default = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclass(frozen=True)
class ViTConfig:
    """Description of one vision Transformer.

    `mlp_dim` 0 means 4 * dim. `distilled` adds a second token with a head of its own. `kept_layers` holds, for a
    sub-network, the indices of its blocks in the full model. `form`: of the attention op, see `research.ops.dispatch`.
    """

    dim: int = 192
    depth: int = 12
    heads: int = 3
    head_dim: int = 64
    mlp_dim: int = 0
    patch_size: int = 16
    num_classes: int = 1000
    in_channels: int = 3
    image_size: int = 224
    distilled: bool = False
    drop_path_rate: float = 0.0
    kept_layers: tuple[int, ...] = ()
    unroll: bool = False
    form: str = "auto"
    remat: str = "none"

    family: ClassVar[str] = "vit"
    derived: ClassVar[dict[str, tuple[str, ...]]] = {"mlp_dim": ("dim",), "kept_layers": ("depth",)}
    elastic: ClassVar[dict[str, str]] = {
        "width": "fraction of the channels; hidden units and, unless given, heads follow",
        "depth": "fraction of the blocks, or a whole number of them",
        "ffn": "fraction of the hidden units of each feed-forward part",
        "heads": "fraction of the heads, or a whole number of them",
        "keep": "which blocks stay: first or even",
    }

    def __post_init__(self):
        check_form("vit", self.form, {attention.OP: attention.FORMS})
        if not self.mlp_dim:
            object.__setattr__(self, "mlp_dim", 4 * self.dim)
        if not self.kept_layers:
            object.__setattr__(self, "kept_layers", tuple(range(self.depth)))
        for name in ("dim", "depth", "heads", "head_dim", "mlp_dim", "patch_size", "image_size", "num_classes", "in_channels"):
            if getattr(self, name) < 1:
                raise UserError(f"vit: {name}={getattr(self, name)}; valid: whole numbers from 1")
        if self.image_size % self.patch_size:
            valid = [p for p in range(2, self.image_size + 1) if self.image_size % p == 0]
            raise UserError(f"vit: image_size={self.image_size} is no multiple of patch_size={self.patch_size}; valid patch sizes: {valid}")
        if len(self.kept_layers) != self.depth:
            raise UserError(f"vit: kept_layers={self.kept_layers} must have one entry for each of the {self.depth} blocks")

    @property
    def num_tokens(self) -> int:
        """Length of the sequence: patches, the class token and, if distilled, the distillation token."""
        return (self.image_size // self.patch_size) ** 2 + 1 + self.distilled

    def build(self, init: Init) -> nnx.Module:
        return ViT(self, init)

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        return {"layers": self.kept_layers}

    def input_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, self.in_channels)

    def shrink(self, *, width=1.0, depth=1.0, ffn=1.0, heads=None, keep="first") -> "ViTConfig":
        """Returns the smaller self with these choices (see `elastic`).

        Raises:
          UserError: a choice lies outside the space.
        """
        dim = elastic.scaled(self.dim, width, 8, "width")
        hidden = round(self.mlp_dim * dim / self.dim)
        kept = elastic.kept_layers(self.kept_layers, elastic.depth_count(depth, self.depth, 1, "depth"), keep)
        return replace(
            self,
            dim=dim,
            mlp_dim=elastic.scaled(hidden, ffn, 8, "ffn"),
            heads=elastic.depth_count(float(width) if heads is None else heads, self.heads, 1, "heads"),
            depth=len(kept),
            kept_layers=kept,
        )


class Block(nnx.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)); each branch under drop path."""

    def __init__(self, config: ViTConfig, init: Init):
        self.drop = config.drop_path_rate > 0
        self.norm1 = LayerNorm(config.dim, "embed", init.child("norm1"))
        self.attention = Attention(config.dim, config.heads, config.head_dim, "embed", "layer", init.child("attention"), form=config.form)
        self.norm2 = LayerNorm(config.dim, "embed", init.child("norm2"))
        self.mlp = Mlp(config.dim, config.mlp_dim, ("embed", "layer/mlp"), init.child("mlp"))

    def __call__(self, x: Float[Array, "B T D"], per_layer: dict, *, mode: str, key: Array | None) -> Float[Array, "B T D"]:
        branches = (lambda x: self.attention(self.norm1(x)), lambda x: self.mlp(self.norm2(x)))
        for j, branch in enumerate(branches):
            y = branch(x)
            if self.drop and mode == "train" and key is not None:
                y = drop_path(y, per_layer["rate"], jax.random.fold_in(key, 2 * per_layer["index"] + j))
            x = x + y
        return x


class ViT(nnx.Module):
    """The network; `mode` "train" turns on drop path, which needs a `key`."""

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
        self.cls_token = init.param("cls_token", (config.dim,), ("embed",), normal_02)
        self.dist_token = init.param("dist_token", (config.dim,), ("embed",), normal_02) if config.distilled else None
        self.positions = init.param("positions", (config.num_tokens, config.dim), ("tokens", "embed"), normal_02)
        self.blocks = Stack(lambda sub: Block(config, sub), config.depth, "layers", init.child("blocks"), unroll=config.unroll)
        self.norm = LayerNorm(config.dim, "embed", init.child("norm"))
        self.head = Linear(config.dim, config.num_classes, ("embed", "classes"), init.child("head"))
        self.dist_head = Linear(config.dim, config.num_classes, ("embed", "classes"), init.child("dist_head")) if config.distilled else None

    def features(self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None) -> Float[Array, "B T D"]:
        """Returns the normalised tokens: class, distillation (if any), then the patches row by row."""
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        tokens = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        tokens = [jnp.broadcast_to(t[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1])) for t in tokens]
        x = jnp.concatenate([*tokens, x], 1) + self.positions[...]
        depth = self.config.depth
        per_layer = {"rate": jnp.asarray(drop_path_rates(self.config.drop_path_rate, depth), jnp.float32), "index": jnp.arange(depth)}
        return self.norm(self.blocks(x, xs=per_layer, remat=self.config.remat, mode=mode, key=key))

    def both_heads(self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None) -> tuple[Array, Array]:
        """Returns the logits (from the class token, from the distillation token) of a distilled model, for its two losses."""
        x = self.features(x, mode=mode, key=key)
        return self.head(x[:, 0]), self.dist_head(x[:, 1])

    def __call__(self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None) -> Float[Array, "B N"]:
        if self.dist_head is None:
            return self.head(self.features(x, mode=mode, key=key)[:, 0])
        first, second = self.both_heads(x, mode=mode, key=key)
        return (first + second) / 2


def _variant(dim: int, depth: int, heads: int, **more) -> ViTConfig:
    return ViTConfig(dim=dim, depth=depth, heads=heads, **more)


SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Size -> (dim, depth, heads): Table 1 of both papers."""

VARIANTS = {
    **{f"vit_{size}_patch16_224": _variant(*shape) for size, shape in SIZES.items()},
    **{f"deit_{size}_patch16_224": _variant(*SIZES[size], drop_path_rate=0.1) for size in ("tiny", "small", "base")},
    **{
        f"deit_{size}_distilled_patch16_224": _variant(*SIZES[size], drop_path_rate=0.1, distilled=True)
        for size in ("tiny", "small", "base")
    },
}
"""Names as in timm; DeiT's recipe trains with a drop-path rate of 0.1."""
