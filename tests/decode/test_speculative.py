"""Speculation against the full model alone: the same greedy text, the same distribution; states that go back; what it
costs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decode.sampling import adjust
from research.decode.speculative import Draft, by_position, by_rerun, pick_state, speculate
from research.errors import UserError
from tests.decode.toys import Bigram, History, Linear, left_pad

PROMPTS = [[3, 1, 4, 1, 5], [2], [6, 6, 1]]
FULL = History()


class Half(History):
    """Agrees with `FULL` about half of the time: a history is taken for another one by one bit of its hash."""

    def logits(self, state):
        return super().logits(jnp.where(state & 0x100, state, state + 12345))


def ways_of(model):
    return {
        "position": by_position(model.extend, model.extend_states),
        "rerun": by_rerun(model.extend, model.extend_masked),
    }


def program(full, draft, way, **options):
    ways = ways_of(full)

    def run(prompt, segment_ids, key):
        states = full.start(len(prompt)), draft.start(len(prompt))
        return speculate(ways[way], Draft(draft.extend, draft.step), *states, prompt, segment_ids, key=key, **options)

    return jax.jit(run)


@functools.cache
def run(full, draft, way, options):
    return jax.tree.map(np.asarray, program(full, draft, way, **dict(options))(*left_pad(PROMPTS), None))


def greedy(model, prompt, num_tokens):
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(np.argmax(model.recompute(tokens))))
    return tokens[len(prompt) :]


HALF, SAME, OTHER = Half(), History(), History(seed=99)


@pytest.mark.parametrize("way", ["position", "rerun"])
@pytest.mark.parametrize("draft", [HALF, SAME, OTHER], ids=["half", "same", "other"])
def test_the_text_is_greedy_decoding_of_the_full_model(draft, way):
    out = run(FULL, draft, way, (("num_tokens", 21), ("lookahead", 3)))
    assert out.tokens.tolist() == [greedy(FULL, p, 21) for p in PROMPTS]
    assert out.lengths.tolist() == [21] * 3
    if draft is SAME:  # 20 tokens after the prompt's, four a round
        assert out.rounds.tolist() == [5] * 3 and out.acceptance.tolist() == [1.0] * 3
    elif draft is HALF:
        assert (
            (out.acceptance > 0.2).all()
            and (out.acceptance < 0.9).all()
            and (out.rounds > 5).all()
            and (out.rounds < 18).all()
        )
    else:
        assert (out.acceptance < 0.4).all() and (out.rounds > 8).all()


def naive(full, draft, prompt, num_tokens, lookahead):
    """Rounds on lists, everything recomputed from the beginning: (rounds, accepted)."""
    text, rounds, accepted = greedy(full, prompt, 1), 0, 0
    while len(text) < num_tokens:
        drafts = []
        for _ in range(lookahead):
            drafts.append(int(np.argmax(draft([*prompt, *text, *drafts]))))
        stand = 0
        while stand < lookahead and drafts[stand] == int(np.argmax(full.recompute([*prompt, *text, *drafts[:stand]]))):
            stand += 1
        text += drafts[:stand]
        text.append(int(np.argmax(full.recompute([*prompt, *text]))))
        rounds, accepted = rounds + 1, accepted + stand
    return rounds, accepted


def test_rounds_and_acceptance_are_those_of_full_recomputation():
    """Only if the draft goes back to the right state too: another would draft other tokens."""
    logits = jax.jit(lambda tokens: HALF.extend(HALF.start(1), tokens, (tokens < 0).astype(jnp.int32))[0][0])

    def draft(tokens):
        padded = np.array([[*tokens, *[-1] * (40 - len(tokens))]], np.int32)
        return logits(padded)[len(tokens) - 1]

    out = run(FULL, HALF, "position", (("num_tokens", 21), ("lookahead", 3)))
    for row, prompt in enumerate(PROMPTS):
        rounds, accepted = naive(FULL, draft, prompt, 21, 3)
        assert out.rounds[row] == rounds
        np.testing.assert_allclose(out.acceptance[row], accepted / (3 * rounds), rtol=1e-6)


@pytest.mark.parametrize("stop", [(4,), (0, 2)])
def test_stop_tokens_end_a_row_as_in_generate(stop):
    out = run(FULL, HALF, "rerun", (("num_tokens", 21), ("lookahead", 3), ("stop", stop)))
    texts = [greedy(FULL, p, 21) for p in PROMPTS]
    lengths = [next(i for i, t in enumerate(text) if t in stop) for text in texts]
    assert out.lengths.tolist() == lengths
    assert out.tokens.tolist() == [text[:n] + [text[n]] * (21 - n) for text, n in zip(texts, lengths, strict=True)]
    assert len(set(lengths)) > 1 and (out.rounds <= np.maximum(lengths, 1)).all()


def test_one_token_takes_no_round():
    out = run(FULL, HALF, "position", (("num_tokens", 1), ("lookahead", 3)))
    assert out.tokens.tolist() == [greedy(FULL, p, 1) for p in PROMPTS]
    assert out.rounds.tolist() == [0] * 3 and out.acceptance.tolist() == [0.0] * 3


def test_a_single_row_may_keep_a_count_for_all_rows_and_hold_its_batch_elsewhere():
    full, draft = Linear(), Linear(seed=1)
    draft.out = draft.out + 0.3 * Linear(seed=5).out
    prompt = np.array([[1, 2]])

    def pick(states, index):
        h, count = states  # [T, D, 1], [T]
        return h[index[0]], count[index[0]]

    def run(pick):
        ways = by_position(full.extend, full.extend_states, pick)
        options = dict(num_tokens=15, lookahead=4)
        return speculate(ways, Draft(draft.extend, draft.step, pick), full.start(1), draft.start(1), prompt, **options)

    out = jax.jit(lambda: run(pick))()
    assert out.tokens[0].tolist() == greedy(full, [1, 2], 15)
    assert 0.1 < out.acceptance[0] < 1


def test_states_without_a_batch_axis_cannot_differ_between_rows():
    states = jnp.arange(3.0), jnp.arange(6.0).reshape(3, 2)
    with pytest.raises(ValueError, match="without a batch axis"):
        pick_state(states, jnp.array([1, 2]))
    assert pick_state(states[1], jnp.array([1, 2])).tolist() == [2.0, 5.0]
    assert pick_state((states[0], states[1][:, :1]), jnp.array([1])) == (1.0, jnp.array([2.0]))


def test_rerun_goes_over_the_tokens_again_only_after_a_rejection():
    passes = []

    def masked(state, tokens, num_valid):
        jax.debug.callback(lambda n: passes.append(n.tolist()), num_valid)
        return FULL.extend_masked(state, tokens, num_valid)

    @functools.partial(jax.jit, static_argnums=0)
    def run(draft):
        states = FULL.start(1), draft.start(1)
        full, small = by_rerun(FULL.extend, masked), Draft(draft.extend, draft.step)
        return speculate(full, small, *states, np.array([PROMPTS[0]]), num_tokens=21, lookahead=3)

    for draft in (SAME, HALF):
        passes.clear()
        rounds = int(run(draft).rounds[0])
        jax.effects_barrier()
        again = [n for n in passes if n != [4]]
        assert len(passes) - len(again) == rounds
        assert not again if draft is SAME else 0 < len(again) < rounds


def chi_square(counts, chances):
    expected = counts.sum() * chances
    return ((counts - expected)[chances > 0] ** 2 / expected[chances > 0]).sum(), (chances > 0).sum() - 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "way"),
    [(dict(temperature=1.0), "position"), (dict(temperature=0.7, top_k=3, top_p=0.9), "rerun")],
    ids=["plain", "cut"],
)
def test_sampled_texts_have_the_full_models_distribution(options, way):
    """All 4^4 texts of four tokens, against the product of the full model's own (adjusted) probabilities."""
    full, draft, rows = History(seed=5, vocabulary=4, scale=0.3), Bigram(vocabulary=4), 20000
    out = program(full, draft, way, num_tokens=4, lookahead=2, **options)(
        np.full((rows, 1), 3), None, jax.random.key(11)
    )
    assert 0.3 < out.acceptance.mean() < 0.9
    texts = list(itertools.product(range(4), repeat=4))
    prefixes = [t[:n] for n in range(4) for t in sorted({t[:n] for t in texts})]
    logits = np.stack([full.recompute([3, *p]) for p in prefixes])
    table = dict(zip(prefixes, np.asarray(jax.nn.softmax(adjust(logits, **options)), np.float64), strict=True))
    chances = np.array([np.prod([table[t[:n]][t[n]] for n in range(4)]) for t in texts])
    counts = np.bincount(np.asarray(out.tokens) @ np.array([64, 16, 4, 1]), minlength=256)
    assert counts[chances == 0].sum() == 0
    statistic, freedom = chi_square(counts, chances)
    assert statistic < freedom + 4.5 * np.sqrt(2 * freedom), (statistic, freedom)
    # What the draft alone would give is far off: the test can tell.
    of_draft = chi_square(
        np.bincount(np.asarray(out.tokens[:, 1]), minlength=4), np.asarray(jax.nn.softmax(draft.table[3]))
    )
    assert of_draft[0] > 500


