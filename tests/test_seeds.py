"""Seeds of 64 bits: all of them are told apart, those below 2^32 keep their draws, others are refused."""

import jax
import numpy as np
import pytest

from launch import config as recipe
from research import seeds
from research.data.augment import Draws
from research.data.keyed_random import KeyedRandom
from research.data.pipeline import epoch_permutation
from research.data.sources import load_splits
from research.data.tokens import window_shift
from research.errors import UserError
from research.nested.draws import generator

LARGE = (5, 2**32 + 5, 2**63, 2**63 + 5, 2**64 - 1)


def draws(seed):
    """What a run draws from its seed, on the device and on the host."""
    one = np.zeros(1, np.int64)
    return {
        "key": np.asarray(jax.random.bits(seeds.key(seed), (4,))),
        "sub-networks": [int(generator(seed, step).integers(1000)) for step in range(4)],
        "order": epoch_permutation(100, seed, 0),
        "windows": [window_shift(1000, seed, epoch) for epoch in range(4)],
        "augmentation": Draws(seed, one, one)(0),
        "examples": KeyedRandom.of(seed, (0,), one).uniform("x", 4),
    }


def test_no_two_seeds_give_the_same_draws():
    drawn = [draws(seed) for seed in LARGE]
    for kind in drawn[0]:
        assert len({str(d[kind]) for d in drawn}) == len(LARGE), kind


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_seeds_of_32_bits_keep_their_key(seed):
    np.testing.assert_array_equal(jax.random.key_data(seeds.key(seed)), jax.random.key_data(jax.random.key(seed)))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "3"])
def test_others_are_refused_with_the_valid_range(seed):
    with pytest.raises(UserError, match=r"seed=.*; valid: whole numbers from 0 to 2\^64 - 1"):
        seeds.key(seed)


def test_a_config_and_the_options_of_data_refuse_them_too():
    with pytest.raises(UserError, match=r"config.seed=-1; valid: a whole number from 0 to 2\^64 - 1"):
        recipe.load("tests/tiny.py", {"seed": "-1"})
    assert recipe.load("tests/tiny.py", {"seed": str(2**64 - 1)})["seed"] == 2**64 - 1
    with pytest.raises(UserError, match=r"data.options.seed=-3; valid"):
        load_splits("probe:mqar", seed=-3)
