"""Random numbers keyed by example: the published generator, its statistics, and that an example is alone in its
block."""

import itertools

import numpy as np
import pytest

from research.data.keyed_random import KeyedRandom, fold

BLOCK = 20_000


@pytest.fixture(scope="module")
def random():
    return KeyedRandom.of(7, (0,), np.arange(BLOCK))


def chi_square(counts, expected):
    """In standard deviations above its mean."""
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def test_words_are_splitmix64():
    # The first outputs of the reference implementation (Vigna's splitmix64.c) for the seed 1234567.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert fold(np.array([1234567], np.uint64), np.arange(5, dtype=np.uint64)).tolist() == published


def test_golden_words():
    """They decide what every synthetic example is; change them and no result can be made again."""
    random = KeyedRandom.of(-3, (1, 2), np.array([5, 6]), np.array([0, 9]))
    assert random.words("what", 2).tolist() == GOLDEN_WORDS
    assert random.distinct("what", 9, 4).tolist() == GOLDEN_DISTINCT


GOLDEN_WORDS = [[9671662663301865841, 785294987290248537], [11857156094204763824, 1802444890442040233]]
GOLDEN_DISTINCT = [[8, 2, 3, 0], [3, 8, 2, 0]]

DRAWS = {
    "uniform": lambda r: r.uniform("a", 3, 5),
    "integers": lambda r: r.integers("a", 11, 7),
    "signs": lambda r: r.signs("a", 7),
    "normal": lambda r: r.normal("a", 3, 3),
    "permutation": lambda r: r.permutation("a", 6),
    "distinct": lambda r: r.distinct("a", 30, 6),
    "weighted": lambda r: r.weighted("a", np.array([1.0, 2, 3, 4]), 2),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_an_example_depends_on_its_own_key_alone(draw):
    indices, epochs = np.array([9, 4, 2, 7, 4]), np.array([0, 3, 1, 1, 3])
    block = DRAWS[draw](KeyedRandom.of(1, (0,), indices, epochs))
    for row in range(5):
        alone = DRAWS[draw](KeyedRandom.of(1, (0,), indices[row : row + 1], epochs[row : row + 1]))
        np.testing.assert_array_equal(block[row], alone[0])
    np.testing.assert_array_equal(block[1], block[4])


def test_every_part_of_the_key_counts():
    def word(seed=0, stream=(0,), index=0, epoch=0, what="a"):
        return int(KeyedRandom.of(seed, stream, np.array([index]), np.array([epoch])).words(what, 1)[0, 0])

    changed = [
        word(),
        word(seed=1),
        word(seed=-1),
        word(seed=2**40),
        word(stream=(1,)),
        word(stream=(0, 0)),
        word(index=1),
        word(epoch=1),
        word(what="b"),
    ]
    assert len(set(changed)) == len(changed)
    assert word() == int(KeyedRandom.of(2**64, (0,), np.array([0])).words("a", 1)[0, 0])


def test_bits_are_fair_and_independent_across_examples(random):
    words = random.words("bits", 4)
    bits = (words[:, :, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    signs = bits.reshape(BLOCK, -1).astype(np.float64) * 2 - 1
    limit = 5 / np.sqrt(BLOCK)
    assert np.abs(signs.mean(0)).max() < limit
    # Between the bits of one example, and between an example and the next one.
    for other in (signs, np.roll(signs, 1, axis=0)):
        correlation = signs.T @ other / BLOCK
        if other is signs:
            np.fill_diagonal(correlation, 0)
        assert np.abs(correlation).max() < limit * 1.3


def test_uniform_and_integers(random):
    u = random.uniform("u", 10)
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 4 / np.sqrt(12 * u.size)
    assert abs(np.histogram(u, 50, (0, 1))[0] / u.size - 0.02).max() < 0.0016
    for below in (2, 7, 1000):
        counts = np.bincount(random.integers("i", below, 10).ravel(), minlength=below)
        assert len(counts) == below and abs(chi_square(counts, u.size / below)) < 4
    assert set(np.unique(random.signs("s", 3))) == {-1, 1} and abs(random.signs("s", 10).mean()) < 4 / np.sqrt(u.size)


def test_normal_moments_and_tails(random):
    z = random.normal("z", 11).astype(np.float64)
    assert z.shape == (BLOCK, 11) and random.normal("z", 2).dtype == np.float32
    size = z.size
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 4 * np.sqrt(spread / size), power
    assert abs((np.abs(z) > 3).mean() - 0.0026998) < 4 * np.sqrt(0.0027 / size)
    correlation = z.T @ z / BLOCK - np.eye(11)
    assert np.abs(correlation).max() < 5 * np.sqrt(2 / BLOCK)


def test_ordered_choices_are_equally_likely(random):
    for drawn, expected in (
        (random.distinct("d", 4, 2), list(itertools.permutations(range(4), 2))),
        (random.distinct("d", 3, 3), list(itertools.permutations(range(3)))),
        (random.permutation("p", 3), list(itertools.permutations(range(3)))),
    ):
        found, counts = np.unique(drawn, axis=0, return_counts=True)
        assert [tuple(row) for row in found.tolist()] == expected
        assert abs(chi_square(counts, BLOCK / len(expected))) < 4
    many = random.distinct("d", 4095, 64)
    assert (np.diff(np.sort(many, 1)) > 0).all() and many.min() >= 0 and many.max() < 4095
    assert abs(many.mean() - 2047) < 4 * 4095 / np.sqrt(12 * many.size)


def test_weighted_draws_follow_the_weights_left(random):
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    drawn = random.weighted("w", weights, 2)
    pairs = list(itertools.permutations(range(4), 2))
    counts = np.array([((drawn == pair).all(1)).sum() for pair in pairs])
    expected = np.array([weights[a] / 10 * weights[b] / (10 - weights[a]) for a, b in pairs]) * BLOCK
    assert counts.sum() == BLOCK and abs(chi_square(counts, expected)) < 4
