"""Upcycling: a mixture of copies computes what the dense network computed, and every way in which it does not is
told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models.sequence import SequenceConfig
from research.models.vit import ViTConfig
from research.modules.moe_options import FAMILIES, Moe
from research.modules.state import abstract, apply
from research.nested.upcycle import changes_function, upcycle
from tests.models.twins import fast_jit, random_arrays
from tests.ops.compare import assert_agree

TEXT = SequenceConfig(vocab_size=11, length=9, dim=16, depth=4, pattern="hgrn", ffn="glu", ffn_dim=24)
IMAGES = ViTConfig(dim=16, depth=6, num_heads=2, head_dim=8, mlp_dim=24, patch_size=4, image_size=8, num_classes=5)
DROPLESS = dataclasses.replace(FAMILIES["v_moe"], capacity="none", renormalize=True, ffn_dim=24, num_experts=3)


def sparse(config, moe, **more):
    return dataclasses.replace(config, moe=moe, kept_layers=(), **more)


PAIRS = {
    "every layer": (TEXT, sparse(TEXT, Moe(num_experts=3, ffn_dim=24), ffn="moe")),
    "every second layer": (TEXT, sparse(TEXT, Moe(num_experts=5, ffn_dim=24), ffn="glu moe")),
    "capacity for all": (
        TEXT,
        sparse(TEXT, Moe(num_experts=2, ffn_dim=24, capacity="megablocks", capacity_factor=2.0), ffn="moe"),
    ),
    "hash": (TEXT, sparse(TEXT, dataclasses.replace(FAMILIES["hash"], ffn_dim=24, num_experts=3), ffn="moe")),
    "vision": (IMAGES, sparse(IMAGES, DROPLESS, ffn="mlp moe")),
    "vision, last two": (IMAGES, sparse(IMAGES, DROPLESS, ffn="mlp moe", dense_blocks=2)),
}


def example(config):
    rng = np.random.default_rng(3)
    if isinstance(config, ViTConfig):
        return jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32)
    return jnp.asarray(rng.integers(0, 11, (2, 9)))


def outputs(config, params, stats, x):
    config = dataclasses.replace(config, implementation="naive")
    return fast_jit(lambda p, s, x: apply(config, p, s, x)[0])(params, stats, x)


@pytest.mark.slow_unless("hash")
@pytest.mark.parametrize("pair", PAIRS)
def test_copies_compute_the_same(pair):
    dense, mixture = PAIRS[pair]
    params, stats = random_arrays(dense)
    made, made_stats = upcycle(dense, params, stats, mixture, jax.random.key(1))
    shapes = abstract(mixture)
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in shapes.params.items()}
    assert {k: v.shape for k, v in made_stats.items()} == {k: v.shape for k, v in shapes.stats.items()}
    x = example(dense)
    assert_agree(outputs(mixture, made, made_stats, x), outputs(dense, params, stats, x), 1e-5)
    router = next((k for k in made if k.endswith("router")), None)
    assert router is None or np.asarray(made[router]).std() > 0.01


@pytest.mark.parametrize(
    "moe, reason",
    [
        (Moe(ffn_dim=24, renormalize=False), "renormalize=False"),
        (Moe(ffn_dim=24, scoring_func="sigmoid", routed_scaling_factor=2.5), "routed_scaling_factor=2.5"),
        (Moe(ffn_dim=24, capacity="mesh"), "capacity='mesh'"),
        (dataclasses.replace(FAMILIES["soft"], ffn_dim=24), "router='soft'"),
        (Moe(ffn_dim=24), ""),
    ],
)
def test_what_changes_the_function_is_told(moe, reason):
    assert reason in changes_function(moe) and bool(reason) == bool(changes_function(moe))


@pytest.mark.parametrize("options", [pytest.param({"noise": 0.1}, marks=pytest.mark.slow), {"reinit": 0.5}])
def test_noise_and_reinit_make_experts_differ(options):
    dense, mixture = PAIRS["every layer"]
    params, stats = random_arrays(dense)
    made, _ = upcycle(dense, params, stats, mixture, jax.random.key(1), **options)
    kernels, source = {k: np.asarray(v) for k, v in made.items() if "/ffn/" in k and "router" not in k}, params
    for name, kernel in kernels.items():
        copy = np.asarray(source[name])[:, None]
        changed = kernel != copy
        if "reinit" in options:
            units = changed.any(-2) if name.endswith(("up", "gate")) else changed.any(-1)
            assert (units.sum(-1) == 12).all()
            assert not (units[:, 0] == units[:, 1]).all()
            gates = changed.any(-2) if name.endswith("gate") else None
            if gates is not None:
                ups = (
                    kernels[name.replace("gate", "up")] != np.asarray(source[name.replace("gate", "up")])[:, None]
                ).any(-2)
                assert (gates == ups).all()
        else:
            ratio = (kernel - copy).std() / copy.std()
            assert changed.mean() > 0.99 and 0.08 < ratio < 0.12


@pytest.mark.parametrize(
    "change, told",
    [
        (dict(moe=Moe(num_experts=3, ffn_dim=16)), r"needs \(3, 16, 16\)"),
        (dict(moe=Moe(num_experts=3, ffn_dim=24, num_shared_experts=1)), "shared"),
        (dict(moe=Moe(num_experts=3, ffn_dim=24), depth=2), "4 layers, the mixture 2"),
        (dict(moe=dataclasses.replace(FAMILIES["soft"], ffn_dim=24, router="top_k", expert="mlp")), "down_bias"),
    ],
)
def test_what_does_not_fit_is_told(change, told):
    params, stats = random_arrays(TEXT)
    with pytest.raises(UserError, match=told):
        upcycle(TEXT, params, stats, sparse(TEXT, **{"ffn": "moe", **change}), jax.random.key(0))
    with pytest.raises(UserError, match="reinit from 0 to 1"):
        upcycle(TEXT, params, stats, TEXT, jax.random.key(0), reinit=1.5)
