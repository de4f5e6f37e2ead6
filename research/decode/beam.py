"""Beam search, and diverse beam search (Vijayakumar et al. 2016, arXiv 1610.02424, algorithm 1) with Hamming diversity.

Groups take turns at each position: a group is charged `diversity` for every beam of earlier groups that just took the
same token; the charge stays in the sums by which its beams are chosen, as in the authors' code. Reported scores are the
model's own. Ended texts leave the beam for a list of their own, ranked by log-probability / ((5 + length) / 6)^alpha
(Wu et al. 2016, arXiv 1609.08144, section 7), and the search ends when no beam can still enter the list.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from research.decode.generate import Extend, State, Step, check_length
from research.decode.sampling import is_any
from research.errors import UserError


class Beams(NamedTuple):
    """Texts, the best first. A score of -inf marks a place for which there was no text (W above the number of
    texts)."""

    tokens: Int[Array, "B W N"]
    """A text that ended repeats its last token."""
    lengths: Int[Array, "B W"]
    """Tokens before what ended the text."""
    scores: Float[Array, "B W"]
    """Log-probability, the stop token's included, over the norm of the length."""
    groups: Int[Array, "B W"]
    """The group that found the text."""


class _Texts(NamedTuple):
    """Texts of a group, the best first."""

    tokens: Int[Array, "*G B K N"]
    log_probs: Float[Array, "*G B K"]
    ranks: Float[Array, "*G B K"]
    """What they are chosen by: of beams the log-probability less the charges, of ended texts the score."""


class _Settings(NamedTuple):
    width: int
    diversity: float
    alpha: float
    stop: tuple[int, ...]
    sequences: tuple[tuple[int, ...], ...]


def take_batch(state: State, indices: Int[Array, " M"]) -> State:
    """Picks rows of a state whose arrays hold the batch on axis 0; those without axes are left alone."""
    return jax.tree.map(lambda x: x[indices] if jnp.ndim(x) else x, state)


def beam_search(
    extend: Extend,
    step: Step,
    state: State,
    prompt: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    beam_width: int,
    num_tokens: int,
    groups: int = 1,
    diversity: float = 0.0,
    alpha: float = 0.0,
    stop: Sequence[int] = (),
    sequences: Sequence[Sequence[int]] = (),
    take_batch: Callable[[State, Int[Array, " M"]], State] = take_batch,
) -> Beams:
    """Searches for the likeliest continuations; to be jitted whole by the caller. A step is one call of `step` with B *
    W rows.

    Args:
      extend, step, state, prompt, segment_ids: as in `research.decode.generate.generate`.
      beam_width: W, the beams of all groups.
      num_tokens: N, the longest text.
      groups: how many groups share the beams; 1 is plain beam search.
      diversity: the charge (lambda), in nats; at 0 all groups find the same.
      alpha: how much length is favoured; 0: not at all, and only then does the order follow the probabilities.
      stop: tokens that end a text.
      sequences: runs of tokens that end it too, as stop texts are.
      take_batch: (state, indices) -> state of those rows, for states that hold the batch elsewhere than on axis 0.

    Returns:
      W texts a row, the best first; of equal ones that of the earlier group. The scores are NaN where the model's
      logits are.

    Raises:
      UserError: for a number out of range.
    """
    check(beam_width, num_tokens, groups, diversity, alpha)
    batch = len(prompt)
    settings = _Settings(beam_width // groups, diversity, alpha, tuple(stop), tuple(map(tuple, sequences)))
    rows = jnp.repeat(jnp.arange(batch), beam_width)
    logits, state = extend(state, prompt, segment_ids)
    live, ended = _start(groups, batch, settings.width, num_tokens)
    live, ended, _, tokens = _choose(live, ended, logits[rows, -1], 0, settings)

    def unfinished(carry):
        at, live, ended = carry[:3]
        # A beam's log-probability only falls, and the norm is largest for the longest text.
        best = live.log_probs.max(-1) / _norm(num_tokens, alpha)
        return (at < num_tokens) & (best > ended.ranks[..., -1]).any()

    def body(carry):
        at, live, ended, tokens, state = carry
        logits, state = step(state, tokens)
        live, ended, parents, tokens = _choose(live, ended, logits, at, settings)
        return at + 1, live, ended, tokens, take_batch(state, parents)

    carry = (1, live, ended, tokens, take_batch(state, rows))
    _, live, ended, _, _ = lax.while_loop(unfinished, body, carry)
    return _collect(live, ended, num_tokens, settings)


def _start(groups, batch, width, num_tokens):
    """One beam, the empty text, in each group; the others are none."""
    none = jnp.full((groups, batch, width), -jnp.inf)
    tokens = jnp.zeros((groups, batch, width, num_tokens), jnp.int32)
    one = none.at[:, :, 0].set(0.0)
    return _Texts(tokens, one, one), _Texts(tokens, none, none)


def _norm(length, alpha):
    return ((5 + length) / 6) ** alpha


def _choose(live, ended, logits, at, settings):
    """Extends all beams by the token at `at`: group after group, since each is charged for what those before it took.

    Returns:
      Beams and ended texts, and for each row of the model (batch, group, beam) the row it continues from and its token.
    """
    groups, batch, width, _ = live.tokens.shape
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, groups, width, -1)
    vocabulary = log_probs.shape[-1]

    def turn(taken, group):
        live, ended, log_probs = group
        live, ended, parents, tokens = _extend_group(live, ended, log_probs, settings.diversity * taken, at, settings)
        alive = jnp.isfinite(live.ranks).astype(taken.dtype)
        taken = taken.at[jnp.arange(batch)[:, None], tokens].add(alive)
        return taken, (live, ended, parents, tokens)

    taken = jnp.zeros((batch, vocabulary))
    _, (live, ended, parents, tokens) = lax.scan(turn, taken, (live, ended, jnp.moveaxis(log_probs, 1, 0)))
    first = (jnp.arange(batch) * groups + jnp.arange(groups)[:, None]) * width
    by_row = lambda x: jnp.moveaxis(x, 0, 1).reshape(-1)
    return live, ended, by_row(first[..., None] + parents), by_row(tokens)


