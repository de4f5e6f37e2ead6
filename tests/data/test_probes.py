"""Synthetic probes: the published rules, read off the sequences, and splits that share nothing."""

import zlib

import numpy as np
import pytest

from research.data.probes import KINDS, NOT_SCORED, load_probe
from research.errors import UserError
from tests.data.counted import calls

SMALL = {
    "mqar": dict(vocab_size=64, length=32, pairs=6),
    "selective_copying": dict(length=30, copies=5),
    "mad_selective_copying": dict(length=30, copies=5),
    "induction_heads": dict(length=20),
    "mad_recall": dict(length=24, vocab_size=24, noise=0.3, noise_vocab=8),
}


def make(kind, count=200, **options):
    block = load_probe(kind, train_examples=count, test_examples=1, **options)["train"].gather(np.arange(count))
    return block["tokens"], block["labels"]


@pytest.mark.parametrize("kind", KINDS)
def test_protocol(kind):
    splits = load_probe(kind, train_examples=50, test_examples=9, seed=3, **SMALL[kind])
    assert {split: len(source) for split, source in splits.items()} == {"train": 50, "validation": 9, "test": 9}
    source = splits["train"]
    indices = np.array([7, 3, 49, 3])
    block = source.gather(indices, np.array([0, 1, 2, 5]))
    for array in block.values():
        assert array.shape == (4, source.length) and array.dtype == np.int32
    assert (
        block["tokens"].min() >= 0
        and block["tokens"].max() < source.vocab_size
        and source.facts()["token_bytes"] is None
    )
    scored = block["labels"] != NOT_SCORED
    assert scored.any(1).all() and block["labels"].min() == NOT_SCORED and block["labels"].max() < source.vocab_size
    # An example depends neither on its neighbours nor, unless fresh, on the epoch.
    for name in block:
        np.testing.assert_array_equal(block[name][1], source.gather(np.array([3]))[name][0])
        np.testing.assert_array_equal(block[name][1], block[name][3])


@pytest.mark.parametrize("kind", KINDS)
def test_splits_epochs_and_seeds_differ(kind):
    splits = load_probe(kind, train_examples=9, test_examples=9, fresh=True, **SMALL[kind])
    other = load_probe(kind, train_examples=9, test_examples=9, fresh=True, seed=1, **SMALL[kind])["train"]
    at = lambda source, epoch=0: source.gather(np.arange(9), np.full(9, epoch))["tokens"].tobytes()
    assert len({at(s) for s in (*splits.values(), other)}) == 4
    assert at(splits["train"]) != at(splits["train"], 1) and at(splits["test"]) == at(splits["test"], 1)


def test_golden_sequences():
    """Every number measured on a probe hangs on these; they must never move."""
    found = {
        kind: zlib.crc32(b"".join(a.astype("<i4").tobytes() for a in make(kind, 20, **SMALL[kind]))) for kind in KINDS
    }
    assert found == GOLDEN


GOLDEN = {
    "mqar": 3602947737,
    "selective_copying": 543000511,
    "mad_selective_copying": 2821118472,
    "induction_heads": 2838745523,
    "mad_recall": 402936306,
}


@pytest.mark.parametrize("random_non_queries", [True, False])
def test_mqar_rules(random_non_queries):
    vocab, length, pairs = 64, 40, 8
    tokens, labels = make("mqar", vocab_size=vocab, length=length, pairs=pairs, random_non_queries=random_non_queries)
    keys, values = tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2]
    assert keys.min() >= 1 and keys.max() < vocab // 2 <= values.min()
    assert set(np.unique(keys)) == set(range(1, 32)) and set(np.unique(values)) == set(range(32, 64))
    assert (labels[:, : 2 * pairs] == NOT_SCORED).all()
    for row in range(len(tokens)):
        told = dict(zip(keys[row].tolist(), values[row].tolist(), strict=True))
        assert len(told) == pairs == len(set(told.values()))
        (scored,) = np.nonzero(labels[row] != NOT_SCORED)
        # Every key is asked for exactly once, at the start of a slot, and its value is the label there.
        assert (scored % 2 == 0).all() and sorted(tokens[row, scored]) == sorted(told)
        assert [told[key] for key in tokens[row, scored].tolist()] == labels[row, scored].tolist()
    filler = np.delete(
        tokens.ravel(), np.flatnonzero((labels != NOT_SCORED).ravel() | (np.arange(tokens.size) % length < 2 * pairs))
    )
    assert set(np.unique(filler)) == (set(range(vocab)) if random_non_queries else {0})


