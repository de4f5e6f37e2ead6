"""Convolutions with channel-wise experts, one for each image, and the router that chooses (AdvMoE, Zhang et al. 2023,
arXiv 2308.10110).

One router reads the raw image, and its choice holds for every routed layer: a network of n experts has n pathways. The
choice is hard: an expert's output counts as it is, and the score that won gets the gradient of a factor 1 on that
output (straight through).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from research.modules.axes import Init, Kind
from research.modules.layers import Conv, Linear, kaiming
from research.modules.mesh import TENSOR_AXIS, input_of, on_local_tokens, own_size
from research.modules.norms import BatchNorm
from research.ops.precision import wide
from research.ops.routed_conv import routed_conv

EXPERTS = "experts"
"""Name of the axis of experts: equal in all layers of a network, whose experts of one index form a pathway."""

normal_01 = jax.nn.initializers.normal(0.01)
grouped_kaiming = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal", in_axis=-3, out_axis=(-2, -1))


THROUGH_GATE = "through_gate"
"""Mode of attacks that follow the straight-through gate, as those of the released code do; running statistics are as in
eval mode."""


class Route(NamedTuple):
    """The expert of each image, and the factor 1 through which its score gets a gradient."""

    experts: Int[Array, " B"]
    gate: Float[Array, " B"]


def choose(scores: Float[Array, "B E"], mode: str) -> Route:
    """Returns the route of the highest scores (of equal ones the first); the gate is 1, in training its gradient is
    that of the score chosen.

    In eval mode the gradient is that of the function, to which a score adds nothing but at a tie: an attack that
    follows the gate climbs what no output depends on, and networks trained against it learn to hide behind the gate.
    That is what mode "through_gate" is for: eval mode in all else.
    """
    experts = scores.argmax(-1)
    if mode not in ("train", THROUGH_GATE):
        return Route(experts, jnp.ones(scores.shape[:1], scores.dtype))
    chosen = (scores * jax.nn.one_hot(experts, scores.shape[-1], dtype=scores.dtype)).sum(-1)
    return Route(experts, 1 + (chosen - jax.lax.stop_gradient(chosen)))


class RoutedConv(nnx.Module):
    """Square convolution without bias whose kernel is that of each image's expert; padding `size // 2`, `axes` names
    (in, out).

    `experts` * n_in * n_out * size^2 parameters, of which an image meets one expert's. Kernels start as kaiming-normal
    over the outputs of all experts, those of the one convolution that holds them.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        size: int,
        experts: int,
        axes: tuple[str, str],
        init: Init,
        *,
        stride: int = 1,
        implementation: str = "auto",
    ):
        self.stride, self.implementation = stride, implementation
        names = ("window_h", "window_w", axes[0], EXPERTS, axes[1])
        self.kernel = init.param("kernel", (size, size, n_in, experts, n_out), names, grouped_kaiming, Kind.MATRIX)

    def __call__(self, x: Float[Array, "B H W I"], route: Route | None) -> Float[Array, "B h w O"]:
        """Without a route all images meet the first expert."""
        if route is None:
            return routed_conv(
                x,
                self.kernel[..., :1, :],
                jnp.zeros(x.shape[:1], jnp.int32),
                stride=self.stride,
                implementation=self.implementation,
            )
        y = on_local_tokens(
            self._convolve, (input_of(self.kernel, x), route.experts), jnp.moveaxis(self.kernel[...], 3, 0)
        )
        return y * route.gate[:, None, None, None].astype(y.dtype)

    def _convolve(self, images: tuple[Array, Array], kernel: Array, axis: str | None) -> Array:
        x, experts = images
        if axis is not None:  # the kernels are less to send than the maps that would go to them
            kernel = jax.lax.all_gather(kernel, axis, tiled=True)
        implementation = "each" if own_size(TENSOR_AXIS) > 1 else self.implementation
        return routed_conv(x, jnp.moveaxis(kernel, 0, 3), experts, stride=self.stride, implementation=implementation)


def convolution(
    n_in: int,
    n_out: int,
    size: int,
    axes: tuple[str, str],
    init: Init,
    *,
    stride: int = 1,
    experts: int = 0,
    implementation: str = "auto",
) -> Conv | RoutedConv:
    """Returns a convolution without bias: of each image's expert where `experts` > 0, else an ordinary one."""
    if experts:
        return RoutedConv(n_in, n_out, size, experts, axes, init, stride=stride, implementation=implementation)
    return Conv(n_in, n_out, size, axes, init, stride=stride, bias=False, kernel_init=kaiming)


