"""Beams against exhaustive search and against a search in plain Python by full recomputation; diversity; lengths; bad
numbers."""

import functools
import itertools

import jax
import numpy as np
import pytest

from research.decode.beam import beam_search
from research.decode.generate import generate
from research.errors import UserError
from tests.decode.toys import History, Linear, left_pad, take_columns

MODEL = History(vocabulary=4, scale=0.3)
LARGE = History(seed=2, vocabulary=9, scale=0.3)
PROMPTS = [[3, 1, 2], [2]]
AGREE = dict(rtol=1e-5, atol=1e-5)


@functools.cache
def program(model, options):
    return jax.jit(
        lambda *prompt: beam_search(model.extend, model.step, model.start(len(prompt[0])), *prompt, **dict(options))
    )


def search(model, prompts, **options):
    return jax.tree.map(np.asarray, program(model, tuple(sorted(options.items())))(*left_pad(prompts)))


def norm(length, alpha):
    return ((5 + length) / 6) ** alpha


def filled(text, num_tokens):
    return [*text, *[text[-1]] * (num_tokens - len(text))]


def exhaustive(model, prompt, num_tokens, stop, alpha):
    """All texts: [(score, tokens)], the best first."""
    found = {}
    for text in itertools.product(range(model.vocabulary), repeat=num_tokens):
        end = next((i + 1 for i, t in enumerate(text) if t in stop), num_tokens)
        found[text[:end]] = None
    scores = {
        t: sum(model.log_probs([*prompt, *t[:i]])[t[i]] for i in range(len(t))) / norm(len(t), alpha) for t in found
    }
    return sorted(((s, filled(t, num_tokens)) for t, s in scores.items()), key=lambda pair: -pair[0])


def plain(model, prompt, width, groups, num_tokens, diversity, alpha, stop):
    """The search on lists, every text scored from its beginning; returns [(score, tokens, group)], the best first."""
    width //= groups
    beams = [[(0.0, 0.0, ())] for _ in range(groups)]  # (rank, log-probability, text)
    ended = [[] for _ in range(groups)]
    for at in range(num_tokens):
        taken = np.zeros(model.vocabulary)
        for g in range(groups):
            candidates = []
            for rank, total, text in beams[g]:
                log_probs = model.log_probs([*prompt, *text])
                candidates += [
                    (rank + log_probs[t] - diversity * taken[t], total + log_probs[t], (*text, t))
                    for t in range(model.vocabulary)
                ]
            candidates = sorted(candidates, key=lambda c: -c[0])[: width * (1 + len(stop))]
            ended[g] += [(total / norm(at + 1, alpha), text) for _, total, text in candidates if text[-1] in stop]
            beams[g] = [c for c in candidates if c[2][-1] not in stop][:width]
            for _, _, text in beams[g]:
                taken[text[-1]] += 1
    out = []
    for g in range(groups):
        texts = ended[g] + [(total / norm(num_tokens, alpha), text) for _, total, text in beams[g]]
        out += [(score, filled(text, num_tokens), g) for score, text in sorted(texts, key=lambda t: -t[0])[:width]]
    return sorted(out, key=lambda t: -t[0])


def assert_same(beams, row, wanted):
    """The same texts in the same order; texts of equal score may be exchanged."""
    np.testing.assert_allclose(beams.scores[row], [w[0] for w in wanted], **AGREE)
    got = sorted((round(float(s), 4), t.tolist()) for s, t in zip(beams.scores[row], beams.tokens[row], strict=True))
    wanted = sorted((round(float(w[0]), 4), w[1]) for w in wanted)
    assert [t for _, t in got] == [t for _, t in wanted]


@pytest.mark.parametrize(("stop", "alpha"), [((), 0.0), ((1,), 0.0), ((1,), 1.3)])
def test_a_beam_for_every_text_is_exhaustive_search(stop, alpha):
    beams = search(MODEL, PROMPTS, beam_width=64, num_tokens=3, stop=stop, alpha=alpha)
    for row, prompt in enumerate(PROMPTS):
        wanted = exhaustive(MODEL, prompt, 3, stop, alpha)
        assert len(wanted) == (40 if stop else 64)  # 27 + 1 + 3 + 9 with a stop token
        count = len(wanted)
        np.testing.assert_allclose(beams.scores[row, :count], [w[0] for w in wanted], **AGREE)
        assert beams.tokens[row, 0].tolist() == wanted[0][1]
        assert sorted(beams.tokens[row, :count].tolist()) == sorted(w[1] for w in wanted)
        assert (beams.scores[row, count:] == -np.inf).all()
        ends = [next((i for i, t in enumerate(text) if t in stop), 3) for text in beams.tokens[row].tolist()]
        assert beams.lengths[row].tolist() == ends
    if not stop:
        np.testing.assert_allclose(np.exp(beams.scores).sum(1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "width", "groups", "diversity", "alpha", "stop"),
    [
        (LARGE, 3, 1, 0.0, 0.0, ()),
        (LARGE, 4, 1, 0.0, 0.8, (1, 7)),
        (LARGE, 6, 3, 0.37, 0.0, ()),
        (LARGE, 6, 2, 0.83, 0.6, (2,)),
        (MODEL, 15, 3, 0.9, 0.0, ()),  # more beams than first tokens
    ],
)
def test_beams_are_those_of_a_search_by_full_recomputation(model, width, groups, diversity, alpha, stop):
    options = dict(beam_width=width, groups=groups, diversity=diversity, alpha=alpha, stop=stop)
    beams = search(model, PROMPTS, num_tokens=7, **options)
    for row, prompt in enumerate(PROMPTS):
        assert_same(beams, row, plain(model, prompt, width, groups, 7, diversity, alpha, stop))
        assert (np.diff(beams.scores[row]) <= 0).all()