@pytest.mark.parametrize(
    ("length", "pairs", "nearest"), [(64, 4, 0.25106), (128, 8, 0.21307), (256, 16, 0.18475), (512, 64, 0.16730)]
)
def test_mqar_gaps_follow_the_power_law(length, pairs, nearest):
    """The first query drawn is that of key 0; its slot has the published probability."""
    count = 20_000 if length < 100 else 4000
    tokens, _ = make("mqar", count, length=length, pairs=pairs, random_non_queries=False)
    first = (tokens[:, 2 * pairs] == tokens[:, 0]).mean()
    assert abs(first - nearest) < 4 * np.sqrt(nearest / count)
    slots = (length - 2 * pairs) // 2
    weights = np.arange(1, slots + 1) ** -0.99
    assert weights[0] / weights.sum() == pytest.approx(nearest, abs=1e-5)


def test_mqar_nearest_slot_with_one_pair():
    _, labels = make("mqar", 20_000, length=58, pairs=1)  # 28 slots
    assert abs((labels[:, 2] != NOT_SCORED).mean() - 0.25106) < 4 * np.sqrt(0.19 / 20_000)


def test_selective_copying_keeps_the_order():
    tokens, labels = make("selective_copying", 2000, vocab_size=10, length=30, copies=5)
    assert (tokens[:, 25:] == 9).all() and (tokens[:, :25] < 9).all() and (labels[:, :25] == NOT_SCORED).all()
    noise = tokens[:, :25] == 0
    assert (noise.sum(1) == 20).all()
    np.testing.assert_array_equal(tokens[:, :25][~noise].reshape(-1, 5), labels[:, 25:])
    assert set(np.unique(labels[:, 25:])) == set(range(1, 9))
    # Every place is as likely as every other.
    np.testing.assert_allclose((~noise).mean(0), 0.2, atol=4 * np.sqrt(0.16 / 2000))


def test_mad_selective_copying_rules():
    tokens, labels = make("mad_selective_copying", 4000, length=30, copies=4)
    assert (tokens[:, 25] == 15).all() and (tokens[:, 26:] == 14).all() and (labels[:, :26] == NOT_SCORED).all()
    kept = tokens[:, :25] < 14
    assert (kept.sum(1) == 4).all() and kept[:, 24].all() and (tokens[:, :25][~kept] == 14).all()
    np.testing.assert_array_equal(tokens[:, :25][kept].reshape(-1, 4), labels[:, 26:])
    # 21 blanks go before one of 4 tokens each: before the first one stand Binomial(21, 1/4).
    before = kept.argmax(1)
    assert abs(before.mean() - 21 / 4) < 0.13 and abs(before.var() - 21 * 3 / 16) < 0.4


def test_induction_heads_rules():
    tokens, labels = make("induction_heads", 4000, length=12)
    special = tokens == 15
    assert (special.sum(1) == 2).all() and special[:, -1].all() and (labels[:, :-1] == NOT_SCORED).all()
    place = special.argmax(1)
    np.testing.assert_array_equal(labels[:, -1], tokens[np.arange(4000), place + 1])
    assert labels[:, -1].max() == 14
    np.testing.assert_allclose(np.bincount(place) / 4000, 0.1, atol=4 * np.sqrt(0.09 / 4000))


@pytest.mark.parametrize(
    "options", [dict(vocab_size=16), dict(vocab_size=32, noise=0.4, noise_vocab=16), dict(vocab_size=9)]
)
def test_mad_recall_rules(options):
    tokens, labels = make("mad_recall", 500, length=20, **options)
    plain = options["vocab_size"] - options.get("noise_vocab", 0)
    noisy = tokens[:, 0::2] >= plain
    assert ((tokens[:, 1::2] >= plain) == noisy).all() and not noisy[:, -1].any() and not noisy.all(1).any()
    # One of the first nine pairs and the last are never noise.
    assert abs(noisy[:, :9].mean() - options.get("noise", 0) * 8 / 9) < 0.03
    assert (labels[:, 1::2] == NOT_SCORED).all()
    for row in range(len(tokens)):
        seen = {}
        for place in range(0, 20, 2):
            key, value = tokens[row, place : place + 2].tolist()
            if key >= plain:
                assert labels[row, place] == NOT_SCORED
                continue
            assert key < plain // 2 <= value
            assert labels[row, place] == seen.get(key, NOT_SCORED)
            assert seen.setdefault(key, value) == value
        assert labels[row, 18] != NOT_SCORED


def test_mad_recall_scores_all_next_tokens_in_training_only():
    splits = load_probe("mad_recall", train_examples=5, test_examples=5, length=16, score_all=True)
    block = splits["train"].gather(np.arange(5))
    np.testing.assert_array_equal(block["labels"][:, :-1], block["tokens"][:, 1:])
    assert (block["labels"][:, -1] == NOT_SCORED).all()
    for split in ("validation", "test"):
        assert (splits[split].gather(np.arange(5))["labels"][:, 1::2] == NOT_SCORED).all()


