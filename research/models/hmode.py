"""HMoDE: counting by a hierarchical mixture of density experts (Du et al. 2023, arXiv 2208.02894).

A VGG-16-BN encoder (Simonyan and Zisserman 2015, arXiv 1409.1556) at strides 1 to 16, three decoders that add one skip
each, and a density map from each decoder. Gates at every pixel mix the maps in pairs, and a second gate, which sees
only where the attention mask finds objects, mixes the three mixtures. All seven maps are supervised. Gating is soft:
nothing is dropped, every expert runs. Our choice where the paper is silent: the last layer of a density head starts
non-negative, so that no expert starts dead behind its ReLU. As in the released code, batch norm stands in the encoder
only and bilinear upsampling aligns corners. Sub-networks: `width`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.errors import UserError
from research.models.base import ModelConfig
from research.models.registry import Entry, register
from research.modules import elastic
from research.modules.axes import Init, StatKind
from research.modules.features import named
from research.modules.layers import Conv, kaiming, zeros
from research.modules.norms import BatchNorm
from research.ops.density_gates import importance_variation, mix_pairs, nearest, upsample
from research.ops.pooling import max_pool_2x2
from research.values import Layers

STRIDE = 4
"""Of the maps before they are brought to the input's resolution: that of the third stage."""

he = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def positive(key: Array, shape: Sequence[int], dtype: jnp.dtype) -> Array:
    """Absolute values of He's initial weights."""
    return jnp.abs(he(key, shape, dtype))


@dataclass(frozen=True)
class HMoDEConfig(ModelConfig):
    """Description of one network.

    `dims` and `depths` are channels and 3x3 convolutions of the five stages; each stage but the first halves the image.
    `head_dim`: hidden channels of a density head. `importance_loss_coef`: coefficient of the loss that keeps the
    experts of a pair equally important.
    """

    dims: tuple[int, ...] = (64, 128, 256, 512, 512)
    depths: tuple[Layers, ...] = (2, 2, 3, 3, 3)
    head_dim: int = 64
    in_channels: int = 3
    image_size: int = 128
    importance_loss_coef: float = 1.0

    renamed: ClassVar[dict[str, str]] = {"importance": "importance_loss_coef"}
    family: ClassVar[str] = "hmode"
    predicts: ClassVar[str] = "density"
    elastic: ClassVar[dict[str, str]] = {"width": "fraction of all channels"}

    def __post_init__(self):
        if len(self.dims) != 5 or len(self.depths) != 5:
            raise UserError(f"hmode: dims={self.dims} and depths={self.depths} need one entry for each of the 5 stages")
        self.check_sizes("head_dim", "in_channels", "image_size")
        if min(self.depths) < 1 or any(d < 4 or d % 4 for d in self.dims):
            raise UserError(f"hmode: dims={self.dims} must be multiples of 4 and depths={self.depths} at least 1")
        if self.image_size % 16:
            raise UserError(f"hmode: image_size={self.image_size} is no multiple of the total stride 16")

    def build(self, init: Init) -> nnx.Module:
        return HMoDE(self, init)

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        return {}

    def input_shape(self) -> tuple[int, int, int]:
        return (self.image_size, self.image_size, self.in_channels)

    def shrink(self, *, width=1.0) -> "HMoDEConfig":
        """Returns the sub-network with this width.

        Raises:
          UserError: a width outside (0, 1].
        """
        dims = tuple(elastic.scaled(d, width, 4, "width") for d in self.dims)
        return replace(self, dims=dims, head_dim=elastic.scaled(self.head_dim, width, 4, "width"))


