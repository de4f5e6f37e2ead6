"""The block of a mixture of experts, router and all, beside a dense gated FFN of the same active FLOPs: forward and
gradients."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from research.bench.case import BOTH, Case, normal, program
from research.bench.catalog import register, register_suite
from research.bench.thresholds import Suite, slower
from research.ops.expert_dispatch import dropless, with_places
from research.ops.expert_routing import capacity, load_balance_loss, places, top_k_choice

TOKENS, WIDTH, HIDDEN, ACTIVE = 4096, 256, 512, 2
EXPERTS = (8, 64)


@register(
    "moe_ffn",
    "a mixture's training step beside a dense FFN of the same active FLOPs, 8 and 64 experts",
    kind="model",
)
def cases(peers: Mapping[str, str]) -> list[Case]:
    return [_case(experts) for experts in EXPERTS]


register_suite(
    "moe",
    Suite(
        (("moe_ffn", ""),),
        (
            slower(
                "mixture of 8 experts, top-2: time over a dense FFN of the same active FLOPs",
                "moe_ffn",
                "dense",
                1.8,
                words="8 experts",
            ),
            slower("mixture of 64 experts, top-2: the same", "moe_ffn", "dense", 3, words="64 experts"),
        ),
    ),
)


def _case(experts: int) -> Case:
    def draw():
        dims = {"up": (WIDTH, HIDDEN), "gate": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
        kernels = {key: normal(i, (experts, *shape)) / shape[0] ** 0.5 for i, (key, shape) in enumerate(dims.items())}
        many = {key: tuple(ACTIVE * n if n == HIDDEN else n for n in shape) for key, shape in dims.items()}
        dense = {key: normal(i, shape) / shape[0] ** 0.5 for i, (key, shape) in enumerate(many.items())}
        return (
            normal(5, (TOKENS, WIDTH)),
            normal(6, (WIDTH, experts)) / WIDTH**0.5,
            kernels,
            dense,
            normal(7, (TOKENS, WIDTH)),
        )

    def mixture(dispatch):
        def forward(x, router, kernels):
            routed = top_k_choice(x @ router, ACTIVE, renormalize=True)
            return dispatch(x, routed, kernels), load_balance_loss(routed.scores, routed.experts)

        def step(x, router, kernels, dense, dy):
            (y, aux), vjp = jax.vjp(forward, x, router, kernels)
            return y, vjp((dy, jnp.ones_like(aux)))

        return program(step)

    def queued(x, routed, kernels):
        places_per_expert = capacity("megablocks", TOKENS, experts, ACTIVE, 1.25)
        return with_places(
            x, routed.experts, routed.weights, places(routed.experts, experts), places_per_expert, kernels
        )

    def dense_step(x, router, kernels, dense, dy):
        def ffn(x, dense):
            return (jax.nn.silu(x @ dense["gate"]) * (x @ dense["up"])) @ dense["down"]

        y, vjp = jax.vjp(ffn, x, dense)
        return y, vjp(dy)

    contenders = {
        "ours": mixture(lambda x, routed, kernels: dropless(x, routed.experts, routed.weights, kernels)),
        "capacity 1.25": mixture(queued),
        "dense": program(dense_step),
    }
    flops = 3 * TOKENS * (6 * ACTIVE * WIDTH * HIDDEN + 2 * WIDTH * experts)
    num_bytes = 4 * (4 * TOKENS * WIDTH + 2 * 3 * experts * WIDTH * HIDDEN)
    return Case(
        "moe_ffn", f"{experts} experts top-{ACTIVE} {TOKENS}x{WIDTH}x{HIDDEN}", BOTH, flops, num_bytes, draw, contenders
    )
