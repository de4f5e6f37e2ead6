"""How alike experts are, of kernels whose angles are known."""

import jax.numpy as jnp
import numpy as np

from research.modules.moe_similarity import similarity


def test_similarity_of_copies_strangers_and_opposites():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 30, 40)), jnp.float32)
    assert abs(np.asarray(similarity({"up": jnp.repeat(kernel, 3, 1)})) - 1).max() < 1e-5
    assert abs(np.asarray(similarity({"up": jnp.concatenate([kernel, -kernel], 1)})) + 1).max() < 1e-5
    normal = jnp.asarray(np.random.default_rng(1).normal(size=(3, 30, 40)), jnp.float32)
    unit = [k.ravel() / np.linalg.norm(k) for k in np.asarray(normal)]
    mean = np.mean([unit[i] @ unit[j] for i in range(3) for j in range(3) if i != j])
    assert abs(float(similarity({"down": normal})) - mean) < 1e-5