def test_mix_of_lengths():
    mix = [(64, 4, 30), (32, 2, 20), (128, 8, 10)]
    splits = load_probe("mqar", test_examples=7, mix=mix, vocab_size=256)
    train = splits["train"]
    assert len(train) == 60 and train.length == 128 and len(splits["validation"]) == len(splits["test"]) == 21
    block = train.gather(np.arange(60))
    for first, last, length, pairs in ((0, 30, 64, 4), (30, 50, 32, 2), (50, 60, 128, 8)):
        labels = block["labels"][first:last]
        assert ((labels != NOT_SCORED).sum(1) == pairs).all() and (labels[:, length:] == NOT_SCORED).all()
        assert (block["tokens"][first:last, length:] == 0).all() and (
            block["tokens"][first:last, length - 4 : length] != 0
        ).any()
    # In any order, and the same as the part alone.
    mixed = train.gather(np.array([55, 3, 31]), np.array([1, 2, 3]))
    np.testing.assert_array_equal(mixed["tokens"], block["tokens"][[55, 3, 31]])
    np.testing.assert_array_equal(train.parts[1].gather(np.array([1]))["tokens"][0], block["tokens"][31, :32])
    # Parts of equal settings are not copies of each other.
    twins = load_probe("mqar", test_examples=1, mix=[(32, 2, 5), (32, 2, 5)])["train"].gather(np.arange(10))["tokens"]
    assert not np.array_equal(twins[:5], twins[5:])


def test_test_split_of_its_own_size():
    splits = load_probe(
        "mqar", test_examples=7, mix=[(64, 4, 30)], vocab_size=256, test_options={"mix": [(32, 2, 4), (128, 16, 5)]}
    )
    assert len(splits["validation"]) == 7 and len(splits["test"]) == 9 and splits["test"].length == 128
    splits = load_probe(
        "mqar", test_examples=7, mix=[(64, 4, 30)], vocab_size=256, test_options={"length": 128, "pairs": 16}
    )
    assert len(splits["test"]) == 7 and splits["test"].length == 128 and splits["validation"].length == 64
    splits = load_probe("induction_heads", train_examples=5, test_examples=5, test_options={"length": 1024})
    assert [splits[s].length for s in ("train", "validation", "test")] == [256, 256, 1024]


GIVEN = dict(train_examples=5, test_examples=5)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("mqra", GIVEN, ["'mqra'", "Did you mean mqar", "selective_copying"]),
        ("mqar", GIVEN | dict(pair=3), ["'pair'", "vocab_size, length, pairs", "mix"]),
        ("induction_heads", GIVEN | dict(mix=[]), ["'mix'", "vocab_size, length"]),
        ("mqar", GIVEN | dict(pairs=17), ["pairs=17", "68", "length=64"]),
        ("mqar", GIVEN | dict(pairs=0), ["pairs=0"]),
        ("mqar", GIVEN | dict(length=63), ["length=63", "even"]),
        ("mqar", GIVEN | dict(vocab_size=8), ["vocab_size=8", "3 keys", "pairs=4"]),
        ("mqar", GIVEN | dict(mix=[(64, 4, 5)]), ["train_examples"]),
        ("mqar", dict(test_examples=5, mix=[(64, 4, 5), (64, 4, 0)]), ["mix[1]=0"]),
        ("mqar", dict(test_examples=5, mix=[(64, 4)]), ["(length, pairs, examples)"]),
        ("mqar", dict(test_examples=5, mix=[(64, 4, 5)], length=8), ["leave them out"]),
        ("mqar", dict(train_examples=5), ["test_examples=None"]),
        ("mqar", dict(mix=[(64, 4, 5)]), ["test_examples=None"]),
        ("mqar", dict(test_examples=5), ["train_examples=None"]),
        ("mqar", GIVEN | dict(test_examples=0), ["test_examples=0"]),
        ("mqar", GIVEN | dict(test_options={"vocab_size": 512}), ["vocab_size", "512"]),
        ("selective_copying", GIVEN | dict(length=31), ["length=31", "copies=16"]),
        ("mad_selective_copying", GIVEN | dict(length=33), ["length=33", "copies=16"]),
        ("induction_heads", GIVEN | dict(length=2), ["length=2"]),
        ("mad_recall", GIVEN | dict(noise=0.2), ["noise=0.2", "noise_vocab"]),
        ("mad_recall", GIVEN | dict(noise=1.0), ["noise=1.0", "[0, 1)"]),
        ("mad_recall", GIVEN | dict(noise_vocab=15), ["noise_vocab=15"]),
    ],
)
def test_bad_input_names_cause_and_remedy(kind, options, words):
    with pytest.raises(UserError) as caught:
        load_probe(kind, **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message) < 300 and "\n" not in message


@pytest.mark.parametrize("kind", KINDS)
def test_no_loop_over_examples(kind):
    source = load_probe(kind, train_examples=10**6, test_examples=1)["train"]
    assert calls(lambda: source.gather(np.arange(64))) < 2 * calls(lambda: source.gather(np.arange(8)))
