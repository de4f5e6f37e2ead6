"""Softmax attention, full, in a window and routed by clusters; linear attention beside the full one at length 8,192."""

import functools
import math
from collections.abc import Mapping

import jax
from jax import nn

from research.bench import peers as other
from research.bench.case import BOTH, FORWARD, Case, fast, normal, op_case
from research.bench.catalog import register, register_suite
from research.bench.thresholds import Suite, Threshold, exponent, ratios, times_by_length
from research.ops import attention, sliding_window
from research.ops import routing_attention as routing
from research.ops.linear_attention import linear_attention

HEADS, WIDTH = 4, 64
LENGTHS = (1024, 8192)
WINDOW, WINDOW_LENGTHS = 256, (1024, 4096, 16_384)
ROUTING_LENGTHS = (
    512,
    2048,
    4096,
    8192,
)  # at the first the reference implementation runs beside: it needs a matrix of all pairs a cluster
NAIVE_LENGTH = 1024  # the longest whose matrix of all pairs is computed as one


@register("softmax_attention", "softmax attention, linear attention beside it at length 8,192")
def softmax_cases(peers: Mapping[str, str]) -> list[Case]:
    return [_attention(length, direction) for length in LENGTHS for direction in (FORWARD, BOTH)]


@register("sliding_window_attention", "softmax attention to the 256 tokens before")
def sliding_window_cases(peers: Mapping[str, str]) -> list[Case]:
    return [_sliding_window(length, direction) for length in WINDOW_LENGTHS for direction in (FORWARD, BOTH)]


@register("routing_attention", "softmax attention inside clusters of tokens")
def routing_cases(peers: Mapping[str, str]) -> list[Case]:
    return [_routing(length, direction) for length in ROUTING_LENGTHS for direction in (FORWARD, BOTH)]


register_suite(
    "attention",
    Suite(
        (
            ("softmax_attention", "1x8192x"),
            ("sliding_window_attention", ""),
            *(("routing_attention", f"1x{length}x") for length in (2048, 4096, 8192)),
        ),
        (
            Threshold(
                "linear attention: speed over softmax attention at length 8,192",
                lambda rows: min(ratios(rows, "softmax_attention", "ours", "linear attention", words="1x8192x")),
                4,
                at_least=True,
            ),
            Threshold(
                "sliding window: exponent of time in length, 1,024 to 16,384",
                lambda rows: exponent(times_by_length(rows, "sliding_window_attention")),
                1.1,
            ),
            Threshold(
                "routing: exponent of time in length, 2,048 to 8,192",
                lambda rows: exponent(times_by_length(rows, "routing_attention")),
                1.6,
            ),
        ),
    ),
)


def _heads(length: int):
    return tuple(normal(seed, (1, length, HEADS, WIDTH)) for seed in (1, 2, 3))


def _pair_flops(pairs: int) -> int:
    return 4 * HEADS * WIDTH * pairs


def _linear(q, k, v):
    phi = lambda x: nn.elu(x) + 1
    return linear_attention(phi(q), phi(k), v, normalize=True)[0]


def _attention(length: int, direction: str) -> Case:
    def implementation(name: str):
        return functools.partial(attention.softmax_attention, causal=True, implementation=name)

    return op_case(
        attention.OP,
        f"causal 1x{length}x{HEADS}x{WIDTH}",
        direction,
        _pair_flops(length * (length + 1) // 2),
        lambda: _heads(length),
        {
            "ours": implementation("auto"),
            **({"naive": implementation("naive")} if length <= NAIVE_LENGTH else {}),
            "xla": functools.partial(jax.nn.dot_product_attention, is_causal=True),
            "linear attention": _linear,
        },
        implementations={name: implementation(name) for name in fast(attention.IMPLEMENTATIONS)},
        peers={"torch": other.attention(causal=True)},
    )


def _sliding_window(length: int, direction: str) -> Case:
    def implementation(name: str):
        return functools.partial(sliding_window.sliding_window_attention, window=WINDOW, implementation=name)

    of_xla = functools.partial(jax.nn.dot_product_attention, is_causal=True, local_window_size=(WINDOW - 1, 0))
    return op_case(
        sliding_window.OP,
        f"causal 1x{length}x{HEADS}x{WIDTH} window {WINDOW}",
        direction,
        _pair_flops(length * WINDOW - WINDOW * (WINDOW - 1) // 2),
        lambda: _heads(length),
        {
            "ours": implementation("auto"),
            **({"naive": implementation("naive"), "xla": of_xla} if length <= NAIVE_LENGTH else {}),
        },
        implementations={name: implementation(name) for name in fast(sliding_window.IMPLEMENTATIONS)},
    )


def _routing(length: int, direction: str) -> Case:
    clusters = round(math.sqrt(length))
    window = round(length / clusters)

    def implementation(name: str):
        return lambda q, k, v, centroids: routing.routing_attention(
            q, k, v, centroids, window=window, causal=True, implementation=name
        )

    return op_case(
        routing.OP,
        f"causal 1x{length}x{HEADS}x{WIDTH} {clusters} clusters of {window}",
        direction,
        _pair_flops(clusters * window**2) // 2 + 4 * HEADS * WIDTH * length * clusters,
        lambda: (*_heads(length), routing.init_centroids(jax.random.key(4), HEADS, clusters, WIDTH).centroids),
        {
            "ours": implementation("auto"),
            **({"naive": implementation("naive")} if length == ROUTING_LENGTHS[0] else {}),
        },
        implementations={name: implementation(name) for name in fast(routing.IMPLEMENTATIONS)},
        differentiated=3,
    )
