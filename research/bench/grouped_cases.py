"""Grouped matrix products for experts, balanced and skewed, beside one dense product of the same FLOPs."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import lax

from research.bench.case import BOTH, FORWARD, Case, directed, fast, normal, op_case, program
from research.bench.catalog import register, register_suite
from research.bench.thresholds import Suite, Threshold, faster, slower
from research.ops.grouped_implementations import IMPLEMENTATIONS
from research.ops.grouped_matmul import grouped_matmul

TOKENS, WIDTH, HIDDEN = 4096, 256, 512
EXPERTS = (4, 8, 16, 64)


def group_sizes(tokens: int, experts: int, skewed: bool) -> np.ndarray:
    """Equal groups, or half of the tokens in the first, a quarter of the groups empty, the rest falling as 1 / rank."""
    if not skewed:
        return np.full(experts, tokens // experts, np.int32)
    weights = 1.0 / np.arange(1, experts + 1)
    weights[experts - experts // 4 :] = 0
    weights[0] = weights[1:].sum()
    sizes = np.floor(tokens * weights / weights.sum()).astype(np.int32)
    sizes[0] += tokens - sizes.sum()
    return sizes


@register("grouped_matmul", "matrix products of sorted, ragged groups")
def cases(peers: Mapping[str, str]) -> list[Case]:
    return [
        _case(experts, skewed, direction)
        for experts in EXPERTS
        for skewed in (False, True)
        for direction in (FORWARD, BOTH)
    ]


def _of_dense(experts: int, asked: float) -> Threshold:
    claim = f"grouped_matmul, {experts} experts: time over one dense product's, balanced and skewed"
    return slower(claim, "grouped_matmul", "dense", asked, words=f"{experts} experts")


def _of_xla(experts: int, asked: float) -> Threshold:
    claim = f"grouped_matmul, {experts} experts: least speed over ragged_dot"
    return faster(claim, "grouped_matmul", "xla", asked, words=f"{experts} experts")


register_suite(
    "grouped",
    Suite(
        (("grouped_matmul", ""),),
        (_of_dense(4, 2), _of_dense(8, 2), _of_dense(16, 2), _of_dense(64, 3), _of_xla(8, 3), _of_xla(64, 10)),
    ),
)


def _case(experts: int, skewed: bool, direction: str) -> Case:
    def implementation(name: str):
        return lambda x, weights, sizes: grouped_matmul(x, weights, sizes, implementation=name)

    def draw():
        x, weights = normal(1, (TOKENS, WIDTH)), normal(2, (experts, WIDTH, HIDDEN)) / WIDTH**0.5
        return x, weights, jnp.asarray(group_sizes(TOKENS, experts, skewed))

    def dense(*inputs):
        *cotangent_and_x, weights, _ = inputs
        return program(directed(jnp.matmul, direction, 2))(*cotangent_and_x, weights[0])

    case = op_case(
        "grouped_matmul",
        f"{experts} experts {'skewed' if skewed else 'balanced'} {TOKENS}x{WIDTH}x{HIDDEN}",
        direction,
        2 * TOKENS * WIDTH * HIDDEN,
        draw,
        {
            "ours": implementation("auto"),
            "xla": lax.ragged_dot,
            **({"naive": implementation("naive")} if experts <= 8 else {}),
        },
        implementations={name: implementation(name) for name in fast(IMPLEMENTATIONS)},
        differentiated=2,
    )
    return dataclasses.replace(case, contenders={**case.contenders, "dense": dense})
