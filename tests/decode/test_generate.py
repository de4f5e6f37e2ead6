"""Generation against full recomputation, batches against single prompts, stop tokens, the stream, logits that are
none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decode.generate import generate, stream
from research.errors import UserError
from tests.decode.toys import Bigram, History, Linear, left_pad

PROMPTS = [[3, 1, 4, 1, 5], [2], [6, 6, 1]]
MODEL = History()
extend, step = jax.jit(MODEL.extend), jax.jit(MODEL.step)
WARM = dict(temperature=1.3, top_k=5, top_p=0.9)


@functools.cache
def program(model, options):
    return jax.jit(
        lambda prompt, segment_ids, rows, key: generate(
            model.extend, model.step, model.start(len(prompt)), prompt, segment_ids, rows=rows, key=key, **dict(options)
        )
    )


def run(model, prompt, segment_ids=None, *, rows=None, key=None, **options):
    options = dict(num_tokens=12, temperature=0.0) | options
    return jax.tree.map(np.asarray, program(model, tuple(options.items()))(prompt, segment_ids, rows, key))


def greedy(model, prompt, num_tokens):
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(np.argmax(model.recompute(tokens))))
    return tokens[len(prompt) :]


def test_greedy_is_the_argmax_of_full_recomputation_in_a_padded_batch():
    ties = [np.sort(MODEL.recompute(p + greedy(MODEL, p, n)))[-2:] for p in PROMPTS for n in range(12)]
    assert sum(a == b for a, b in ties) > 3, "the rule for ties is not tried"
    tokens, lengths = run(MODEL, *left_pad(PROMPTS))
    assert tokens.tolist() == [greedy(MODEL, p, 12) for p in PROMPTS] and lengths.tolist() == [12] * 3
    assert tokens.dtype == lengths.dtype == np.int32


def test_states_may_hold_the_batch_anywhere():
    model, prompts = Linear(), [[1, 2], [3, 5]]
    tokens, _ = run(model, np.array(prompts), num_tokens=8)
    assert tokens.tolist() == [greedy(model, p, 8) for p in prompts]


@pytest.mark.slow
def test_a_batch_samples_what_each_prompt_samples_alone():
    options = dict(key=jax.random.key(5), **WARM)
    prompt, segment_ids = left_pad(PROMPTS)
    together, _ = run(MODEL, prompt, segment_ids, **options)
    for row in range(3):
        alone, _ = run(MODEL, prompt[row : row + 1], segment_ids[row : row + 1], rows=np.array([row]), **options)
        np.testing.assert_array_equal(alone[0], together[row])
    other, _ = run(MODEL, prompt, segment_ids, **options | dict(key=jax.random.key(6)))
    assert (other != together).any(1).all()


def test_sampled_transitions_have_the_frequencies_of_the_table():
    model = Bigram(vocabulary=3)
    tokens, _ = run(model, np.zeros((4000, 1), np.int32), num_tokens=6, key=jax.random.key(2), temperature=0.8)
    chances = np.array(jax.nn.softmax(model.table / 0.8))
    for before in range(3):
        at = tokens[:, :-1] == before
        counts = np.bincount(tokens[:, 1:][at], minlength=3)
        sd = np.sqrt(counts.sum() * chances[before] * (1 - chances[before]))
        assert (abs(counts - counts.sum() * chances[before]) < 4.5 * sd).all(), before


def cut(tokens, stop):
    length = next((i for i, t in enumerate(tokens) if t in stop), len(tokens))
    return tokens[:length] + [tokens[length]] * (len(tokens) - length) if length < len(tokens) else tokens, length


@pytest.mark.parametrize("stop", [(4,), (0, 2)])
def test_a_row_that_stops_repeats_its_stop_token(stop):
    wanted = [cut(greedy(MODEL, p, 12), stop) for p in PROMPTS]
    assert len({length for _, length in wanted}) > 1, "rows should end at different places"
    tokens, lengths = run(MODEL, *left_pad(PROMPTS), stop=stop)
    assert tokens.tolist() == [t for t, _ in wanted] and lengths.tolist() == [n for _, n in wanted]


def test_one_token_is_enough():
    tokens, lengths = run(MODEL, np.array([[1, 2]]), num_tokens=1)
    assert tokens.tolist() == [greedy(MODEL, [1, 2], 1)] and lengths.tolist() == [1]


@pytest.mark.parametrize(
    "options", [dict(temperature=0.0), dict(key=jax.random.key(5), **WARM), dict(stop=(0, 2), temperature=0.0)]
)
def test_the_stream_is_the_columns_of_generate(options):
    tokens, lengths = run(MODEL, *left_pad(PROMPTS), **options)
    columns = list(stream(extend, step, MODEL.start(3), *left_pad(PROMPTS), num_tokens=12, **options))
    wanted = min(max(lengths) + 1, 12)
    assert len(columns) == wanted and (wanted < 12) == ("stop" in options)
    np.testing.assert_array_equal(np.stack(columns, 1), tokens[:, :wanted])


def test_the_stream_starts_the_next_step_before_a_token_is_read_and_none_after_the_last():
    steps = []
    counted = lambda state, token: steps.append(1) or step(state, token)
    seen = [len(steps) for _ in stream(extend, counted, MODEL.start(1), np.array([[1]]), num_tokens=4, temperature=0.0)]
    assert seen == [1, 2, 3, 3]


def test_the_stream_waits_once_a_token(monkeypatch):
    reads = []
    real = np.asarray
    monkeypatch.setattr(
        np, "asarray", lambda x, *rest, **named: reads.append(isinstance(x, jax.Array)) or real(x, *rest, **named)
    )
    columns = stream(extend, step, MODEL.start(3), *left_pad(PROMPTS), num_tokens=9, temperature=0.0, stop=(99,))
    assert len(list(columns)) == sum(reads) == 9


def test_bad_numbers_are_named_at_the_call():
    for make in (generate, stream):
        call = functools.partial(make, extend, step, MODEL.start(1), np.array([[1]]))
        with pytest.raises(UserError, match="num_tokens=0; valid: whole numbers from 1"):
            call(num_tokens=0, temperature=0.0)
        with pytest.raises(UserError, match="top_p=2"):
            call(num_tokens=1, key=jax.random.key(0), top_p=2)
        with pytest.raises(UserError, match="needs a key"):
            call(num_tokens=1)


class Diverging(History):
    """Logits are NaN from a number of tokens on."""

    def start(self, batch):
        return super().start(batch), jnp.zeros(batch, jnp.int32)

    def next_state(self, state, token):
        return super().next_state(state[0], token), state[1] + 1

    def logits(self, state):
        return jnp.where(state[1][..., None] > 3, jnp.nan, super().logits(state[0]))


@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(key=jax.random.key(5), **WARM)])
def test_nothing_is_sampled_from_logits_that_are_no_numbers(options):
    model, prompt = Diverging(), np.array([[1, 2]])
    tokens, _ = run(model, prompt, num_tokens=4, **options)
    assert (tokens[0, :2] >= 0).all() and tokens[0, 2] == -1
    seen = []
    with pytest.raises(UserError, match="logits after 2 new tokens are not finite"):
        for column in stream(
            jax.jit(model.extend), jax.jit(model.step), model.start(1), prompt, num_tokens=4, **options
        ):
            seen.append(column)
    assert len(seen) == 2
