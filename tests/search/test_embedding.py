"""How vectors are judged: thresholds, F1, AUC and retrieval against counting, which pairs are compared, baselines, a
query."""

import functools

import jax
import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from research.data.text_pairs import Pair, pair_sources
from research.errors import UserError
from research.models import registry
from research.modules.state import apply, initialize
from research.search import embedding
from research.search.embedding import Vectors
from research.tasks.contrastive import Contrastive
from tests.models.twins import fast_jit

RNG = np.random.default_rng(0)
SCORES = np.round(RNG.normal(size=60), 1)  # with ties
LABELS = RNG.random(60) < 0.5 + 0.3 * np.sign(SCORES)
TASK = Contrastive("mnr", 0.1, True)


def test_threshold_is_the_best_of_all():
    best = embedding.best_threshold(SCORES, LABELS)
    values = {t: f1_score(LABELS, t <= SCORES) for t in np.unique(SCORES)}
    assert values[best] == max(values.values())
    found = embedding.at_threshold(SCORES, LABELS, best)
    np.testing.assert_allclose(found["f1"], values[best])
    called = best <= SCORES
    np.testing.assert_allclose([found["precision"], found["recall"]], [LABELS[called].mean(), called[LABELS].mean()])
    assert embedding.at_threshold(SCORES, LABELS, 9.0) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


def test_equal_scores_are_called_alike():
    """Cut inside the three that score 1, F1 would seem to be 2/3; it is 2/5 there, and 2/3 for calling all."""
    assert embedding.best_threshold(np.array([1.0, 1.0, 1.0, 0.0]), np.array([True, False, False, True])) == 0


def test_no_signal_is_two_thirds():
    """All scores alike: calling everything a pair is the best there is, F1 2/3 with as many non-pairs."""
    scores, labels = np.zeros(10), np.arange(10) < 5
    np.testing.assert_allclose(
        embedding.at_threshold(scores, labels, embedding.best_threshold(scores, labels))["f1"], 2 / 3
    )


def test_auc():
    np.testing.assert_allclose(embedding.roc_auc(SCORES, LABELS), roc_auc_score(LABELS, SCORES))
    assert np.isnan(embedding.roc_auc(SCORES, np.zeros(60, bool)))


def vectors(count=40, domains=3, seed=1):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(count, 6))
    b = a + rng.normal(size=(count, 6))
    return Vectors(*(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)), rng.integers(0, domains, count))


def test_half_of_what_is_scored_are_others_of_the_same_domain():
    given = Vectors(np.eye(6), np.eye(6)[[0, 1, 2, 3, 4, 5]], np.array([0, 1, 0, 2, 1, 0]))
    scores, labels = embedding.scored_pairs(given)  # domain 2 has but one pair
    assert list(labels) == [True] * 3 + [False] * 3 + [True] * 2 + [False] * 2
    np.testing.assert_array_equal(scores, labels)
    shown = Vectors(given.a, given.b @ np.roll(np.eye(6), 1, 0), given.domain)
    assert not np.array_equal(embedding.scored_pairs(shown)[0], labels)


def test_rows_are_of_each_domain_and_of_all():
    test, validation = vectors(), vectors(seed=2)
    rows = embedding.judge(test, validation, ("x", "y", "z", "nobody"))
    assert [row["domain"] for row in rows] == ["x", "y", "z", "all"]
    whole, part = rows[-1], test.of(1)
    assert whole["pairs"] == 40 == sum(row["pairs"] for row in rows[:-1])
    scores, labels = embedding.scored_pairs(test)
    np.testing.assert_allclose([whole["positive"], whole["negative"]], [scores[labels].mean(), scores[~labels].mean()])
    np.testing.assert_allclose(whole["ratio"], whole["positive"] / whole["negative"])
    assert whole["threshold"] == embedding.best_threshold(*embedding.scored_pairs(validation))
    nearest = [max(range(len(part.b)), key=lambda j: part.a[i] @ part.b[j]) for i in range(len(part.a))]
    np.testing.assert_allclose(rows[1]["retrieval"], np.mean(np.array(nearest) == np.arange(len(part.a))))


