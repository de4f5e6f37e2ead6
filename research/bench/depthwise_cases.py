"""Depthwise convolutions: the five shapes that UniRepLKNet's stages have, and Mamba's short causal convolution."""

import math
from collections.abc import Mapping

from jax import lax

from research.bench import peers as other
from research.bench.case import BOTH, FORWARD, Case, fast, normal, op_case
from research.bench.catalog import register, register_suite
from research.bench.thresholds import Suite, faster, geometric_mean, slower
from research.ops.depthwise import IMPLEMENTATIONS, depthwise_conv2d
from research.ops.depthwise_1d import depthwise_conv1d

SHAPES_2D = ((32, 28, 64, 13), (32, 14, 128, 13), (32, 14, 128, 3), (32, 56, 80, 3), (8, 28, 64, 7))
"""Batch, height and width, channels, kernel."""
SHAPES_1D = ((4, 2048, 1792, 4), (4, 512, 256, 4))
"""Batch, length, channels, kernel."""


@register("depthwise_conv2d", "depthwise convolution of maps, kernels 3 to 13")
def conv2d_cases(peers: Mapping[str, str]) -> list[Case]:
    return [_conv2d(*shape, direction) for shape in SHAPES_2D for direction in (FORWARD, BOTH)]


@register("depthwise_conv1d", "causal depthwise convolution of width 4")
def conv1d_cases(peers: Mapping[str, str]) -> list[Case]:
    return [_conv1d(*shape, direction) for shape in SHAPES_1D for direction in (FORWARD, BOTH)]


register_suite(
    "depthwise",
    Suite(
        (("depthwise_conv2d", ""),),
        (
            faster(
                "depthwise 2-D: geometric mean of speed over lax's",
                "depthwise_conv2d",
                "xla",
                10,
                reduce=geometric_mean,
            ),
            faster("depthwise 2-D: least speed over lax's of any shape", "depthwise_conv2d", "xla", 1),
            slower(
                "depthwise 2-D: geometric mean of time over torch's",
                "depthwise_conv2d",
                "torch",
                2,
                reduce=geometric_mean,
                peer="torch",
            ),
        ),
    ),
)


def lax_depthwise(x, kernel, spatial, padding):
    """XLA's own: channels last, gradients by autodiff."""
    numbers = ("N" + spatial + "C", spatial + "IO", "N" + spatial + "C")
    strides = (1,) * len(spatial)
    grouped = kernel[..., None, :]
    return lax.conv_general_dilated(
        x, grouped, strides, padding, dimension_numbers=numbers, feature_group_count=x.shape[-1]
    )


def _conv2d(batch: int, side: int, channels: int, taps: int, direction: str) -> Case:
    def implementation(name: str):
        return lambda x, kernel: depthwise_conv2d(x, kernel, implementation=name)

    return op_case(
        "depthwise_conv2d",
        f"{batch}x{side}x{side}x{channels} {taps}x{taps}",
        direction,
        2 * batch * side**2 * channels * taps**2,
        lambda: (normal(1, (batch, side, side, channels)), normal(2, (taps, taps, channels)) / taps),
        {"ours": implementation("auto"), "xla": lambda x, kernel: lax_depthwise(x, kernel, "HW", "SAME")},
        implementations={name: implementation(name) for name in fast(IMPLEMENTATIONS)},
        peers={"torch": other.depthwise_conv2d()},
    )


def _conv1d(batch: int, length: int, channels: int, taps: int, direction: str) -> Case:
    def implementation(name: str):
        return lambda x, kernel: depthwise_conv1d(x, kernel, padding="CAUSAL", implementation=name)

    return op_case(
        "depthwise_conv1d",
        f"{batch}x{length}x{channels} width {taps}",
        direction,
        2 * batch * length * channels * taps,
        lambda: (normal(1, (batch, length, channels)), normal(2, (taps, channels)) / math.sqrt(taps)),
        {"ours": implementation("auto"), "xla": lambda x, kernel: lax_depthwise(x, kernel, "H", [(taps - 1, 0)])},
        implementations={name: implementation(name) for name in fast(IMPLEMENTATIONS)},
        peers={"torch": other.causal_conv1d()},
    )
