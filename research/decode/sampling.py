"""The next token: temperature, top-k (Fan et al. 2018, arXiv 1805.04833) and nucleus (Holtzman et al. 2020, arXiv
1904.09751).

Tokens are ordered by logit, equal ones by id. All rules keep a beginning of that order, so greedy, top_k=1 and a tiny
top_p agree at ties. A draw depends on (key, row, position) alone: a row's text is the same whatever batch it is in.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from research.errors import UserError

SMALLEST_TEMPERATURE = 1e-30
"""Below it a temperature is taken as 0: float32 could not divide by it."""


def adjust(
    logits: Float[Array, "*B V"], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Float[Array, "*B V"]:
    """Returns the logits, up to a constant, of the distribution that is sampled from; -inf for tokens left out.

    The order is temperature, then top-k, then the nucleus of what top-k left, renormalised. Costs a sort of the
    vocabulary if top_p < 1 and top_k = 0; a top_k of a hundred or so before the nucleus makes it cheap.

    Args:
      logits: of the model, in any float dtype; each row has a finite one.
      temperature: divides the logits; 0 leaves the first of the largest (greedy).
      top_k: how many tokens stay; 0 for all.
      top_p: the fewest tokens stay whose probability reaches it, at least one; 1 for all.

    Returns:
      Float32; the largest is 0.

    Raises:
      UserError: for a number out of range.
    """
    check(temperature, top_k, top_p)
    logits = logits.astype(jnp.float32)
    size = logits.shape[-1]
    if temperature < SMALLEST_TEMPERATURE:
        return jnp.where(jnp.arange(size) == logits.argmax(-1, keepdims=True), 0.0, -jnp.inf)
    logits = (logits - logits.max(-1, keepdims=True)) / temperature
    top_k = min(top_k or size, size)
    if top_k == size and top_p == 1:
        return logits
    ordered = lax.top_k(logits, top_k)[0]
    if top_p == 1:
        return _first(logits, ordered[..., -1:], top_k)
    sums = jnp.cumsum(jax.nn.softmax(ordered), -1)
    count = 1 + (sums[..., :-1] < top_p).sum(-1, keepdims=True)
    return _first(logits, jnp.take_along_axis(ordered, count - 1, -1), count)


def _first(logits, last, count):
    """Keeps the first `count` tokens of the order, the last of which has the logit `last`."""
    above, equal = logits > last, logits == last
    room = count - above.sum(-1, keepdims=True)
    return jnp.where(above | (equal & (jnp.cumsum(equal, -1) <= room)), logits, -jnp.inf)


def check(temperature: float, top_k: int, top_p: float) -> None:
    """Raises UserError for a number out of range."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature}; valid: numbers from 0 (greedy)")
    if top_k < 0 or top_k != int(top_k):
        raise UserError(f"top_k={top_k}; valid: whole numbers from 1, or 0 for all tokens")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}; valid: above 0 up to 1 (all tokens)")


def sample(
    key: Key[Array, ""] | None,
    logits: Float[Array, "B V"],
    position: int | Int[Array, ""] | Int[Array, " B"] = 0,
    *,
    rows: Int[Array, " B"] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Array, " B"]:
    """Draws a token for each row, -1 where the logits hold NaN or infinity or none is finite: a program cannot raise,
    its caller must.

    Args:
      key: of the whole text; may be None at temperature 0, which draws nothing.
      logits: of the next token.
      position: how many tokens the text has; for all rows or each.
      rows: numbers that tell rows apart; 0 to B - 1 by default. A row keeps its draws in another batch if it keeps its
        number.
      temperature, top_k, top_p: as in `adjust`.

    Raises:
      UserError: for a number out of range, or for a missing key.
    """
    check(temperature, top_k, top_p)
    if temperature < SMALLEST_TEMPERATURE:
        return refused(logits, logits.astype(jnp.float32).argmax(-1).astype(jnp.int32))
    rows = jnp.arange(len(logits)) if rows is None else rows
    return refused(logits, draw(position_keys(key, rows, position), adjust(logits, temperature, top_k, top_p)))


def refused(logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """Returns the tokens, -1 in place of those whose logits are no numbers to sample from; -inf is one, that of
    probability 0."""
    return jnp.where(jnp.isfinite(logits.astype(jnp.float32).max(-1)), tokens, -1)


def draw(keys: Key[Array, "*B"], logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """Draws from softmax(logits), each with its key."""
    flat = jax.vmap(jax.random.categorical)(keys.reshape(-1), logits.reshape(-1, logits.shape[-1]))
    return flat.reshape(keys.shape).astype(jnp.int32)


def position_keys(
    key: Key[Array, ""] | None, rows: Int[Array, "*B"], positions: int | Int[Array, "*#B"]
) -> Key[Array, "*B"]:
    """A key for each row and position.

    Raises:
      UserError: without a key.
    """
    if key is None:
        raise UserError("sampling needs a key; give one, or temperature=0 for greedy decoding")
    rows, positions = jnp.broadcast_arrays(rows, positions)
    fold = lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position)
    return jax.vmap(fold)(rows.reshape(-1), positions.reshape(-1)).reshape(rows.shape)


def is_any(tokens: Int[Array, "*B"], stop: Sequence[int]) -> Array:
    """Bool [*B]: is the token one of these? All False for none."""
    return (tokens[..., None] == jnp.array(tuple(stop), jnp.int32)).any(-1)


def text_lengths(tokens: Int[Array, "*B N"], stop: Sequence[int]) -> Int[Array, "*B"]:
    """How many tokens come before the first stop token; N where there is none."""
    return (jnp.cumsum(is_any(tokens, stop), -1) == 0).sum(-1).astype(jnp.int32)