@pytest.fixture(scope="module")
def setting():
    text = lambda i: " ".join(f"word{chr(97 + (i * 7 + k) % 23)}" for k in range(5))
    pairs = {
        split: [Pair(text(i + s), text(i + s) + " same", i % 2) for i in range(9)]
        for s, split in enumerate(("train", "validation", "test"))
    }
    sources = pair_sources("made", pairs, ("law", "art"), length=8, vocab_size=64)
    config = registry.model_config(
        "domain_encoder_small",
        vocab_size=64,
        length=8,
        dim=16,
        depth=1,
        num_domains=2,
        attention={"num_heads": 2, "causal": False},
    )
    return sources, (config, *fast_jit(functools.partial(initialize, config))(jax.random.key(0)))


@pytest.mark.slow
def test_vectors_are_the_model_s_and_filler_is_cut_off(setting):
    sources, model = setting
    found = embedding.embed(model, sources["test"], TASK, pairs=7, batch=4)
    block = sources["test"].gather(np.arange(7))
    config, *arrays = model
    run = fast_jit(lambda params, stats, block: apply(config, params, stats, *TASK.inputs(block))[0])
    expected = np.asarray(run(*arrays, block)).reshape(7, 2, -1)
    expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(np.stack([found.a, found.b], 1), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.domain, block["domain"])
    turned = embedding.embed(model, sources["test"], TASK, pairs=7, batch=4, turn=1)
    other = np.asarray(run(*arrays, {**block, "domain": 1 - block["domain"]})).reshape(7, 2, -1)
    np.testing.assert_allclose(
        turned.a, other[:, 0] / np.linalg.norm(other[:, 0], axis=-1, keepdims=True), rtol=1e-4, atol=1e-5
    )


def test_tf_idf_by_hand(setting):
    sources, _ = setting
    train, source = sources["train"], sources["test"]
    found = embedding.tf_idf(source, train, pairs=3)
    documents = [
        set(map(int, side[:n]))
        for pair, sizes in zip(train.tokens, train.lengths, strict=True)
        for side, n in zip(pair, sizes, strict=True)
    ]
    tokens = source.tokens[1, 0][1 : source.lengths[1, 0]]
    weight = {
        t: list(tokens).count(t) * (np.log((1 + 18) / (1 + sum(int(t) in d for d in documents))) + 1)
        for t in set(map(int, tokens))
    }
    size = np.sqrt(sum(w**2 for w in weight.values()))
    assert set(np.flatnonzero(found.a[1])) == set(weight)
    for token, value in weight.items():
        np.testing.assert_allclose(found.a[1, token], value / size)


@pytest.mark.slow
def test_all_ways_are_compared_and_a_query_finds_its_like(setting):
    sources, model = setting
    rows = embedding.compare(model, sources, TASK, pairs=9)
    assert [(r["by"], r["domain"]) for r in rows] == [
        (b, d) for b in ("model", "next domain", "tf-idf") for d in ("law", "art", "all")
    ]
    assert next(r for r in rows if r["by"] == "tf-idf" and r["domain"] == "all")["auc"] > 0.9
    text = next(pair for pair in sources["test"].texts if pair.domain == 1).b
    best, found = embedding.nearest(model, sources["test"], text, "art", task=TASK)[0]
    assert found == text and best == pytest.approx(1, abs=1e-5)
    for domain, message in (
        ("tax", "'tax' that no expert has; valid: law, art, or 0..1"),
        ("2", "no expert"),
        (None, "no expert"),
    ):
        with pytest.raises(UserError, match=message):
            embedding.nearest(model, sources["test"], text, domain, task=TASK)
    with pytest.raises(UserError, match="no word in the query"):
        embedding.nearest(model, sources["test"], "!?", "0", task=TASK)


def test_an_empty_split_is_told(setting):
    sources, model = setting
    empty = pair_sources("made", {"train": sources["train"].texts}, ("law", "art"), length=8, vocab_size=64)
    with pytest.raises(UserError, match="made/test has no pairs"):
        embedding.compare(model, empty, TASK, pairs=9)
