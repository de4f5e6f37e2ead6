"""VMamba (Liu et al. 2024, arXiv 2401.10166) in its released second version: a hierarchy of blocks that scan the map in
four directions.

Blocks are SS2D and an MLP, both pre-norm and residual, LN eps 1e-5; stem and downsampling are 3x3 convolutions. Smaller
selves: `width` (channels of every stage; inner channels, hidden units and ranks follow), `ffn` and `depth` per stage.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.errors import UserError
from research.models.base import ChoosesImplementations
from research.models.implementations import check_implementation
from research.models.registry import Entry, register
from research.models.stages import check_image, check_stages, shrunk_depths, shrunk_dims
from research.modules import mesh
from research.modules.axes import Init
from research.modules.features import named
from research.modules.layers import Conv, Linear, drop_path, drop_path_rates
from research.modules.mlp import Mlp
from research.modules.norms import LayerNorm
from research.modules.ss2d import SS2D
from research.modules.state import Stack
from research.ops import depthwise, selective_scan
from research.values import Layers, Rate

OPS = {depthwise.OP: depthwise.IMPLEMENTATIONS, selective_scan.OP: selective_scan.IMPLEMENTATIONS}
torch_default = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclass(frozen=True)
class VMambaConfig(ChoosesImplementations):
    """Description of one VMamba.

    For each stage: `dims` channels, `inner_dims` of SS2D (() for `ssm_ratio` * dims), `dt_ranks` of its step sizes (()
    for ceil(dims / 16)) and `mlp_dims` hidden units (() for 4 * dims); `d_state` numbers of state per inner channel and
    direction. `stem_strides` are the strides of the stem's two convolutions: (2, 2) for 224 pixels, (2, 1) or (1, 1)
    for small images. `kept_layers` holds, for a sub-network, the indices of each stage's blocks in the full model.
    """

    depths: tuple[Layers, ...] = (2, 2, 8, 2)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    ssm_ratio: float = 1.0
    d_state: int = 1
    inner_dims: tuple[int, ...] = ()
    dt_ranks: tuple[int, ...] = ()
    mlp_dims: tuple[int, ...] = ()
    num_classes: int = 1000
    in_channels: int = 3
    image_size: int = 224
    stem_strides: tuple[int, int] = (2, 2)
    drop_path_rate: Rate = 0.0
    kept_layers: tuple[tuple[int, ...], ...] = ()
    unroll: bool = False
    implementation: str = "auto"
    remat: str = "none"

    renamed: ClassVar[dict[str, str]] = {"state": "d_state", "ranks": "dt_ranks"}
    family: ClassVar[str] = "vmamba"
    derived: ClassVar[dict[str, tuple[str, ...]]] = {
        "inner_dims": ("dims", "ssm_ratio"),
        "dt_ranks": ("dims",),
        "mlp_dims": ("dims",),
        "kept_layers": ("depths",),
    }
    elastic: ClassVar[dict[str, str]] = {
        "width": "fraction of the channels of every stage; inner channels, hidden units and ranks follow",
        "depth": "fraction of the blocks of each stage, or whole numbers joined by ':'",
        "ffn": "fraction of the hidden units of each FFN",
        "keep": "which blocks stay: first or even",
    }

    def __post_init__(self):
        check_implementation("vmamba", self.implementation, OPS)
        defaults = {
            "inner_dims": tuple(round(self.ssm_ratio * d) for d in self.dims),
            "dt_ranks": tuple(-(-d // 16) for d in self.dims),
            "mlp_dims": tuple(4 * d for d in self.dims),
        }
        for name, value in defaults.items():
            object.__setattr__(self, name, vars(self)[name] or value)
        check_stages(
            self,
            ("dims", *defaults),
            (self.d_state, self.num_classes, self.in_channels, *self.stem_strides),
            first_stays=False,
        )
        if self.dims[0] < 2:
            raise UserError(
                f"vmamba: dims={self.dims} leave no channel for the stem, which has half of the first stage's"
            )
        stride = self.stem_strides[0] * self.stem_strides[1] * 2 ** (len(self.depths) - 1)
        check_image(self, stride, "stem_strides=(1, 1) or larger images")

    def build(self, init: Init) -> nnx.Module:
        return VMamba(self, init)

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        return {f"stage{i + 1}/layers": kept for i, kept in enumerate(self.kept_layers)}

    @property
    def embedding(self) -> tuple[int, str] | None:
        return (self.dims[-1], f"stage{len(self.dims)}/embed")

    def input_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, self.in_channels)

    def shrink(self, *, width=1.0, depth=1.0, ffn=1.0, keep="first") -> "VMambaConfig":
        """Returns the sub-network with these choices (see `elastic`).

        Raises:
          UserError: a choice lies outside the space.
        """
        dims, kept = shrunk_dims(self.dims, width), shrunk_depths(self.kept_layers, depth, keep)
        hidden = _follow(self.mlp_dims, self.dims, dims)
        return replace(
            self,
            dims=dims,
            inner_dims=_follow(self.inner_dims, self.dims, dims),
            dt_ranks=tuple(
                -(-r * small // full) for r, full, small in zip(self.dt_ranks, self.dims, dims, strict=True)
            ),
            mlp_dims=shrunk_dims(hidden, ffn, "ffn"),
            depths=tuple(map(len, kept)),
            kept_layers=kept,
        )


def _follow(sizes: tuple[int, ...], full: tuple[int, ...], small: tuple[int, ...]) -> tuple[int, ...]:
    """Scales `sizes` as `full` was scaled to `small`."""
    return tuple(max(1, round(n * s / f)) for n, f, s in zip(sizes, full, small, strict=True))


class Block(nnx.Module):
    """x + SS2D(LN(x)), then x + MLP(LN(x)); each branch under drop path."""

    def __init__(self, config: VMambaConfig, stage: int, init: Init):
        dim, embed, scope = config.dims[stage], f"stage{stage + 1}/embed", f"stage{stage + 1}/layer"
        self.drop = config.drop_path_rate > 0
        self.norm1 = LayerNorm(dim, embed, init.child("norm1"), eps=1e-5)
        self.mixer = SS2D(
            dim,
            config.inner_dims[stage],
            config.d_state,
            config.dt_ranks[stage],
            embed,
            scope,
            init.child("mixer"),
            implementation=config.implementation,
        )
        self.norm2 = LayerNorm(dim, embed, init.child("norm2"), eps=1e-5)
        self.mlp = Mlp(dim, config.mlp_dims[stage], (embed, f"{scope}/mlp"), init.child("mlp"))

    def __call__(
        self, x: Float[Array, "B H W D"], per_layer: dict, *, mode: str, key: Array | None
    ) -> Float[Array, "B H W D"]:
        branches = (lambda x: mesh.module_on_local_shard(self.mixer, self.norm1(x)), lambda x: self.mlp(self.norm2(x)))
        for j, branch in enumerate(branches):
            y = branch(x)
            if self.drop and mode == "train" and key is not None:
                y = drop_path(y, per_layer["rate"], jax.random.fold_in(key, 2 * per_layer["index"] + j))
            x = x + y
        return x


class ConvNorm(nnx.Module):
    """3x3 convolution with bias, then LN; `axes` names (in, out)."""

    def __init__(self, n_in: int, n_out: int, axes: tuple[str, str], init: Init, *, stride: int):
        self.conv = Conv(n_in, n_out, 3, axes, init.child("conv"), stride=stride, kernel_init=torch_default)
        self.norm = LayerNorm(n_out, axes[1], init.child("norm"), eps=1e-5)

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        return self.norm(self.conv(x))


class VMamba(nnx.Module):
    """The network; `mode` "train" turns on drop path, which needs a `key`."""

    def __init__(self, config: VMambaConfig, init: Init):
        self.config = config
        dims, (first, second), stages = config.dims, config.stem_strides, range(len(config.dims))
        embed = [f"stage{i + 1}/embed" for i in stages]
        half = dims[0] // 2
        self.stem = ConvNorm(config.in_channels, half, ("image", "stem"), init.child("stem"), stride=first)
        reduce = [ConvNorm(half, dims[0], ("stem", embed[0]), init.child("reduce0"), stride=second)]
        for i in stages[1:]:
            reduce.append(ConvNorm(dims[i - 1], dims[i], (embed[i - 1], embed[i]), init.child(f"reduce{i}"), stride=2))
        self.reduce = nnx.List(reduce)
        self.stages = nnx.List(
            [
                Stack(
                    functools.partial(Block, config, i),
                    config.depths[i],
                    f"stage{i + 1}/layers",
                    init.child(f"stage{i}"),
                    unroll=config.unroll,
                )
                for i in stages
            ]
        )
        self.norm = LayerNorm(dims[-1], embed[-1], init.child("norm"), eps=1e-5)
        self.head = Linear(dims[-1], config.num_classes, (embed[-1], "classes"), init.child("head"))

    def features(self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None) -> list[Array]:
        """Returns the output of every stage, in order."""
        rates = drop_path_rates(self.config.drop_path_rate, sum(self.config.depths))
        x = jax.nn.gelu(self.stem(x), approximate=False)
        outs, start = [], 0
        for i, (reduce, stage) in enumerate(zip(self.reduce, self.stages, strict=True)):
            depth = self.config.depths[i]
            per_layer = {"rate": jnp.asarray(rates[start : start + depth], jnp.float32), "index": jnp.arange(depth)}
            stage_key = None if key is None else jax.random.fold_in(key, i)
            x = stage(reduce(x), xs=per_layer, remat=self.config.remat, mode=mode, key=stage_key)
            outs.append(named(f"stage{i + 1}", x))
            start += depth
        return outs

    def embed(self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None) -> Float[Array, "B D"]:
        """Returns what the classifier reads."""
        return named("embedding", self.norm(self.features(x, mode=mode, key=key)[-1]).mean((1, 2)))

    def __call__(
        self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None
    ) -> Float[Array, "B N"]:
        return self.head(self.embed(x, mode=mode, key=key))


def _variant(depths: tuple[int, ...], width: int, **more) -> VMambaConfig:
    return VMambaConfig(depths=depths, dims=tuple(width * 2**i for i in range(len(depths))), **more)


VARIANTS = {
    "vmamba_tiny_s1l8": _variant((2, 2, 8, 2), 96, drop_path_rate=0.2),
    "vmamba_tiny_s2l5": _variant((2, 2, 5, 2), 96, ssm_ratio=2.0, drop_path_rate=0.2),
    "vmamba_small_s2l15": _variant((2, 2, 15, 2), 96, ssm_ratio=2.0, drop_path_rate=0.3),
    "vmamba_base_s2l15": _variant((2, 2, 15, 2), 128, ssm_ratio=2.0, drop_path_rate=0.6),
    "vmamba_micro_32": _variant((2, 2, 2), 48, num_classes=10, image_size=32, stem_strides=(2, 1)),
}
"""Names as in the released repository ("s": SSM ratio, "l": blocks of stage 3). The micro one is our own, for a
laptop."""


_COUNTS = {
    "vmamba_tiny_s1l8": 30_249_064, "vmamba_tiny_s2l5": 30_705_832,
    "vmamba_small_s2l15": 50_147_752, "vmamba_base_s2l15": 88_557_800,
}  # fmt: skip
for _name, _config in VARIANTS.items():
    _tiny = dict(dims=(8, 24), depths=(2, 3), ssm_ratio=1.5, num_classes=10, image_size=8, stem_strides=(1, 1))
    _source = "github.com/MzeroMiko/VMamba" if _name in _COUNTS else "this repository"
    register(Entry(_name, _config, "arXiv 2401.10166", _source, _tiny, _COUNTS.get(_name)))
