"""The model to play with: it runs, and samples sub-networks."""

import functools
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import research
from research.errors import UserError
from research.models import registry
from tests.models.twins import fast_jit, images

NAME = "vit_tiny_patch16_224"


@pytest.mark.slow
def test_created_model_runs_and_samples():
    model = research.create_model(NAME, **registry.entry(NAME).tiny)
    small = model.sample(width=0.5, depth=0.5)
    x = images(model.config)
    assert model(x).shape == small(x).shape == (3, 10)
    assert small.config.depth == 2 and small.config.dim == 16 and small.config.num_heads == 2
    assert research.model_info("resnet50")["params"] == 25_557_032


@pytest.mark.slow
def test_a_sample_takes_moments_of_its_own_from_images_and_says_so_where_it_keeps_others(monkeypatch):
    monkeypatch.setattr("research.nested.model.BATCH", 3)
    model = research.create_model("resnet18", **registry.entry("resnet18").tiny)
    x = jnp.concatenate([images(model.config)] * 2)  # two batches, of the same images
    outputs = lambda network, mode: np.asarray(fast_jit(functools.partial(network, mode=mode))(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = model.sample(width=0.5, calibrate=x)
        assert model.sample().stats.keys() == model.stats.keys()
        research.create_model(NAME, **registry.entry(NAME).tiny).sample(width=0.5)  # has no moments
    np.testing.assert_allclose(outputs(small, "eval"), outputs(small, "train"), atol=1e-3)
    with pytest.warns(
        UserWarning, match=r"keeps the larger model's moments of batch norm.*model.sample\(..., calibrate=images\)"
    ):
        kept = model.sample(width=0.5)
    assert np.abs(outputs(kept, "eval") - outputs(small, "eval")).max() > 1e-2


def test_an_unknown_dimension_is_told_with_the_valid_ones():
    model = research.create_model(NAME, **registry.entry(NAME).tiny)
    with pytest.raises(UserError, match="unknown sub-network dimension 'widht'; valid: .*width"):
        model.sample(widht=0.5)
