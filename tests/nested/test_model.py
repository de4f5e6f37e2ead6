"""The model to play with: it runs, and samples smaller selves."""

import pytest

import research
from research.errors import UserError
from research.models import registry
from tests.models.twins import images

NAME = "vit_tiny_patch16_224"


def test_created_model_runs_and_samples():
    model = research.create_model(NAME, **registry.entry(NAME).tiny)
    small = model.sample(width=0.5, depth=0.5)
    x = images(model.config)
    assert model(x).shape == small(x).shape == (3, 10)
    assert small.config.depth == 2 and small.config.dim == 16 and small.config.heads == 2
    assert research.model_info("resnet50")["params"] == 25_557_032


def test_an_unknown_dimension_is_told_with_the_valid_ones():
    model = research.create_model(NAME, **registry.entry(NAME).tiny)
    with pytest.raises(UserError, match="unknown sub-network dimension 'widht'; valid: .*width"):
        model.sample(widht=0.5)
