"""Text from a language model, as one program or token by token.

A model is two functions over a state, any tree of arrays: `extend(state, tokens [B, T], segment_ids [B, T] or None)`
returns (logits [B, T, V], state), and `step(state, token [B])` (logits [B, V], state) continues the segment of the last
token. Prompts of different lengths are padded on the left, and pads are another segment: the model lets a new segment
start afresh. Of a prompt only the logits of the last token are read, so `extend` may return those alone (T = 1).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from research.decode.sampling import check, is_any, sample, text_lengths
from research.errors import UserError

AnyArray = Array | np.ndarray
State = Any
Extend = Callable[[State, Int[AnyArray, "B T"], Int[AnyArray, "B T"] | None], tuple[Float[Array, "B T V"], State]]
Step = Callable[[State, Int[Array, " B"]], tuple[Float[Array, "B V"], State]]


def generate(
    extend: Extend,
    step: Step,
    state: State,
    prompt: Int[AnyArray, "B T"],
    segment_ids: Int[AnyArray, "B T"] | None = None,
    *,
    num_tokens: int,
    key: Key[Array, ""] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    rows: Int[Array, " B"] | None = None,
) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
    """Continues prompts; to be jitted whole by the caller. Makes one call of `extend` and num_tokens - 1 of `step`.

    Args:
      extend, step, state: the model, and its state before the prompt.
      prompt: tokens, padded on the left.
      segment_ids: the pads' differ from the text's; None where there are no pads.
      num_tokens: N, how many to add.
      key, temperature, top_k, top_p, rows: as in `research.decode.sampling.sample`.
      stop: tokens that end a row.

    Returns:
      Tokens, where a row that met a stop token repeats it to the end, and the number of tokens before it (N where there
      was none). A token of -1 stands where the logits were no numbers to sample from.

    Raises:
      UserError: for a number out of range, or for a missing key.
    """
    check_length(num_tokens)
    choose = functools.partial(sample, key, rows=rows, temperature=temperature, top_k=top_k, top_p=top_p)
    logits, state = extend(state, prompt, segment_ids)
    first = choose(logits[:, -1], 0)

    def body(carry, position):
        token, state = carry
        logits, state = step(state, token)
        token = jnp.where(is_any(token, stop), token, choose(logits, position))
        return (token, state), token

    _, rest = lax.scan(body, (first, state), jnp.arange(1, num_tokens))
    tokens = jnp.concatenate([first[:, None], rest.T], 1)
    return tokens, text_lengths(tokens, stop)


def stream(
    extend: Extend,
    step: Step,
    state: State,
    prompt: Int[AnyArray, "B T"],
    segment_ids: Int[AnyArray, "B T"] | None = None,
    *,
    num_tokens: int,
    key: Key[Array, ""] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    rows: Int[Array, " B"] | None = None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yields the columns of `generate`'s tokens as they come, up to the one in which the last row meets a stop token.

    `extend` and `step` are compiled by the caller, so that parameters stay their arguments. A token is read, the only
    wait, when the step after it is already under way; that step is wasted where all rows end.

    Args, Raises: as in `generate`; errors come at the call, before the first token is asked for. UserError in between:
      logits that
    are no numbers to sample from.
    """
    check_length(num_tokens)
    check(temperature, top_k, top_p)
    if temperature and key is None:
        raise UserError("sampling needs a key; give one, or temperature=0 for greedy decoding")
    choose = functools.partial(_choose, temperature=temperature, top_k=top_k, top_p=top_p, stop=tuple(stop))

    def columns():
        logits, now = extend(state, prompt, segment_ids)
        logits = logits[:, -1]
        token, ended = np.zeros(len(prompt), np.int32), np.zeros(len(prompt), bool)
        for position in range(num_tokens):
            token = choose(key, logits, position, token, rows)
            if position + 1 < num_tokens:
                logits, now = step(now, token)
            column = np.asarray(token)
            check_sampled(column, position)
            yield column
            ended |= np.isin(column, stop)
            if ended.all():
                return

    return columns()


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p", "stop"))
def _choose(key, logits, position, before, rows, *, temperature, top_k, top_p, stop):
    token = sample(key, logits, position, rows=rows, temperature=temperature, top_k=top_k, top_p=top_p)
    return jnp.where((position > 0) & is_any(before, stop), before, token)


def check_length(num_tokens: int) -> None:
    """Raises UserError unless there is a token to make, and positions fit 32 bits."""
    if not 1 <= num_tokens < 2**30:
        raise UserError(
            f"num_tokens={num_tokens}; valid: whole numbers from 1{'' if num_tokens < 1 else ' to 2^30 - 1'}"
        )


def check_sampled(tokens: Int[np.ndarray, "*B"], position: int = 0) -> None:
    """Raises UserError where `sample` met logits that are no numbers; `position`: tokens before these, along the last
    axis where it is time."""
    if (tokens < 0).any():
        position += int(np.argmax((tokens < 0).any(0))) if tokens.ndim > 1 else 0
        raise UserError(
            f"the model's logits after {position} new tokens are not finite, so nothing can be sampled; "
            "its weights are damaged or have "
            "diverged: use an earlier checkpoint"
        )