def convolve(conv: Conv | RoutedConv, x: Float[Array, "B H W I"], route: Route | None) -> Float[Array, "B h w O"]:
    """Runs what `convolution` made."""
    return conv(x, route) if isinstance(conv, RoutedConv) else conv(x)


class RouterBlock(nnx.Module):
    """relu(shortcut(x) + 3x3 - 3x3); the shortcut takes every stride-th pixel and pads channels with zeros on both
    sides (option A)."""

    def __init__(self, n_in: int, n_out: int, source: str, out: str, init: Init, *, stride: int):
        self.stride, self.padding = stride, ((n_out - n_in) // 2, n_out - n_in - (n_out - n_in) // 2)
        inner = init.child("inner")
        self.first = Conv(
            n_in, n_out, 3, (source, out), inner, stride=stride, bias=False, kernel_init=kaiming, exact=True
        )
        self.first_norm = BatchNorm(n_out, out, inner)
        self.second = Conv(n_out, n_out, 3, (out, out), init, bias=False, kernel_init=kaiming, exact=True)
        self.second_norm = BatchNorm(n_out, out, init)

    def __call__(self, x: Float[Array, "B H W I"], mode: str) -> Float[Array, "B h w O"]:
        y = jax.nn.relu(self.first_norm(self.first(x), mode=mode))
        y = self.second_norm(self.second(y), mode=mode)
        shortcut = x[:, :: self.stride, :: self.stride]
        return jax.nn.relu(y + jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), self.padding)))


class ImageRouter(nnx.Module):
    """Scores of the experts from the raw image: a CIFAR ResNet (He et al. 2016, section 4.2) of stages `dims` x
    `depths`.

    With dims (16, 32, 64) and depths (3, 3, 3), which is ResNet-20, and two experts: 269,202 parameters. Sub-networks
    keep it whole.
    """

    def __init__(self, channels: int, dims: tuple[int, ...], depths: tuple[int, ...], experts: int, init: Init):
        self.stem = Conv(
            channels,
            dims[0],
            3,
            ("image", "stage1/router"),
            init.child("stem"),
            bias=False,
            kernel_init=kaiming,
            exact=True,
        )
        self.norm = BatchNorm(dims[0], "stage1/router", init.child("stem"))
        blocks, size, source = [], dims[0], "stage1/router"
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            for i in range(depth):
                out, stride = f"stage{stage + 1}/router", 2 if stage and not i else 1
                blocks.append(RouterBlock(size, dim, source, out, init.child(f"{stage}.{i}"), stride=stride))
                size, source = dim, out
        self.blocks = nnx.List(blocks)
        self.head = Linear(dims[-1], experts, (source, EXPERTS), init.child("head"), kernel_init=normal_01, exact=True)

    def __call__(self, x: Float[Array, "B H W C"], mode: str) -> Float[Array, "B E"]:
        """Returns the scores, in float32 at least."""
        x = jax.nn.relu(self.norm(self.stem(x), mode=mode))
        for block in self.blocks:
            x = block(x, mode)
        return wide(self.head(wide(x).mean((1, 2))))


class RoutedNetwork(nnx.Module):
    """What networks with routed convolutions share: `embed` and `head` are theirs, `router` is None where there is at
    most one expert."""

    router: ImageRouter | None
    head: Linear

    def embed(
        self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None, route: Route | None = None
    ) -> Float[Array, "B D"]:
        """Returns what the classifier reads; mixtures need the route."""
        raise NotImplementedError

    def classify(self, x: Float[Array, "B H W C"], route: Route | None, mode: str) -> Float[Array, "B N"]:
        """Returns the logits of images sent along a route."""
        return self.head(self.embed(x, mode=mode, route=route))

    def scores(
        self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None
    ) -> Float[Array, "B E"]:
        """Returns the router's scores alone."""
        assert self.router is not None  # nobody asks for the scores of at most one expert
        return self.router(x, mode)

    def with_scores(
        self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None
    ) -> tuple[Float[Array, "B N"], Float[Array, "B E"]]:
        """Returns (logits, scores of the router)."""
        scores = self.scores(x, mode=mode, key=key)
        return self.classify(x, choose(scores, mode), mode), scores

    def on_path(
        self, x: Float[Array, "B H W C"], scores: Float[Array, "B E"], *, mode: str = "eval"
    ) -> Float[Array, "B N"]:
        """Returns the logits under given scores."""
        return self.classify(x, choose(scores, mode), mode)

    def __call__(
        self, x: Float[Array, "B H W C"], *, mode: str = "eval", key: Array | None = None
    ) -> Float[Array, "B N"]:
        if self.router is None:
            return self.classify(x, None, mode)
        return self.with_scores(x, mode=mode, key=key)[0]
