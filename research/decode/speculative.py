"""Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192): a small model drafts, the full one verifies many
tokens in one pass.

A round drafts `lookahead` = k tokens and ends with the ones that the full model accepts and one of its own, (1 -
a^(k+1)) / (1 - a) tokens on average where each draft is accepted with probability a (equation 1). At temperature 0 the
text is that of greedy decoding, as far as the verifying pass and single steps give the same logits; else its
distribution is that of sampling (theorem in appendix A.1). Every draw is keyed by (key, row, position): drafts that are
thrown away decide nothing about the text, so their keys serve again.

Both models must go back to the last accepted token. The draft keeps its state after each of its k + 1 steps. The full
model gives `verify` and `commit` in one of two ways:

* `by_position`: a pass that returns the state after every token; commit picks one. A round costs the pass of k + 1
tokens and k + 1 states
  of memory. For a key-value cache "all states" is the cache itself and a length, so give `verify` and `commit` of your
  own.
* `by_rerun`: a pass that ignores the tokens after a number of valid ones, for recurrent states, which cannot be cut.
Rounds with a rejection
  cost a second pass of k + 1 tokens, over the accepted ones; memory is two states. With cost v of the pass against 1 of
  a step and c of
  a step of the draft, a round costs (k + 1) c + v (2 - a^k) where by_position costs (k + 1) c + v.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from research.decode.generate import Extend, State, Step, check_length
from research.decode.sampling import (
    SMALLEST_TEMPERATURE,
    adjust,
    check,
    draw,
    is_any,
    position_keys,
    refused,
    sample,
    text_lengths,
)
from research.errors import UserError

Pick = Callable[[State, Int[Array, " B"]], State]


class Full(NamedTuple):
    """The model whose text it is."""

    extend: Extend
    """Reads the prompt."""
    verify: Callable[[State, Int[Array, "B T"]], tuple[Float[Array, "B T V"], Any]]
    """(state, tokens) -> (logits, trail); the trail is what commit needs."""
    commit: Callable[[Any, Int[Array, " B"]], State]
    """(trail, number of tokens that count, at least 1) -> the state after them."""


class Draft(NamedTuple):
    """The model that guesses."""

    extend: Extend
    step: Step
    pick: Pick | None = None
    """As in `by_position`; None for `pick_state`."""


class Speculated(NamedTuple):
    """A text and what it took."""

    tokens: Int[Array, "B N"]
    """A row that met a stop token repeats it to the end; -1 where the full model's logits were no numbers."""
    lengths: Int[Array, " B"]
    """Tokens before the stop token; N where there was none."""
    rounds: Int[Array, " B"]
    """Verifying calls of the full model until the row ended; the prompt is one call more."""
    acceptance: Float[Array, " B"]
    """Share of the drafted tokens that were accepted; 0 without rounds."""


class _Loop(NamedTuple):
    tokens: Int[Array, "B N"]
    count: Int[Array, " B"]  # type: ignore[assignment]  # in place of a tuple's method of this name
    last: Int[Array, " B"]
    full: State
    draft: State
    active: Array
    rounds: Int[Array, " B"]
    accepted: Int[Array, " B"]


def pick_state(states: State, index: Int[Array, " B"]) -> State:
    """Picks for each row b the state index[b] of states stacked on a leading axis; the batch is the axis after it.

    Arrays without a batch axis (a position for all rows) can be picked for one row only.

    Raises:
      ValueError: for an array without a batch axis and more than one row.
    """

    def pick(x):
        if x.ndim > 1:
            return x[index, jnp.arange(len(index))]
        if len(index) > 1:
            raise ValueError(
                "pick_state: a state without a batch axis cannot differ between rows; give a pick of your own, "
                "or one row"
            )
        return x[index[0]]

    return jax.tree.map(pick, states)


