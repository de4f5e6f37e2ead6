"""Softmax attention, full, in a window and routed by clusters; linear attention beside the full one at length 8,192."""

import functools
import math

import jax
from jax import nn

from research.bench import peers as other
from research.bench.case import BOTH, FORWARD, Case, fast, normal, op_case
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


def cases(name: str, peers: dict[str, str]) -> list[Case]:
    make, lengths = {
        "softmax_attention": (_attention, LENGTHS),
        "sliding_window_attention": (_sliding_window, WINDOW_LENGTHS),
        "routing_attention": (_routing, ROUTING_LENGTHS),
    }[name]
    return [make(length, direction) for length in lengths for direction in (FORWARD, BOTH)]


def _heads(length: int):
    return tuple(normal(seed, (1, length, HEADS, WIDTH)) for seed in (1, 2, 3))


def _pair_flops(pairs: int) -> int:
    return 4 * HEADS * WIDTH * pairs


def _linear(q, k, v):
    phi = lambda x: nn.elu(x) + 1
    return linear_attention(phi(q), phi(k), v, normalize=True)[0]


def _attention(length: int, direction: str) -> Case:
    def form(name: str):
        return functools.partial(attention.softmax_attention, causal=True, form=name)

    return op_case(
        attention.OP,
        f"causal 1x{length}x{HEADS}x{WIDTH}",
        direction,
        _pair_flops(length * (length + 1) // 2),
        lambda: _heads(length),
        {
            "ours": form("auto"),
            **({"naive": form("naive")} if length <= NAIVE_LENGTH else {}),
            "xla": functools.partial(jax.nn.dot_product_attention, is_causal=True),
            "linear attention": _linear,
        },
        forms={name: form(name) for name in fast(attention.FORMS)},
        peers={"torch": other.attention(causal=True)},
    )


def _sliding_window(length: int, direction: str) -> Case:
    def form(name: str):
        return functools.partial(sliding_window.sliding_window_attention, window=WINDOW, form=name)

    of_xla = functools.partial(jax.nn.dot_product_attention, is_causal=True, local_window_size=(WINDOW - 1, 0))
    return op_case(
        sliding_window.OP,
        f"causal 1x{length}x{HEADS}x{WIDTH} window {WINDOW}",
        direction,
        _pair_flops(length * WINDOW - WINDOW * (WINDOW - 1) // 2),
        lambda: _heads(length),
        {"ours": form("auto"), **({"naive": form("naive"), "xla": of_xla} if length <= NAIVE_LENGTH else {})},
        forms={name: form(name) for name in fast(sliding_window.FORMS)},
    )


def _routing(length: int, direction: str) -> Case:
    clusters = round(math.sqrt(length))
    window = round(length / clusters)

    def form(name: str):
        return lambda q, k, v, centroids: routing.routing_attention(
            q, k, v, centroids, window=window, causal=True, form=name
        )

    return op_case(
        routing.OP,
        f"causal 1x{length}x{HEADS}x{WIDTH} {clusters} clusters of {window}",
        direction,
        _pair_flops(clusters * window**2) // 2 + 4 * HEADS * WIDTH * length * clusters,
        lambda: (*_heads(length), routing.init_centroids(jax.random.key(4), HEADS, clusters, WIDTH).centroids),
        {"ours": form("auto"), **({"naive": form("naive")} if length == ROUTING_LENGTHS[0] else {})},
        forms={name: form(name) for name in fast(routing.FORMS)},
        differentiated=3,
    )
