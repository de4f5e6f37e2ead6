"""Random weights without compiling an initialiser, and logits by the ops that compile fastest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.modules.state import abstract, apply


@pytest.fixture(scope="session")
def random_arrays():
    """Returns (params, stats) of a config, every value random, moments positive."""

    def draw(config, seed=0):
        full = abstract(config)
        rng = np.random.default_rng(seed)
        params = {k: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32) for k, s in full.params.items()}
        return params, {k: jnp.asarray(rng.uniform(0.5, 1.5, s.shape), jnp.float32) for k, s in full.stats.items()}

    return draw


@pytest.fixture(scope="session")
def naive_logits():
    def run(config, params, stats, x):
        config = dataclasses.replace(config, implementation="naive")
        return np.asarray(jax.jit(lambda p, s, x: apply(config, p, s, x)[0])(params, stats, x))

    return run
