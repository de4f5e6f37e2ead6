"""Recurrences with a matrix state in chunks: Mamba-2's and Mamba-3's, and linear attention without decay, with decay
and with the delta rule.

The lengths from 512 to 16,384 hold the same number of tokens: time per token is to stay the same.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import nn

from research.bench.case import BOTH, FORWARD, Case, fast, normal, op_case
from research.bench.catalog import register, register_suite
from research.bench.thresholds import Row, Suite, Threshold, spread, times_by_length
from research.ops import linear_attention as attention
from research.ops.mamba3 import trapezoidal_scan
from research.ops.ssd import ssd

TOKENS = 16_384
LENGTHS = (512, 2048, 8192, 16_384)
SMALL = 2, 1000  # batch and length at which the reference implementation, a loop over tokens, runs beside
HEADS, WIDTH, STATE = 4, 64, 64
KINDS = ("linear", "retention", "gla", "delta", "gated delta")
"""No decay; one decay a head; one a channel; the delta rule; the delta rule with one decay a head."""


BY_LENGTH = tuple((TOKENS // length, length) for length in LENGTHS)
"""Batch and length."""


@register("trapezoidal_scan", "the state space of Mamba-3")
def trapezoidal_cases(peers: Mapping[str, str]) -> list[Case]:
    return [_trapezoidal(*size, direction) for size in (SMALL, (4, 4096)) for direction in (FORWARD, BOTH)]


@register("ssd", "state space duality of Mamba-2, length 512 to 16,384")
def ssd_cases(peers: Mapping[str, str]) -> list[Case]:
    return [_ssd(*size, direction) for size in (SMALL, *BY_LENGTH) for direction in (FORWARD, BOTH)]


@register("linear_attention", "linear, gated and delta-rule attention, length 512 to 16,384")
def linear_attention_cases(peers: Mapping[str, str]) -> list[Case]:
    small = [_linear_attention(kind, *SMALL, direction) for kind in KINDS for direction in (FORWARD, BOTH)]
    return small + [_linear_attention("gla", *size, direction) for size in BY_LENGTH for direction in (FORWARD, BOTH)]


def _by_token(rows: Sequence[Row], name: str, words: str) -> float:
    """Largest over smallest time; each length holds the same number of tokens."""
    times = times_by_length(rows, name, words)
    return spread(times[length] for length in LENGTHS)


register_suite(
    "length",
    Suite(
        tuple(
            (name, f"{kind}{batch}x{length}x")
            for name, kind in (("ssd", ""), ("linear_attention", "gla "))
            for batch, length in BY_LENGTH
        ),
        (
            Threshold(
                "SSD: time per token, largest over smallest, length 512 to 16,384",
                lambda rows: _by_token(rows, "ssd", ""),
                1.2,
            ),
            Threshold(
                "GLA: time per token, largest over smallest, length 512 to 16,384",
                lambda rows: _by_token(rows, "linear_attention", "gla"),
                1.2,
            ),
        ),
    ),
)


def length_shape(batch: int, length: int) -> str:
    """Batch, length, heads, and the two sizes of a head's state."""
    return f"{batch}x{length}x{HEADS} {STATE}x{WIDTH}"


def _state_flops(batch: int, length: int) -> int:
    """The decay, the outer product that is added, and the product with the state, a token at a time."""
    return 5 * batch * length * HEADS * STATE * WIDTH


def _ssd(batch: int, length: int, direction: str) -> Case:
    def implementation(name: str):
        return lambda x, dt, A, B, C, skip: ssd(x, dt, A, B, C, skip, implementation=name)[0]

    def draw():
        maps = [normal(seed, (batch, length, 1, STATE)) / STATE**0.5 for seed in (3, 4)]
        dt = nn.softplus(normal(2, (batch, length, HEADS)) - 4)
        return normal(1, (batch, length, HEADS, WIDTH)), dt, -jnp.arange(1.0, HEADS + 1), *maps, jnp.ones(HEADS)

    return op_case(
        "ssd",
        length_shape(batch, length),
        direction,
        _state_flops(batch, length),
        draw,
        {"ours": implementation("auto"), **({"naive": implementation("naive")} if (batch, length) == SMALL else {})},
        implementations={name: implementation(name) for name in fast(attention.IMPLEMENTATIONS)},
    )


def _trapezoidal(batch: int, length: int, direction: str) -> Case:
    """One input a head and step; maps already rotated."""

    def implementation(name: str):
        return lambda *operands: trapezoidal_scan(*operands, implementation=name)[0]

    def draw():
        dt = nn.softplus(normal(2, (batch, length, HEADS)) - 4)
        maps = [normal(seed, (batch, length, 1, HEADS, STATE)) / STATE**0.5 for seed in (4, 5)]
        mix = nn.sigmoid(normal(3, dt.shape))
        return (
            normal(1, (batch, length, 1, HEADS, WIDTH)),
            dt,
            -dt * jnp.arange(1.0, HEADS + 1),
            mix,
            *maps,
            jnp.ones(HEADS),
        )

    return op_case(
        "trapezoidal_scan",
        length_shape(batch, length),
        direction,
        2 * _state_flops(batch, length),  # two writes a token
        draw,
        {"ours": implementation("auto"), **({"naive": implementation("naive")} if (batch, length) == SMALL else {})},
        implementations={name: implementation(name) for name in fast(attention.IMPLEMENTATIONS)},
    )


def _linear_attention(kind: str, batch: int, length: int, direction: str) -> Case:
    def implementation(name: str):
        def run(q, k, v, log_decay=None, beta=None):
            return attention.linear_attention(q, k, v, log_decay=log_decay, beta=beta, implementation=name)[0]

        # The delta rule alone has no decay: its third argument is beta.
        return run if kind != "delta" else lambda q, k, v, beta: run(q, k, v, None, beta)

    def draw():
        q, k = (normal(seed, (batch, length, HEADS, STATE)) for seed in (1, 2))
        gates = {
            "linear": (),
            "retention": (nn.log_sigmoid(normal(4, (batch, length, HEADS)) + 3),),
            "gla": (nn.log_sigmoid(normal(4, (batch, length, HEADS, STATE)) + 3) / 4,),
            "delta": (nn.sigmoid(normal(5, (batch, length, HEADS))),),
            "gated delta": (
                nn.log_sigmoid(normal(4, (batch, length, HEADS)) + 3),
                nn.sigmoid(normal(5, (batch, length, HEADS))),
            ),
        }
        return q, k / jnp.linalg.norm(k, axis=-1, keepdims=True), normal(3, (batch, length, HEADS, WIDTH)), *gates[kind]

    return op_case(
        "linear_attention",
        f"{kind} {length_shape(batch, length)}",
        direction,
        _state_flops(batch, length),
        draw,
        {"ours": implementation("auto"), **({"naive": implementation("naive")} if (batch, length) == SMALL else {})},
        implementations={name: implementation(name) for name in fast(attention.IMPLEMENTATIONS)},
    )
