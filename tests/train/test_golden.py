"""Two updates of every family give the numbers that they gave before."""

import json

import numpy as np
import pytest

from research.models import registry
from tests.train import golden

RENEW = "If this change of what is trained is meant: python -m tests.train.golden --renew"
STORED = json.loads(golden.STORED.read_text())


def test_every_family_is_stored():
    assert {registry.entry(name).config.family for name in registry.list_models()} == set(golden.MODELS) == set(STORED)


@pytest.mark.slow_unless("lenet")
@pytest.mark.parametrize("family", golden.MODELS)
def test_two_updates_give_the_stored_numbers(family, tmp_path):
    found, stored = golden.numbers(golden.MODELS[family], tmp_path), STORED[family]
    assert found.keys() == stored.keys(), RENEW
    for key, value in stored.items():
        np.testing.assert_allclose(
            found[key], value, rtol=1e-5, atol=1e-7, err_msg=f"{family}, {key}. {RENEW} {family}"
        )