def _extend_group(live, ended, log_probs, charges, at, settings):
    batch, width, vocabulary = log_probs.shape
    sums = live.log_probs[..., None] + log_probs
    ranks = live.ranks[..., None] + log_probs - charges[:, None]
    # So many that, however many of them end, enough go on.
    enough = min(width * (1 + len(settings.stop) + len(settings.sequences)), width * vocabulary)
    ranks, flat = lax.top_k(ranks.reshape(batch, -1), enough)
    parents, tokens = flat // vocabulary, flat % vocabulary
    sums = jnp.take_along_axis(sums.reshape(batch, -1), flat, -1)
    texts = jnp.take_along_axis(live.tokens, parents[..., None], 1)
    texts = jnp.where(jnp.arange(texts.shape[-1]) >= at, tokens[..., None], texts)
    ends = is_any(tokens, settings.stop) | _completes(texts, at, settings.sequences)
    scores = jnp.where(ends, sums / _norm(at + 1, settings.alpha), -jnp.inf)
    ended = _best(_join(ended, _Texts(texts, sums, scores)), width)[0]
    live, kept = _best(_Texts(texts, sums, jnp.where(ends, -jnp.inf, ranks)), width)
    # A text that ended must not bound the search as a beam would.
    live = live._replace(log_probs=jnp.where(live.ranks == -jnp.inf, -jnp.inf, live.log_probs))
    return live, ended, jnp.take_along_axis(parents, kept, -1), jnp.take_along_axis(tokens, kept, -1)


def _completes(texts, at, sequences):
    """Whether one of the sequences ends with the token at `at`, of texts [B, K, N]."""
    found = jnp.zeros(texts.shape[:-1], bool)
    for sequence in sequences:
        places = at - len(sequence) + 1 + jnp.arange(len(sequence))
        found |= (places[0] >= 0) & (texts[..., jnp.maximum(places, 0)] == jnp.array(sequence)).all(-1)
    return found


def _lengths(tokens, settings):
    """Tokens before what ended each text [B, W, N]: a stop token, or the longest of the sequences that are complete
    first."""
    at = jnp.arange(tokens.shape[-1])
    begins = jnp.where(is_any(tokens, settings.stop), at, len(at))
    ends = begins
    for sequence in sorted(settings.sequences, key=len):
        size = len(sequence)
        whole = jnp.stack([_completes(tokens, i, [sequence]) for i in range(len(at))], -1)
        begins, ends = jnp.where(whole, at + 1 - size, begins), jnp.where(whole, at, ends)
    return jnp.take_along_axis(begins, ends.argmin(-1)[..., None], -1)[..., 0].astype(jnp.int32)


def _join(*texts):
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, texts[0].ranks.ndim - 1), *texts)


def _best(texts, count):
    """The best by rank, of equal ones the first, and where they stood."""
    ranks, at = lax.top_k(texts.ranks, count)
    return _Texts(
        jnp.take_along_axis(texts.tokens, at[..., None], -2), jnp.take_along_axis(texts.log_probs, at, -1), ranks
    ), at


def _collect(live, ended, num_tokens, settings):
    # Beams that the search left early cannot rank above ended texts, so only those of full length come through.
    scores = live.log_probs / _norm(num_tokens, settings.alpha)
    texts, _ = _best(_join(ended, live._replace(ranks=scores)), settings.width)
    together = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    groups = jnp.repeat(jnp.arange(len(texts.ranks)), settings.width)
    best, at = _best(jax.tree.map(together, texts), groups.size)
    return Beams(best.tokens, _lengths(best.tokens, settings), best.ranks, groups[at])


def check(beam_width: int, num_tokens: int, groups: int, diversity: float, alpha: float) -> None:
    """Raises UserError for a number out of range."""
    check_length(num_tokens)
    if beam_width < 1:
        raise UserError(f"beam_width={beam_width}; valid: whole numbers from 1")
    if groups < 1 or beam_width % groups:
        valid = [n for n in range(1, beam_width + 1) if beam_width % n == 0]
        raise UserError(f"groups={groups} do not share beam_width={beam_width} evenly; valid: {valid}")
    if not 0 <= diversity < math.inf:
        raise UserError(f"diversity={diversity}; valid: numbers from 0 (none)")
    if not 0 <= alpha < math.inf:
        raise UserError(f"alpha={alpha}; valid: numbers from 0 (lengths do not count)")
