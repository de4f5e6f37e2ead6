"""Convolutions with an expert for each image, beside one convolution of the same FLOPs for all images."""

import dataclasses
import functools
from collections.abc import Mapping

import jax.numpy as jnp

from research.bench.case import BOTH, FORWARD, Case, directed, fast, normal, op_case, program
from research.bench.catalog import register
from research.ops import routed_conv

BATCH = 64
SHAPES = ((16, 32, 2), (8, 64, 2), (8, 16, 8))
"""Side of a map, channels in and out of one expert, experts."""


@register("routed_conv", "convolutions with an expert for each image, 2 and 8 experts")
def cases(peers: Mapping[str, str]) -> list[Case]:
    return [_case(*shape, direction) for shape in SHAPES for direction in (FORWARD, BOTH)]


def _case(side: int, width: int, experts: int, direction: str) -> Case:
    implementation = lambda choice: functools.partial(routed_conv.routed_conv, implementation=choice)

    def draw():
        kernel = normal(2, (3, 3, width, experts, width)) / (3 * width**0.5)
        return normal(1, (BATCH, side, side, width)), kernel, jnp.arange(BATCH) % experts

    def dense(*inputs):
        *first, kernel, chosen = inputs
        run = lambda x, kernel: routed_conv.routed_conv(x, kernel, jnp.zeros_like(chosen), implementation="all")
        return program(directed(run, direction, 2))(*first, kernel[..., :1, :])

    case = op_case(
        "routed_conv",
        f"{experts} experts {BATCH}x{side}x{side}x{width}",
        direction,
        2 * BATCH * side**2 * 9 * width**2,
        draw,
        {"ours": implementation("auto"), "naive": implementation("naive")},
        implementations={name: implementation(name) for name in fast(routed_conv.IMPLEMENTATIONS) if name != "matrix"},
        differentiated=2,
    )
    return dataclasses.replace(case, contenders={**case.contenders, "dense": dense})
