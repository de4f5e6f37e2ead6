"""Scans: the diagonal linear recurrence and Mamba-1's selective scan, beside XLA's associative_scan under autodiff."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import lax, nn

from research.bench.case import BOTH, FORWARD, Case, fast, normal, op_case
from research.bench.catalog import register, register_suite
from research.bench.thresholds import Suite, Threshold, faster, ratios
from research.ops import linear_recurrence as recurrence
from research.ops import selective_scan as selective

SHAPES = ((4, 512, 256, 16), (2, 2048, 256, 16))
"""Batch, length, channels, state size."""


@register("linear_recurrence", "h_t = a_t h_{t-1} + b_t")
def recurrence_cases(peers: Mapping[str, str]) -> list[Case]:
    return [_linear_recurrence(*shape, direction) for shape in SHAPES for direction in (FORWARD, BOTH)]


@register("selective_scan", "the recurrence of Mamba-1")
def selective_cases(peers: Mapping[str, str]) -> list[Case]:
    return [_selective_scan(*shape, direction) for shape in SHAPES for direction in (FORWARD, BOTH)]


register_suite(
    "selective_scan",
    Suite(
        (("selective_scan", ""),),
        (
            faster("selective scan: least speed over lax.scan under autodiff", "selective_scan", "naive", 2.5),
            faster("selective scan: least speed over associative_scan", "selective_scan", "xla", 5),
            Threshold(
                "selective scan: temporary memory over lax.scan's under autodiff",
                lambda rows: max(ratios(rows, "selective_scan", "ours", "naive", field="temp_bytes")),
                0.2,
            ),
        ),
    ),
)


def _linear_recurrence(batch: int, length: int, channels: int, state: int, direction: str) -> Case:
    shape = batch, length, channels, state

    def implementation(name: str):
        return lambda a, b: recurrence.linear_recurrence(a, b, implementation=name)[0]

    return op_case(
        recurrence.OP,
        f"{batch}x{length}x{channels}x{state}",
        direction,
        2 * batch * length * channels * state,
        lambda: (nn.sigmoid(normal(1, shape) + 3), normal(2, shape)),
        {
            "ours": implementation("auto"),
            "naive": implementation("naive"),
            "xla": lambda a, b: lax.associative_scan(recurrence.combine, (a, b), axis=1)[1],
        },
        implementations={name: implementation(name) for name in fast(recurrence.IMPLEMENTATIONS)},
    )


def _selective_scan(batch: int, length: int, channels: int, state: int, direction: str) -> Case:
    def implementation(name: str):
        return lambda u, delta, A, B, C, skip: selective.selective_scan(u, delta, A, B, C, skip, implementation=name)[0]

    def associative(u, delta, A, B, C, skip):
        decay = jnp.exp(delta[..., None] * A)
        added = (delta * u)[..., None] * B[:, :, None]
        states = lax.associative_scan(recurrence.combine, (decay, added), axis=1)[1]
        return jnp.einsum("btdn,btn->btd", states, C) + skip * u

    def draw():
        A = -jnp.broadcast_to(jnp.arange(1.0, state + 1), (channels, state))
        maps = [normal(seed, (batch, length, state)) for seed in (3, 4)]
        delta = nn.softplus(normal(2, (batch, length, channels)) - 4)
        return normal(1, (batch, length, channels)), delta, A, *maps, jnp.ones(channels)

    return op_case(
        selective.OP,
        f"{batch}x{length}x{channels}x{state}",
        direction,
        7
        * batch
        * length
        * channels
        * state,  # the decay's product and exponential, the input's product, 2 for the state, 2 for the output
        draw,
        {"ours": implementation("auto"), "naive": implementation("naive"), "xla": associative},
        implementations={name: implementation(name) for name in fast(selective.IMPLEMENTATIONS)},
    )