class Stage(nnx.Module):
    """3x3 convolutions without bias, batch norm and ReLU after each."""

    def __init__(self, config: HMoDEConfig, stage: int, init: Init):
        n_in, axis = (config.dims[stage - 1], stage_axis(config, stage - 1)) if stage else (config.in_channels, "image")
        self.convs: nnx.List[Conv] = nnx.List([])
        self.norms: nnx.List[BatchNorm] = nnx.List([])
        for i in range(config.depths[stage]):
            n_out, out = config.dims[stage], f"stage{stage + 1}/conv{i}/embed"
            self.convs.append(
                Conv(n_in, n_out, 3, (axis, out), init.child(f"conv{i}"), bias=False, kernel_init=kaiming)
            )
            self.norms.append(BatchNorm(n_out, out, init.child(f"norm{i}")))
            n_in, axis = n_out, out

    def __call__(self, x: Float[Array, "B H W I"], mode: str) -> Float[Array, "B H W O"]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x), mode=mode))
        return x


def stage_axis(config: HMoDEConfig, stage: int) -> str:
    """Name of the channels that leave a stage."""
    return f"stage{stage + 1}/conv{config.depths[stage] - 1}/embed"


class Chain(nnx.Module):
    """Convolutions with bias and ReLU; of the last, ReLU only if `last`.

    Args:
      source: axis name and channels of the input.
      layers: (window, channels) of each convolution; window 3 pads by 1.
      scope: scope of the hidden channels; `out` names the last ones.
      exact: as in `Linear`, for gates.
    """

    def __init__(
        self,
        source: tuple[str, int],
        layers: Sequence[tuple[int, int]],
        scope: str,
        out: str,
        init: Init,
        *,
        last=True,
        final=he,
        exact=False,
    ):
        self.last = last
        axis, n_in = source
        self.convs: nnx.List[Conv] = nnx.List([])
        for i, (size, n_out) in enumerate(layers):
            ends = i == len(layers) - 1
            name = out if ends else f"{scope}/hidden{i}/mlp"
            self.convs.append(
                Conv(n_in, n_out, size, (axis, name), init.child(i), kernel_init=final if ends else he, exact=exact)
            )
            axis, n_in = name, n_out

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B H W O"]:
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = jax.nn.relu(x) if self.last or i < len(self.convs) - 1 else x
        return x


class Decoder(nnx.Module):
    """Two 3x3 convolutions with ReLU; the first reads the coarser map, upsampled twice, and the skip, as if they were
    concatenated."""

    def __init__(
        self, coarse: tuple[str, int], skip: tuple[str, int] | None, sizes: tuple[int, int], scope: str, init: Init
    ):
        hidden, out = f"{scope}/mlp", f"{scope}/embed"
        make = lambda tag, source, bias: Conv(
            source[1], sizes[0], 3, (source[0], hidden), init.child(tag), bias=bias, kernel_init=he
        )
        self.coarse = make("coarse", coarse, True)
        self.skip = None if skip is None else make("skip", skip, False)
        self.second = Conv(sizes[0], sizes[1], 3, (hidden, out), init.child("second"), kernel_init=he)

    def __call__(
        self, x: Float[Array, "B h w I"], skip: Float[Array, "B H W J"] | None = None
    ) -> Float[Array, "B H W O"]:
        if self.skip is None:
            y = self.coarse(x)
        else:
            assert skip is not None  # of the finer map
            y = self.coarse(upsample(x)) + self.skip(skip)
        return jax.nn.relu(self.second(jax.nn.relu(y)))


