"""Language models small enough to be known: a table, an exact function of the whole history, a linear recurrent net."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

VOCABULARY = 7
_STEP, _SPREAD, _MIX = 2654435761, 0x9E3779B9, 0x85EBCA6B


def draw(shape, *seeds):
    """Standard normal float32 numbers keyed by integers."""
    return np.random.Generator(np.random.Philox(key=np.array([*seeds, 0][:2], np.uint64))).standard_normal(
        shape, np.float32
    )


def left_pad(prompts):
    """(tokens, segment ids): pads are token 0 of segment 1."""
    length = max(map(len, prompts))
    tokens = np.array([[0] * (length - len(p)) + list(p) for p in prompts], np.int32)
    return tokens, np.array([[1] * (length - len(p)) + [0] * len(p) for p in prompts], np.int32)


class Recurrent:
    """All implementations of a model whose step is `next_state(state, token)` and `logits(state)`, for states [B,
    ...]."""

    def step(self, state, token):
        state = self.next_state(state, token)
        return self.logits(state), state

    def _scan(self, state, tokens, keep, stack=False):
        def body(state, inputs):
            token, keep = inputs
            after = self.next_state(state, token)
            after = jax.tree.map(
                lambda new, old: jnp.where(keep.reshape(-1, *[1] * (new.ndim - 1)), new, old), after, state
            )
            return after, (self.logits(after), after if stack else None)

        state, (logits, states) = lax.scan(body, state, (tokens.T, keep.T))
        return jnp.moveaxis(logits, 0, 1), states if stack else state

    def extend(self, state, tokens, segment_ids=None):
        keep = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids == 0
        return self._scan(state, tokens, keep)

    def extend_masked(self, state, tokens, num_valid):
        return self._scan(state, tokens, jnp.arange(tokens.shape[1]) < num_valid[:, None])

    def extend_states(self, state, tokens):
        return self._scan(state, tokens, jnp.ones(tokens.shape, bool), stack=True)


class History(Recurrent):
    """Logits are multiples of `scale` up to 7 of them, with many ties, an exact function of all tokens so far."""

    def __init__(self, seed=1, vocabulary=VOCABULARY, scale=0.5):
        self.seed, self.vocabulary, self.scale = seed, vocabulary, scale

    def start(self, batch):
        return jnp.full(batch, self.seed, jnp.uint32)

    def next_state(self, state, token):
        state = (state ^ (token + 1).astype(jnp.uint32)) * jnp.uint32(_STEP)
        return state ^ (state >> 15)

    def logits(self, state):
        x = (
            state[..., None] + jnp.arange(1, self.vocabulary + 1, dtype=jnp.uint32) * jnp.uint32(_SPREAD)
        ) * jnp.uint32(_MIX)
        return (((x ^ (x >> 13)) * jnp.uint32(_STEP)) >> 29).astype(jnp.float32) * self.scale

    def recompute(self, tokens):
        """The logits after all of these tokens, from the beginning, in Python integers."""
        state, low = self.seed, 0xFFFFFFFF
        for token in tokens:
            state = ((state ^ (int(token) + 1)) * _STEP) & low
            state ^= state >> 15
        mixed = [((state + v * _SPREAD) * _MIX) & low for v in range(1, self.vocabulary + 1)]
        return np.array([(((x ^ (x >> 13)) * _STEP) & low) >> 29 for x in mixed], np.float32) * np.float32(self.scale)

    def log_probs(self, tokens):
        logits = self.recompute(tokens).astype(np.float64)
        return logits - np.log(np.exp(logits).sum())


class Bigram(Recurrent):
    """Logits are the last token's row of a table; `disturbed` gives a relative that is often of the same opinion."""

    def __init__(self, seed=1, vocabulary=VOCABULARY, noise=0.0):
        self.table = draw((vocabulary, vocabulary), seed) + noise * draw((vocabulary, vocabulary), seed, 1)

    def start(self, batch):
        return jnp.zeros(batch, jnp.int32)

    def next_state(self, state, token):
        return token

    def logits(self, state):
        return jnp.asarray(self.table)[state]


class Linear:
    """h' = a h + E[token], logits = W h; the state is (h [D, B], number of tokens): no axis 0 for the batch."""

    def __init__(self, seed=1, vocabulary=VOCABULARY, size=3):
        self.decay, self.embed, self.out = (
            0.5 + 0.4 * np.tanh(draw(size, seed)),
            draw((size, vocabulary), seed, 1),
            draw((vocabulary, size), seed, 2),
        )

    def start(self, batch):
        return jnp.zeros((len(self.decay), batch)), jnp.int32(0)

    def step(self, state, token):
        h, count = state
        h = self.decay[:, None] * h + jnp.asarray(self.embed)[:, token]
        return (self.out @ h).T, (h, count + 1)

    def extend(self, state, tokens, segment_ids=None):
        def body(state, token):
            logits, state = self.step(state, token)
            return state, logits

        state, logits = lax.scan(body, state, tokens.T)
        return jnp.moveaxis(logits, 0, 1), state

    def extend_states(self, state, tokens):
        def body(state, token):
            logits, state = self.step(state, token)
            return state, (logits, state)

        _, (logits, states) = lax.scan(body, state, tokens.T)
        return jnp.moveaxis(logits, 0, 1), states

    def recompute(self, tokens):
        """The logits after all of these tokens, from the beginning, as one weighted sum."""
        ages = np.arange(len(tokens))[::-1]
        return self.out @ (self.embed[:, list(tokens)] * self.decay[:, None] ** ages).sum(1)


def take_columns(state, indices):
    """Rows of `Linear`'s state."""
    h, count = state
    return h[:, indices], count
