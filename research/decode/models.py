"""From a sequence model and its weights to the two functions that decoding asks for."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from research.decode import speculative
from research.decode.generate import Extend, State, Step
from research.errors import UserError
from research.models.sequence import SequenceConfig
from research.modules.state import Arrays, apply


class Functions(NamedTuple):
    """A model with its weights."""

    state: State
    """Before the first token."""
    extend: Extend
    step: Step
    prefill: Extend
    """As `extend`, with the logits of the last token alone: [B, 1, V], whatever the length of the prompt."""


def capacity(length: int) -> int:
    """Returns the size of an attention cache for so many tokens: a power of two, so that few sizes are compiled."""
    return max(16, 1 << (length - 1).bit_length())


def bind(config: SequenceConfig, params: Arrays, stats: Arrays, batch: int, length: int, ahead: int = 0) -> Functions:
    """Returns a model's functions for a batch of texts of up to `length` tokens, prompt included.

    Args:
      ahead: tokens beyond the length that may be tried and thrown away, as drafts are.

    Raises:
      UserError: no language model, or a text that is longer than its mixers reach.
    """
    check(config, length)
    run = lambda method, *args, **more: apply(config, params, stats, *args, method=method, **more)[0]
    state = run("init_state", batch, capacity(length + ahead))

    def extend(state, tokens, segment_ids=None):
        return run("extend", tokens, state, segment_ids)

    def prefill(state, tokens, segment_ids=None):
        return run("extend", tokens, state, segment_ids, last=True)

    return Functions(state, extend, lambda state, token: run("step", token, state), prefill)


def check(config: Any, length: int) -> None:
    """Raises UserError unless the model can continue texts up to so many tokens."""
    if not isinstance(config, SequenceConfig) or config.vector_tokens or config.output_dim or config.pool != "none":
        raise UserError(
            f"the {config.family} model is no language model; "
            "generate needs one that reads tokens and predicts the next"
        )
    if length > (longest(config) or length):
        kinds = ", ".join(sorted(kind for kind in set(config.kinds) if config.spec(kind).bounded))
        raise UserError(
            f"{length} tokens, prompt included, are more than the context of {config.length} that {kinds} was trained "
            "for; shorten the prompt "
            f"or ask for fewer tokens; valid: up to {config.length} of both together"
        )


def longest(config: SequenceConfig) -> int | None:
    """Returns how many tokens a text may have, prompt included; None where the mixers have no bound."""
    return config.length if any(config.spec(kind).bounded for kind in config.kinds) else None


def full_of(functions: Functions) -> speculative.Full:
    """A full model for speculative decoding: verifies in one pass; after a rejection single steps redo the accepted
    tokens."""

    def verify(state, tokens):
        logits, after = functions.extend(state, tokens, None)
        return logits, (state, tokens, after)

    def redo(state, tokens, count):
        def body(state, inputs):
            token, i = inputs
            after = functions.step(state, token)[1]
            return jax.tree.map(lambda new, old: jnp.where(i < count, new, old), after, state), None

        return lax.scan(body, state, (tokens.T, jnp.arange(tokens.shape[1])))[0]

    def commit(trail, num_valid):
        state, tokens, after = trail
        count = num_valid[0]  # one row: rows of a batch could not stand at different positions
        return lax.cond(count == tokens.shape[1], lambda: after, lambda: redo(state, tokens, count))

    return speculative.Full(functions.prefill, verify, commit)


def draft_of(functions: Functions) -> speculative.Draft:
    """A drafting model; its states are stacked step by step, and one is taken."""
    pick = lambda states, index: jax.tree.map(lambda a: a[index[0]], states)
    return speculative.Draft(functions.prefill, functions.step, pick)