def test_scores_are_the_models_own_log_probabilities():
    beams = search(LARGE, PROMPTS, num_tokens=7, beam_width=6, groups=3, diversity=0.37, alpha=0.0, stop=())
    for row, prompt in enumerate(PROMPTS):
        for text, score in zip(beams.tokens[row].tolist(), beams.scores[row], strict=True):
            total = sum(LARGE.log_probs([*prompt, *text[:i]])[text[i]] for i in range(7))
            np.testing.assert_allclose(score, total, **AGREE)


def test_one_beam_is_greedy():
    model = Linear(vocabulary=5)
    prompt = np.array([[1, 2], [3, 4], [0, 1]])
    options = dict(take_batch=take_columns, beam_width=1, num_tokens=6)
    beams = jax.jit(lambda p: beam_search(model.extend, model.step, model.start(3), p, **options))(prompt)
    tokens, _ = jax.jit(lambda p: generate(model.extend, model.step, model.start(3), p, num_tokens=6, temperature=0.0))(
        prompt
    )
    np.testing.assert_array_equal(beams.tokens[:, 0], tokens)


def test_states_that_hold_the_batch_elsewhere_follow_their_beams():
    """Every beam's score is that of its text from the beginning: no beam has another's state."""
    model = Linear(vocabulary=5)
    prompt = np.array([[1, 2], [3, 4], [0, 1]])
    options = dict(take_batch=take_columns, beam_width=4, num_tokens=6)
    beams = jax.jit(lambda p: beam_search(model.extend, model.step, model.start(3), p, **options))(prompt)
    for row in range(3):
        for text, score in zip(np.asarray(beams.tokens[row]).tolist(), beams.scores[row], strict=True):
            logits = [model.recompute([*prompt[row], *text[:i]]) for i in range(6)]
            np.testing.assert_allclose(
                score, sum(x[t] - np.log(np.exp(x).sum()) for x, t in zip(logits, text, strict=True)), **AGREE
            )


@pytest.mark.slow
def test_without_diversity_groups_are_the_same_and_with_it_they_part():
    def by_group(diversity):
        beams = search(LARGE, PROMPTS, num_tokens=7, beam_width=6, groups=3, diversity=diversity, alpha=0.0, stop=())
        return np.stack(
            [[t[g == i] for i in range(3)] for t, g in zip(beams.tokens, beams.groups, strict=True)]
        )  # [B, G, W/G, N]

    same = by_group(0.0)
    alone = search(LARGE, PROMPTS, num_tokens=7, beam_width=2, groups=1, diversity=0.0, alpha=0.0, stop=()).tokens
    for g in range(3):
        np.testing.assert_array_equal(same[:, g], alone)
    spread = []
    for diversity in (0.0, 0.37, 9.0):
        texts = by_group(diversity)
        np.testing.assert_array_equal(texts[:, 0], alone)  # the first group is never charged
        apart = [(texts[:, a, :, None] != texts[:, b, None]).mean() for a, b in ((0, 1), (0, 2), (1, 2))]
        spread.append(np.mean(apart))
    assert np.all(np.diff(spread) >= 0) and spread[0] < 0.5 < spread[-1], spread
    assert spread[-1] == 1.0  # three groups of two beams never need one of nine tokens twice


def test_the_search_ends_when_no_beam_can_enter_the_list():
    """One stop token of overwhelming probability: further steps could change nothing."""

    class Ends(History):
        def logits(self, state):
            return super().logits(state).at[..., 1].set(30.0)

    model, calls = Ends(vocabulary=4, scale=0.3), []

    def step(state, token):
        jax.debug.callback(lambda: calls.append(1))
        return model.step(state, token)

    beams = jax.jit(
        lambda p: beam_search(model.extend, step, model.start(1), p, beam_width=2, num_tokens=50, stop=(1,))
    )(np.array([[2]]))
    assert beams.tokens[0, 0].tolist() == [1] * 50 and beams.lengths[0, 0] == 0
    jax.effects_barrier()
    assert len(calls) <= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(beam_width=0), "beam_width=0; valid: whole numbers from 1"),
        (dict(groups=4), r"groups=4 do not share beam_width=6 evenly; valid: \[1, 2, 3, 6\]"),
        (dict(groups=0), "groups=0"),
        (dict(diversity=-1.0), "diversity=-1.0"),
        (dict(alpha=-0.5), "alpha=-0.5"),
        (dict(num_tokens=0), "num_tokens=0"),
    ],
)
def test_bad_numbers_are_named(options, message):
    options = dict(beam_width=6, num_tokens=3) | options
    with pytest.raises(UserError, match=message):
        beam_search(MODEL.extend, MODEL.step, MODEL.start(1), np.array([[1]]), **options)
