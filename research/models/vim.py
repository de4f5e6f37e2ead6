"""Vision Mamba, "Vim" (Zhu et al. 2024, arXiv 2401.09417): patches as a sequence that bidirectional Mamba blocks walk
over.

Pre-norm blocks of one mixer each, RMSNorm eps 1e-5, learnt positions, the class token in the middle of the sequence,
which is also where the head reads. Sub-networks: `width` (channels; inner channels and ranks follow), `state` and
`depth`; Vim-S at width 0.5 has the shape of Vim-Ti.
"""

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
from research.modules import elastic, mesh
from research.modules.axes import Init, Kind
from research.modules.bimamba import BiMamba
from research.modules.features import named
from research.modules.layers import Conv, Linear, drop_path, drop_path_rates, normal_02
from research.modules.norms import RMSNorm
from research.modules.ssm import uniform
from research.modules.state import Stack
from research.ops import depthwise, depthwise_1d, precision, selective_scan
from research.values import Layers, Rate

OPS = {depthwise_1d.OP: depthwise_1d.IMPLEMENTATIONS, selective_scan.OP: selective_scan.IMPLEMENTATIONS}


@dataclass(frozen=True)
class VimConfig(ChoosesImplementations):
    """Description of one Vision Mamba.

    `d_inner` 0 means 2 * dim, `dt_rank` 0 ceil(dim / 16). `kept_layers` holds, for a sub-network, the indices of its
    blocks in the full model. `implementation`: of the convolution over time and the selective scan, see
    `research.ops.dispatch`.
    """

    dim: int = 192
    depth: Layers = 24
    d_state: int = 16
    d_inner: int = 0
    dt_rank: int = 0
    d_conv: int = 4
    patch_size: int = 16
    num_classes: int = 1000
    in_channels: int = 3
    image_size: int = 224
    drop_path_rate: Rate = 0.0
    kept_layers: tuple[int, ...] = ()
    unroll: bool = False
    implementation: str = "auto"
    remat: str = "none"

    renamed: ClassVar[dict[str, str]] = {"state": "d_state", "inner": "d_inner", "rank": "dt_rank", "taps": "d_conv"}
    family: ClassVar[str] = "vim"
    derived: ClassVar[dict[str, tuple[str, ...]]] = {
        "d_inner": ("dim",),
        "dt_rank": ("dim",),
        "kept_layers": ("depth",),
    }
    elastic: ClassVar[dict[str, str]] = {
        "width": "fraction of the channels; inner channels and the ranks of the step sizes follow",
        "depth": "fraction of the blocks, or a whole number of them",
        "state": "fraction of the state of each inner channel, or a whole number",
        "keep": "which blocks stay: first or even",
    }

    def __post_init__(self):
        check_implementation("vim", self.implementation, OPS)
        object.__setattr__(self, "d_inner", self.d_inner or 2 * self.dim)
        object.__setattr__(self, "dt_rank", self.dt_rank or -(-self.dim // 16))
        if not self.kept_layers:
            object.__setattr__(self, "kept_layers", tuple(range(self.depth)))
        self.check_sizes(
            "dim", "depth", "d_state", "d_inner", "dt_rank", "patch_size", "image_size", "num_classes", "in_channels"
        )
        if not 1 <= self.d_conv <= depthwise.MAX_KERNEL_SIZE:
            raise UserError(f"vim: d_conv={self.d_conv}; valid: 1 to {depthwise.MAX_KERNEL_SIZE}")
        if self.image_size % self.patch_size:
            valid = [p for p in range(2, self.image_size + 1) if self.image_size % p == 0]
            raise UserError(
                f"vim: image_size={self.image_size} is no multiple of patch_size={self.patch_size}; valid patch sizes: "
                f"{valid}"
            )
        if len(self.kept_layers) != self.depth:
            raise UserError(
                f"vim: kept_layers={self.kept_layers} must have one entry for each of the {self.depth} blocks"
            )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def cls_position(self) -> int:
        """Where in the sequence the class token stands: half of the patches are before it."""
        return self.num_patches // 2

    def build(self, init: Init) -> nnx.Module:
        return Vim(self, init)

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        return {"layers": self.kept_layers}

    @property
    def embedding(self) -> tuple[int, str] | None:
        return (self.dim, "embed")

    def input_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, self.in_channels)

    def shrink(self, *, width=1.0, depth=1.0, state=1.0, keep="first") -> "VimConfig":
        """Returns the sub-network with these choices (see `elastic`).

        Raises:
          UserError: a choice lies outside the space.
        """
        dim = elastic.scaled(self.dim, width, 8, "width")
        kept = elastic.kept_layers(self.kept_layers, elastic.depth_count(depth, self.depth, 1, "depth"), keep)
        return replace(
            self,
            dim=dim,
            d_inner=max(1, round(self.d_inner * dim / self.dim)),
            dt_rank=-(-self.dt_rank * dim // self.dim),
            d_state=elastic.depth_count(state, self.d_state, 1, "state"),
            depth=len(kept),
            kept_layers=kept,
        )


class Block(nnx.Module):
    """x + mixer(RMSNorm(x)), the branch under drop path; x stays in float32 at least whatever the mixer computes in."""

    def __init__(self, config: VimConfig, init: Init):
        self.drop = config.drop_path_rate > 0
        self.norm = RMSNorm(config.dim, "embed", init.child("norm"))
        self.mixer = BiMamba(
            config.dim,
            config.d_inner,
            config.d_state,
            config.dt_rank,
            "embed",
            "layer",
            init.child("mixer"),
            d_conv=config.d_conv,
            out_init=uniform((config.d_inner * config.depth) ** -0.5),
            implementation=config.implementation,
        )

    def __call__(
        self, x: Float[Array, "B T D"], per_layer: dict, *, mode: str, key: Array | None
    ) -> Float[Array, "B T D"]:
        y = mesh.module_on_local_shard(self.mixer, self.norm(x).astype(self.mixer.out[...].dtype))
        if self.drop and mode == "train" and key is not None:
            y = drop_path(y, per_layer["rate"], jax.random.fold_in(key, per_layer["index"]))
        return x + y


class Vim(nnx.Module):
    """The network; `mode` "train" turns on drop path, which needs a `key`."""

    def __init__(self, config: VimConfig, init: Init):
        self.config = config
        size, lecun = config.patch_size, jax.nn.initializers.lecun_normal()
        self.patches = Conv(
            config.in_channels,
            config.dim,
            size,
            ("image", "embed"),
            init.child("patches"),
            stride=size,
            padding=0,
            kernel_init=lecun,
        )
        self.cls_token = init.param("cls_token", (config.dim,), ("embed",), normal_02, Kind.POSITION)
        self.positions = init.param(
            "positions", (config.num_patches + 1, config.dim), ("tokens", "embed"), normal_02, Kind.POSITION
        )
        self.blocks = Stack(
            lambda sub: Block(config, sub), config.depth, "layers", init.child("blocks"), unroll=config.unroll
        )
        self.norm = RMSNorm(config.dim, "embed", init.child("norm"))
        self.head = Linear(config.dim, config.num_classes, ("embed", "classes"), init.child("head"))

    def features(
        self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None
    ) -> Float[Array, "B T D"]:
        """Returns the normalised tokens: the patches row by row, with the class token at `config.cls_position`."""
        x = self.patches(x)
        dtype, middle, depth = x.dtype, self.config.cls_position, self.config.depth
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.cls_token[...].astype(dtype), (x.shape[0], 1, x.shape[-1]))
        x = mesh.by_rows(
            precision.wide(jnp.concatenate([x[:, :middle], token, x[:, middle:]], 1) + self.positions[...])
        )
        per_layer = {
            "rate": jnp.asarray(drop_path_rates(self.config.drop_path_rate, depth), jnp.float32),
            "index": jnp.arange(depth),
        }
        x = self.norm(self.blocks(x, xs=per_layer, remat=self.config.remat, mode=mode, key=key)).astype(dtype)
        return named("hidden", x)

    def embed(self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None) -> Float[Array, "B D"]:
        """Returns what the classifier reads."""
        return named("embedding", self.features(x, mode=mode, key=key)[:, self.config.cls_position])

    def __call__(
        self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None
    ) -> Float[Array, "B N"]:
        return self.head(self.embed(x, mode=mode, key=key))


VARIANTS = {
    "vim_tiny_patch16_224": VimConfig(dim=192),
    "vim_small_patch16_224": VimConfig(dim=384, drop_path_rate=0.05),
    "vim_base_patch16_224": VimConfig(dim=768),
    "vim_micro_patch4_32": VimConfig(dim=128, depth=8, patch_size=4, image_size=32, num_classes=10),
}
"""Table 1 of the paper; Vim-S's released recipe trains with a drop-path rate of 0.05. The micro one is our own, for a
laptop."""


_COUNTS = {"vim_tiny": 7_148_008, "vim_small": 25_796_584, "vim_base": 97_598_440}
for _name, _config in VARIANTS.items():
    _tiny = dict(dim=32, depth=4, d_state=4, patch_size=4, image_size=16, num_classes=10)
    _count = _COUNTS.get("_".join(_name.split("_")[:2]))
    register(
        Entry(
            _name, _config, "arXiv 2401.09417", "github.com/hustvl/Vim" if _count else "this repository", _tiny, _count
        )
    )