@pytest.mark.slow
def test_a_row_samples_alike_in_every_batch_and_a_draft_like_the_full_model_is_always_accepted():
    model = History(scale=0.2)
    prompt = tuple(jnp.array(x) for x in left_pad(PROMPTS))

    @jax.jit
    def run(rows, seed):
        """The draft is the same function of another history unless its seed is the full model's."""
        options = dict(key=jax.random.key(4), rows=rows, temperature=1.2, num_tokens=13, lookahead=3)
        states = model.start(3), jnp.full(3, seed, jnp.uint32)
        return speculate(
            ways_of(model)["position"], Draft(model.extend, model.step), *states, *(x[rows] for x in prompt), **options
        )

    rows = jnp.array([2, 0, 0])
    once, again = run(jnp.arange(3), 99), run(rows, 99)
    np.testing.assert_array_equal(once.tokens[rows], again.tokens)
    np.testing.assert_array_equal(once.rounds[rows], again.rounds)
    assert once.acceptance.min() < 1
    same = run(rows, model.seed)
    assert same.acceptance.tolist() == [1.0] * 3 and same.rounds.tolist() == [3] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lookahead=0), "lookahead=0; valid: whole numbers from 1"),
        (dict(num_tokens=0), "num_tokens=0"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=1.0), "needs a key"),
    ],
)
def test_bad_numbers_are_named(options, message):
    options = dict(num_tokens=3, lookahead=2) | options
    with pytest.raises(UserError, match=message):
        speculate(
            ways_of(FULL)["rerun"],
            Draft(HALF.extend, HALF.step),
            FULL.start(1),
            HALF.start(1),
            np.array([[1]]),
            **options,
        )