def by_position(
    extend: Extend,
    extend_states: Callable[[State, Int[Array, "B T"]], tuple[Float[Array, "B T V"], State]],
    pick: Pick = pick_state,
) -> Full:
    """A full model that returns all its states: one pass a round, k + 1 states of memory.

    Args:
      extend: reads the prompt.
      extend_states: (state, tokens) -> (logits, states after each token, stacked on a leading axis).
      pick: (states, index [B]) -> state, where the batch is elsewhere than `pick_state` expects it.
    """
    return Full(extend, extend_states, lambda states, num_valid: pick(states, num_valid - 1))


def by_rerun(
    extend: Extend,
    extend_masked: Callable[[State, Int[Array, "B T"], Int[Array, " B"]], tuple[Float[Array, "B T V"], State]],
) -> Full:
    """A full model that goes over the accepted tokens again after a rejection: up to two passes a round, two states of
    memory.

    Args:
      extend: reads the prompt.
      extend_masked: (state, tokens, num_valid [B]) -> (logits, state after the first num_valid tokens of each row).
    """

    def verify(state, tokens):
        logits, after = extend_masked(state, tokens, jnp.full(len(tokens), tokens.shape[1], jnp.int32))
        return logits, (state, tokens, after)

    def commit(trail, num_valid):
        state, tokens, after = trail
        return lax.cond(
            (num_valid == tokens.shape[1]).all(), lambda: after, lambda: extend_masked(state, tokens, num_valid)[1]
        )

    return Full(extend, verify, commit)


def speculate(
    full: Full,
    draft: Draft,
    full_state: State,
    draft_state: State,
    prompt: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    num_tokens: int,
    lookahead: int,
    key: Key[Array, ""] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    rows: Int[Array, " B"] | None = None,
) -> Speculated:
    """Continues prompts with the full model's text; to be jitted whole by the caller.

    Rows advance each at its own pace, and those that have ended go on idly until the last one has; caches need room for
    the prompt and num_tokens + lookahead tokens of a row.

    Args:
      full, draft: the models; a draft that is a sub-network of the full one makes this self-speculative decoding.
      full_state, draft_state: their states before the prompt.
      prompt, segment_ids: as in `research.decode.generate.generate`.
      num_tokens: N, how many to add.
      lookahead: k, how many tokens are drafted a round.
      key, temperature, top_k, top_p, rows: as in `research.decode.sampling.sample`, for both models; greedy by default.
      stop: tokens that end a row.

    Raises:
      UserError: for a number out of range, or for a missing key.
    """
    check_length(num_tokens)
    check(temperature, top_k, top_p)
    if lookahead < 1:
        raise UserError(f"lookahead={lookahead}; valid: whole numbers from 1")
    rows = jnp.arange(len(prompt)) if rows is None else rows
    drafting, judging, replacing = (None, None, None) if key is None else jax.random.split(key, 3)
    rules = _Rules(lookahead, rows, drafting, judging, replacing, temperature, top_k, top_p)
    draft = draft if draft.pick else draft._replace(pick=pick_state)
    logits, full_state = full.extend(full_state, prompt, segment_ids)
    _, draft_state = draft.extend(draft_state, prompt, segment_ids)
    first = rules.sample(rules.replacing, logits[:, -1], 0)
    none = jnp.zeros(len(prompt), jnp.int32)
    tokens = jnp.zeros((len(prompt), num_tokens), jnp.int32).at[:, 0].set(first)
    active = ~is_any(first, stop) & (num_tokens > 1)
    loop = _Loop(tokens, none + 1, first, full_state, draft_state, active, none, none)
    loop = lax.while_loop(lambda loop: loop.active.any(), lambda loop: _round(loop, full, draft, rules, stop), loop)
    lengths = text_lengths(loop.tokens, stop)
    stopped = _at(loop.tokens, jnp.minimum(lengths, num_tokens - 1))
    tokens = jnp.where(jnp.arange(num_tokens) > lengths[:, None], stopped[:, None], loop.tokens)
    return Speculated(tokens, lengths, loop.rounds, loop.accepted / jnp.maximum(loop.rounds * lookahead, 1))


