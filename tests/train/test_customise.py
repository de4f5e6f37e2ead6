"""Customisation on a toy user: he is read better, everybody as before, the global expert is the same to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models.customised import CustomisedConfig
from research.models.lenet import LeNetConfig
from research.modules.axes import Kind
from research.modules.state import apply, initialize
from research.train import costs, customise
from research.train.customise import Images, Schedule
from tests.models.twins import fast_jit

CONFIG = CustomisedConfig(LeNetConfig(maps=(4, 6), hidden=(12, 24), num_classes=3), rank=3, hidden=8, budget=0.15)


def crowd(count, seed, turned):
    """Images of three patterns under noise; the user's are the patterns shifted, with the labels of others."""
    patterns = np.random.default_rng(0).normal(size=(6, 28, 28, 1))
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, count)
    image = patterns[3 + label if turned else label] + 0.3 * rng.normal(size=(count, 28, 28, 1))
    return Images(jnp.asarray(image, jnp.float32), jnp.asarray(label, jnp.int32))


@functools.lru_cache
def trained():
    """A global expert of random features whose head knows the crowd, and the network customised for the user."""
    everybody, user = crowd(60, 1, False), crowd(60, 2, True)
    expert, _ = fast_jit(functools.partial(initialize, CONFIG.expert))(jax.random.key(0))
    features = apply(CONFIG.expert, expert, {}, everybody.image, method="embed")[0]
    design = np.concatenate([features, np.ones((60, 1))], 1)
    head = np.linalg.lstsq(design, np.eye(3)[np.asarray(everybody.label)], rcond=None)[0]
    expert = {
        **expert,
        "head/kernel": jnp.asarray(head[:-1], jnp.float32),
        "head/bias": jnp.asarray(head[-1], jnp.float32),
    }
    schedule = Schedule()
    return expert, customise.train_experts(CONFIG, expert, user, everybody, jax.random.key(1), schedule)


@pytest.mark.slow
def test_user_gains_everybody_keeps_and_the_global_expert_is_untouched():
    expert, params = trained()
    user, everybody = (
        customise.measure(CONFIG, params, crowd(90, seed, turned)) for seed, turned in ((3, True), (4, False))
    )
    assert float(user["before"]) < 0.6 and float(user["after"]) > float(user["before"]) + 0.25
    assert float(everybody["before"]) > 0.9 and float(everybody["after"]) >= float(everybody["before"]) - 0.05
    assert float(user["local_answers"]) > 0.2 > 0.1 > float(everybody["local_answers"])
    assert customise.checksum(customise.global_part(params)) == customise.checksum(expert)
    for name, array in customise.global_part(params).items():
        np.testing.assert_array_equal(array, expert[name])
    changed = {**expert, "head/bias": expert["head/bias"].at[0].add(1e-6)}
    assert customise.checksum(changed) != customise.checksum(expert)


def test_gate_labels():
    local, other = jnp.array([True, True, False, False]), jnp.array([True, False, True, False])
    np.testing.assert_array_equal(customise.gate_labels(local, other), [0, 1, 0, 0])


def test_overhead_in_multiply_adds():
    config = CustomisedConfig()
    macs, expert = costs.forward_flops(config) // 2, costs.forward_flops(config.expert) // 2
    assert expert == 6 * 25 * 28 * 28 + 16 * 6 * 25 * 100 + 48_000 + 84 * 120 + 840
    found = customise.overheads(config, macs, expert)
    assert (
        found["macs_overhead"] == pytest.approx((84 * 8 + 80 + 84 * 8 + 8) / expert)
        and found["params_overhead"] == config.overhead
    )
    with pytest.raises(UserError, match="add 10.00 % multiply-adds, more than the budget of 2.5 %; lower rank=8"):
        customise.overheads(config, 110, 100)


def test_experts_are_saved_for_one_global_expert_alone(tmp_path):
    expert, params = trained()
    path = tmp_path / "customised" / "user0.npz"
    customise.save_experts(path, params)
    again = customise.load_experts(path, expert)
    assert set(again) == set(params)
    for name, array in params.items():
        np.testing.assert_array_equal(again[name], array)
    with pytest.raises(UserError, match="belongs to another global expert"):
        customise.load_experts(path, {**expert, "head/bias": expert["head/bias"] + 1})
    with pytest.raises(UserError, match="no local expert at"):
        customise.load_experts(tmp_path / "user1.npz", expert)


def test_only_matrices_decay():
    params = {"up/kernel": jnp.ones((2, 2)), "up/bias": jnp.ones(2)}
    kinds = {"up/kernel": Kind.MATRIX, "up/bias": Kind.BIAS}
    fitted = customise._fit(
        lambda p: 0.0 * p["up/kernel"].sum(), params, kinds, Schedule(steps=3, lr=0.1, weight_decay=0.1)
    )
    assert (fitted["up/bias"] == 1).all() and (fitted["up/kernel"] < 1).all()
