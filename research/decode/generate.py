"""Text from a language model, as one program or token by token, and stop strings.

A model is two functions over a state, any tree of arrays: `extend(state, tokens [B, T], segment_ids [B, T] or None)` returns
(logits [B, T, V], state), and `step(state, token [B])` (logits [B, V], state) continues the segment of the last token. Prompts of
different lengths are padded on the left, and pads are another segment: the model lets a new segment start afresh.
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

State = Any
Extend = Callable[[State, Int[Array, "B T"], Int[Array, "B T"] | None], tuple[Float[Array, "B T V"], State]]
Step = Callable[[State, Int[Array, " B"]], tuple[Float[Array, "B V"], State]]


def generate(
    extend: Extend,
    step: Step,
    state: State,
    prompt: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
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
      Tokens, where a row that met a stop token repeats it to the end, and the number of tokens before it (N where there was none).

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
    prompt: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
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

    `extend` and `step` are compiled by the caller, so that parameters stay their arguments. A token is read, the only wait, when the
    step after it is already under way; that step is wasted where all rows end.

    Args, Raises: as in `generate`; errors come at the call, before the first token is asked for.
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
    """Raises UserError unless there is a token to make."""
    if num_tokens < 1:
        raise UserError(f"num_tokens={num_tokens}; valid: whole numbers from 1")


class StopStrings:
    """Ends a text, which comes in pieces, at a string: the first one that is complete, the longest of those complete at once.

    The result is the same however the text is cut into pieces. What could be the beginning of a stop string is held back.

    Attributes:
      stopped: True once a string was met.
    """

    def __init__(self, strings: Sequence[str]):
        """Raises UserError for an empty string, or a bare one."""
        if isinstance(strings, str) or not all(strings):
            raise UserError(f"stop strings {strings!r}; valid: a list of strings that are not empty")
        self.strings = tuple(strings)
        self.stopped = False
        self._held = ""

    def feed(self, piece: str) -> str:
        """Returns the text that is safe to show after this piece; nothing after a stop."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(text.find(s) + len(s), text.find(s)) for s in self.strings if s in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((n for s in self.strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Returns what was held back, at the end of the text."""
        text, self._held = self._held, ""
        return text