class _Rules(NamedTuple):
    """How tokens are drawn, and with which keys."""

    lookahead: int
    rows: Int[Array, " B"]
    drafting: Key[Array, ""] | None
    judging: Key[Array, ""] | None
    replacing: Key[Array, ""] | None
    temperature: float
    top_k: int
    top_p: float

    @property
    def greedy(self):
        return self.temperature < SMALLEST_TEMPERATURE

    def sample(self, key, logits, position):
        return sample(
            key, logits, position, rows=self.rows, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )

    def probabilities(self, logits):
        return jax.nn.softmax(adjust(logits, self.temperature, self.top_k, self.top_p))


def _round(loop, full, draft, rules, stop):
    drafts, chances, draft_states = _propose(loop, draft, rules)
    logits, trail = full.verify(loop.full, jnp.concatenate([loop.last[:, None], drafts], 1))
    if rules.greedy:
        num_accepted, after = _judge_greedy(drafts, logits)
    else:
        num_accepted, after = _judge(drafts, chances, logits, loop.count, rules)
    at = jnp.arange(rules.lookahead + 1)
    new = jnp.where(at < num_accepted[:, None], jnp.pad(drafts, ((0, 0), (0, 1))), after[:, None])
    keep = loop.active[:, None] & (at <= num_accepted[:, None])
    num_tokens = loop.tokens.shape[1]
    places = jnp.where(keep, loop.count[:, None] + at, num_tokens)
    count = loop.count + keep.sum(-1)
    return _Loop(
        tokens=loop.tokens.at[jnp.arange(len(places))[:, None], places].set(new, mode="drop"),
        count=count,
        last=after,
        full=full.commit(trail, num_accepted + 1),
        draft=draft.pick(draft_states, num_accepted),
        active=loop.active & (count < num_tokens) & ~(keep & is_any(new, stop)).any(-1),
        rounds=loop.rounds + loop.active,
        accepted=loop.accepted + jnp.where(loop.active, num_accepted, 0),
    )


def _propose(loop, draft, rules):
    """Drafts [B, k], the probabilities they were drawn from [B, k, V] (greedy: None), the states after the last token
    and each draft."""

    def body(carry, i):
        token, state = carry
        logits, state = draft.step(state, token)
        token = rules.sample(rules.drafting, logits, loop.count + i)
        return (token, state), (token, None if rules.greedy else rules.probabilities(logits), state)

    # One step more than there are drafts: its state is the one after the last draft.
    _, (drafts, chances, states) = lax.scan(body, (loop.last, loop.draft), jnp.arange(rules.lookahead + 1))
    return drafts[:-1].T, None if rules.greedy else jnp.moveaxis(chances[:-1], 0, 1), states


def _judge_greedy(drafts, logits):
    """How many drafts stand, and the token after them."""
    own = refused(logits, logits.astype(jnp.float32).argmax(-1).astype(jnp.int32))
    num_accepted = jnp.cumprod(own[:, :-1] == drafts, -1).sum(-1)
    return num_accepted, _at(own, num_accepted)


def _judge(drafts, q, logits, count, rules):
    """As `_judge_greedy` for sampling: algorithm 1, with q of the draft and p of the full model."""
    p = rules.probabilities(logits)
    keys = position_keys(rules.judging, rules.rows[:, None], count[:, None] + jnp.arange(rules.lookahead))
    uniform = jax.vmap(jax.vmap(jax.random.uniform))(keys)
    of_draft = lambda x: jnp.take_along_axis(x, drafts[..., None], -1)[..., 0]
    num_accepted = jnp.cumprod(uniform * of_draft(q) < of_draft(p[:, :-1]), -1).sum(-1)
    # After the last draft nothing was proposed, and the rest is p itself.
    p, q = _at(p, num_accepted), _at(jnp.pad(q, ((0, 0), (0, 1), (0, 0))), num_accepted)
    rest = jnp.maximum(p - q, 0)
    rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p)
    after = draw(position_keys(rules.replacing, rules.rows, count + num_accepted), jnp.log(rest))
    return num_accepted, refused(_at(logits, num_accepted), after)


def _at(x, index):
    """x[b, index[b]]."""
    return x[jnp.arange(len(x)), index]