class HMoDE(nnx.Module):
    """The network: images to eight maps at their resolution, D1, D2, D3, M1, M2, M3, D (densities) and the attention
    mask's logits.

    `mode` as in `research.modules.norms`; no `key` is needed. In mode "train" the statistic `aux_loss` holds the
    importance loss over the batch's size.
    """

    def __init__(self, config: HMoDEConfig, init: Init):
        self.config = config
        _, _, d3, d4, d5 = config.dims
        x3, x4, x5 = (stage_axis(config, i) for i in (2, 3, 4))
        self.stages = nnx.List([Stage(config, i, init.child(f"stage{i}")) for i in range(5)])
        self.decoder3 = Decoder((x5, d5), None, (2 * d5, d5), "decoder3", init.child("decoder3"))
        self.decoder2 = Decoder(("decoder3/embed", d5), (x4, d4), (d4, d4 // 2), "decoder2", init.child("decoder2"))
        self.decoder1 = Decoder(
            ("decoder2/embed", d4 // 2), (x3, d3), (d3, d3 // 2), "decoder1", init.child("decoder1")
        )
        head = lambda i, n: Chain(
            (f"decoder{i}/embed", n),
            [(1, config.head_dim), (1, 1)],
            f"head{i}",
            "density/observed",
            init.child(f"head{i}"),
            final=positive,
        )
        self.heads = nnx.List([head(1, d3 // 2), head(2, d4 // 2), head(3, d5)])
        deep = (x5, d5)
        # The released code keeps the ReLU before both softmaxes: gate logits are never negative.
        self.pairs = Chain(deep, [(3, d5 // 2), (1, 6)], "pairs", "pairs/observed", init.child("pairs"), exact=True)
        self.mask = Chain(
            deep,
            [(3, d5 // 2), (3, d5 // 4), (1, 1)],
            "mask",
            "mask/observed",
            init.child("mask"),
            last=False,
            exact=True,
        )
        wide = [(3, 2 * d5), (3, 4 * d5), (3, 2 * d5), (3, d5), (3, d5 // 2), (1, 3)]
        self.mixtures = Chain(deep, wide, "mixtures", "mixtures/experts", init.child("mixtures"), exact=True)
        self.aux_loss = init.stat("aux_loss", (), (), zeros, StatKind.LOSS)

    def features(self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None) -> list[Array]:
        """Returns the outputs of the five stages, at strides 1, 2, 4, 8, 16."""
        outs: list[Array] = []
        for i, stage in enumerate(self.stages):
            x = max_pool_2x2(outs[-1]) if outs else x
            outs.append(named(f"stage{i + 1}", stage(x, mode)))
        return outs

    def densities(self, features: Sequence[Array]) -> Float[Array, "B h w 3"]:
        """Returns the three experts' maps at stride 4, the finest decoder's first; coarser ones are repeated to it."""
        _, _, x3, x4, x5 = features
        y3 = self.decoder3(x5)
        y2 = self.decoder2(y3, x4)
        y1 = self.decoder1(y2, x3)
        maps = [nearest(head(y), 2**i) for i, (head, y) in enumerate(zip(self.heads, (y1, y2, y3), strict=True))]
        return jnp.concatenate(maps, -1)

    def gates(
        self, x5: Float[Array, "B h w C"]
    ) -> tuple[Float[Array, "B h w 3 2"], Float[Array, "B h w 3"], Float[Array, "B h w 1"]]:
        """Returns the weights inside each pair, those of the three mixtures, and the logits of the attention mask, at
        stride 16."""
        pairs = self.pairs(x5)
        mask = self.mask(x5)
        mixtures = self.mixtures(jax.nn.sigmoid(mask) * x5)
        return jax.nn.softmax(pairs.reshape(*pairs.shape[:-1], 3, 2)), jax.nn.softmax(mixtures), mask

    def __call__(
        self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None
    ) -> Float[Array, "B H W 8"]:
        features = self.features(x, mode=mode)
        pairs, mixtures, mask = self.gates(features[-1])
        if mode == "train":
            self.aux_loss[...] = self.config.importance_loss_coef * importance_variation(pairs) / len(x)
        experts = self.densities(features)
        maps = mix_pairs(experts, nearest(pairs, STRIDE), nearest(mixtures, STRIDE))
        return nearest(jnp.concatenate([maps, nearest(mask, STRIDE)], -1), STRIDE)


VARIANTS = {"hmode": HMoDEConfig()}


_TINY = dict(dims=(4, 8, 8, 12, 16), depths=(1, 2, 1, 1, 2), head_dim=8, image_size=32)
register(Entry("hmode", VARIANTS["hmode"], "arXiv 2208.02894", "this repository", _TINY))
