"""Evaluation of a language model over one unbroken text: the state goes from window to window, nothing is forgotten.

The usual evaluation starts every window afresh, so that its first tokens are predicted from nothing. For models whose
state is all they need both are natural; a figure should say which it is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from research.decode import models
from research.errors import UserError
from research.modules.state import Arrays
from research.tasks.base import summary


def carried_metrics(
    model: tuple[Any, Arrays, Arrays],
    source: Any,
    task: Any,
    *,
    piece: int = 1024,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Returns the task's metrics over all tokens of a source, read from the first to the last by one state.

    Args:
      model: config, params and stats.
      source: a token source; its documents, if known, reset the state where they begin.
      task: the language-modelling task.
      piece: tokens a call of the model.
      tick: called between pieces; may raise to stop.

    Raises:
      UserError: a mixer that does not reach beyond the model's length, or no language model.
    """
    config, params, stats = model
    models.check(config, 1)
    bounded = sorted({kind for kind in config.kinds if config.spec(kind).bounded})
    if bounded:
        raise UserError(
            f"{', '.join(bounded)} does not reach beyond {config.length} tokens, so no state can be carried over a "
            "whole text"
        )

    @jax.jit
    def advance(
        params: Arrays, stats: Arrays, state: Any, sums: Arrays, tokens: Array, labels: Array, ids: Array | None
    ) -> tuple[Any, Arrays]:
        logits, state = models.bind(config, params, stats, 1, piece).extend(state, tokens, ids)
        return state, jax.tree.map(jnp.add, sums, task.sums(logits, {"tokens": tokens, "labels": labels}))

    state = models.bind(config, params, stats, 1, piece).state
    sums = {k: jnp.asarray(v, jnp.float32) for k, v in task.zero_sums().items()}
    starts = source.documents
    for begin in range(0, max(source.num_tokens - 1, 0), piece):
        tick()
        window = np.asarray(source.tokens[begin : begin + piece + 1], np.int32)
        inputs, labels = _padded(window[:-1], piece, 0), _padded(window[1:], piece, -1)
        ids = None
        if starts is not None:
            if begin in starts:  # a state does not know its document: a border between two pieces is ours to see
                state = models.bind(config, params, stats, 1, piece).state
            places = begin + np.arange(piece + 1)
            document = np.searchsorted(starts, places, "right").astype(np.int32)
            ids, labels = document[None, :-1], np.where(document[1:] != document[:-1], -1, labels)
        state, sums = advance(params, stats, state, sums, inputs[None], labels[None], ids)
    return summary(task, jax.device_get(sums), source.name)


def _padded(x: np.ndarray, size: int, value: int) -> np.ndarray:
    return np.concatenate([x, np.full(size - len(x), value, np.int32)])
