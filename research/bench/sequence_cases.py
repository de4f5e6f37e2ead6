"""Sequence models: a training step over lengths at a fixed number of tokens, and one step of generation at two
positions."""

import functools
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from research.bench.case import BOTH, Built, Case, program
from research.bench.catalog import register, register_suite
from research.bench.thresholds import Row, Suite, Threshold, holds, ratios, slower, spread
from research.decode import models
from research.models import registry
from research.models.sequence import SequenceConfig
from research.modules.state import abstract, apply, initialize
from research.tasks.language import LanguageModelling

TOKENS, LENGTHS = 8192, (256, 1024, 8192)
EARLY, LATE = 100, 10_000
LINEAR = (
    "mamba",
    "mamba2",
    "mamba3",
    "gla",
    "retention",
    "deltanet",
    "gated_deltanet",
    "hgrn",
    "cosformer",
    "performer",
    "sla",
    "window",
)
RECURRENT = (
    "mamba",
    "mamba2",
    "mamba3",
    "gla",
    "retention",
    "deltanet",
    "gated_deltanet",
    "hgrn",
    "performer",
    "sla",
    "window",
)
GROWING = "attention"
ONE_TOKEN = "one token"


@register(
    "sequence_training",
    "a training step of every linear mixer, length 256 to 8,192 at 8,192 tokens",
    kind="model",
)
def training_cases(peers: Mapping[str, str]) -> list[Case]:
    return [training(kind) for kind in LINEAR]


@register(
    "sequence_decoding",
    "one step of generation at positions 100 and 10,000, recurrent mixers and attention",
    kind="model",
)
def decoding_cases(peers: Mapping[str, str]) -> list[Case]:
    return [one_token(kind) for kind in (*RECURRENT, GROWING)]


def _spread_of(words: str, rows: Sequence[Row]) -> float:
    return spread([row["median_ms"] for row in rows if holds(row["shape"], words)])


register_suite(
    "context",
    Suite(
        (("sequence_training", ""),),
        tuple(
            Threshold(
                f"{kind}: time of a training step, largest over smallest, length 256 to 8,192 at 8,192 tokens",
                functools.partial(_spread_of, f"{kind} "),
                1.2,
            )
            for kind in LINEAR
        ),
    ),
)
register_suite(
    "decoding",
    Suite(
        (("sequence_decoding", ""),),
        (
            *(
                slower(
                    f"{kind}: a step at position 10,000 over one at 100",
                    "sequence_decoding",
                    f"position {EARLY}",
                    1.1,
                    words=f"{kind} ",
                )
                for kind in RECURRENT
            ),
            Threshold(
                "attention with a cache: a step at position 10,000 over one at 100",
                lambda rows: min(ratios(rows, "sequence_decoding", "ours", f"position {EARLY}", words=f"{GROWING} ")),
                1.5,
                at_least=True,
            ),
        ),
    ),
)


def config_of(kind: str, length: int) -> SequenceConfig:
    """Two layers of the small model of a kind, over bytes."""
    return registry.model_config(f"{kind}_small", depth=2, length=length, implementation="cpu")


def training(kind: str) -> Case:
    """Loss and gradients of a batch of 8,192 tokens: one sequence ("ours"), and several shorter ones, in turns."""
    longest = config_of(kind, LENGTHS[-1])
    task, count = LanguageModelling(), abstract(longest).num_params()

    def at(length):
        config = config_of(kind, length)

        def run(params, stats, tokens):
            read = lambda p: apply(config, p, stats, tokens[length][:, :-1], mode="train")[0]
            return jax.value_and_grad(lambda p: task.loss(read(p), tokens[length][:, 1:]))(params)

        return program(run)

    return Case(
        name="sequence_training",
        shape=f"{kind} {TOKENS} tokens width {longest.dim}",
        direction=BOTH,
        flops=6 * TOKENS * count,
        num_bytes=4 * (2 * count + TOKENS),
        inputs=lambda: (*_weights(longest), {length: _tokens(TOKENS // length, length + 1) for length in LENGTHS}),
        contenders={"ours": at(LENGTHS[-1]), **{f"length {length}": at(length) for length in LENGTHS[:-1]}},
    )


def one_token(kind: str) -> Case:
    """One step of generation at position 10,000 ("ours") and at 100; attention's cache has the size that each asks
    for."""
    config = config_of(kind, 16_384)
    count = abstract(config).num_params()

    def at(position):
        def build(params, stats, token):
            run = lambda p, s, token, state: apply(config, p, s, token, state, method="step")[0]
            state = apply(config, params, stats, 1, models.capacity(position + 1), method="init_state")[0]
            held = [{"layers": jax.tree.map(jnp.copy, state["layers"]), "position": jnp.int32(position)}]
            start = time.perf_counter()
            compiled = jax.jit(run, donate_argnums=3).lower(params, stats, token, held[0]).compile()
            seconds = time.perf_counter() - start

            def call():
                logits, after = compiled(params, stats, token, held[0])
                held[0] = {"layers": after["layers"], "position": jnp.int32(position)}
                return logits

            memory = compiled.memory_analysis()
            return Built(call, seconds, None if memory is None else memory.temp_size_in_bytes)

        return build

    return Case(
        name="sequence_decoding",
        shape=f"{kind} 2 layers width {config.dim}",
        direction=ONE_TOKEN,
        flops=2 * count,
        num_bytes=4 * count,
        inputs=lambda: (*_weights(config), _tokens(1, 1)[:, 0]),
        contenders={"ours": at(LATE), f"position {EARLY}": at(EARLY)},
    )


def _weights(config: SequenceConfig):
    return jax.jit(functools.partial(initialize, config))(jax.random.key(0))


def _tokens(batch: int, length: int):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, length)), jnp.int32)
