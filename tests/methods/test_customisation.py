"""Customisation: a toy user is read better, everybody as before, the global expert is the same to the bit, of any
family; in the training loop the same losses, one part after the other."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.config import load_recipe
from research.errors import UserError
from research.interop.safetensors_io import save_folder
from research.methods.bases import customise
from research.methods.bases.customise import Images, Schedule
from research.methods.customisation import Customisation
from research.models import registry
from research.models.customised import CustomisedConfig, Parts, global_part
from research.models.lenet import LeNetConfig
from research.modules.axes import Kind
from research.modules.state import apply, initialize
from research.tasks.base import Example
from research.train import costs, loop
from research.train.config import resolved
from research.train.extraction import load_model
from research.train.setup import make_setup
from research.train.supervised import Supervised
from tests.models.twins import fast_jit, random_arrays
from tests.train.reporter import Lines

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
    expert, _ = fast_jit(functools.partial(initialize, CONFIG.backbone))(jax.random.key(0))
    features = apply(CONFIG.backbone, expert, {}, everybody.image, method="embed")[0]
    design = np.concatenate([features, np.ones((60, 1))], 1)
    head = np.linalg.lstsq(design, np.eye(3)[np.asarray(everybody.label)], rcond=None)[0]
    expert = {
        **expert,
        "head/kernel": jnp.asarray(head[:-1], jnp.float32),
        "head/bias": jnp.asarray(head[-1], jnp.float32),
    }
    schedule = Schedule()
    return expert, customise.train_experts(CONFIG, expert, {}, user, everybody, jax.random.key(1), schedule)


@pytest.mark.slow
def test_user_gains_everybody_keeps_and_the_global_expert_is_untouched():
    expert, params = trained()
    user, everybody = (
        customise.measure(CONFIG, params, {}, crowd(90, seed, turned)) for seed, turned in ((3, True), (4, False))
    )
    assert float(user["before"]) < 0.6 and float(user["after"]) > float(user["before"]) + 0.25
    assert float(everybody["before"]) > 0.9 and float(everybody["after"]) >= float(everybody["before"]) - 0.05
    assert float(user["local_answers"]) > 0.2 > 0.1 > float(everybody["local_answers"])
    assert customise.checksum(global_part(params)) == customise.checksum(expert)
    for name, array in global_part(params).items():
        np.testing.assert_array_equal(array, expert[name])
    changed = {**expert, "head/bias": expert["head/bias"].at[0].add(1e-6)}
    assert customise.checksum(changed) != customise.checksum(expert)


def test_gate_labels():
    local, other = jnp.array([True, True, False, False]), jnp.array([True, False, True, False])
    np.testing.assert_array_equal(customise.gate_labels(local, other), [0, 1, 0, 0])


def test_overhead_in_multiply_adds():
    config = CustomisedConfig()
    macs, expert = costs.forward_flops(config) // 2, costs.forward_flops(config.backbone) // 2
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


BACKBONES = {
    "lenet5": {"maps": (4, 6), "hidden": (12, 8)},
    "resnet18": {"depths": (1, 1), "dims": (4, 8), "stem": "small"},
    "unireplknet_a": {"depths": (1, 1), "dims": (8, 12), "kernel_sizes": ((7,), (3,)), "stem_strides": (1, 1)},
    "vit_tiny_patch16_224": {"dim": 16, "depth": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 32, "patch_size": 4},
}
"""A small backbone of several families."""


def run_of(name, tmp_path, **fields):
    """A run of the tiny recipe over a backbone whose weights, statistics too, are random; and the backbone's arrays."""
    padded = {"data.augment.pad_to": "28"} if name == "lenet5" else {}
    size = 28 if padded else 8
    backbone = registry.model_config(
        name, **{**BACKBONES[name], "image_size": size, "in_channels": 1, "num_classes": 10}
    )
    params, stats = random_arrays(backbone)
    save_folder(tmp_path / "source", backbone, params, stats)
    config = load_recipe("tests/methods/tiny.py:customisation")
    config.model.backbone = {"name": name, **BACKBONES[name]}
    config.data.augment = {"pad_to": 28} if padded else {}
    config.nested.points = {}
    config.method.customisation = {"source": str(tmp_path / "source")}
    config.eval.calibrate_batches = 2
    for field, value in fields.items():
        section, _, option = field.partition("__")
        config[section][option] = value
    return resolved(config), params, stats


@pytest.mark.slow_unless("resnet18", "vit_tiny_patch16_224")
@pytest.mark.parametrize("name", BACKBONES)
def test_the_backbone_is_the_same_to_the_bit_after_a_run_and_when_it_is_evaluated(name, tmp_path):
    config, params, stats = run_of(name, tmp_path)
    report = loop.train(config, str(tmp_path / "run"), Lines())
    _, after, statistics = load_model(tmp_path / "run")
    assert bool(stats) == (name in ("resnet18", "unireplknet_a"))
    assert customise.checksum(global_part(after)) == customise.checksum(params)
    assert customise.checksum(global_part(statistics)) == customise.checksum(stats)
    row = report["subnets"][0]
    assert 0 <= row["local_answers"] <= 1 and 0 < row["frozen_accuracy"] < 0.5 and math.isfinite(row["value"])


def test_one_part_is_trained_after_the_other(tmp_path):
    learner = Supervised(make_setup(run_of("lenet5", tmp_path)[0]))
    state, batches = learner.initial(print), learner.batches(0)
    first, moved = jax.device_get(state.params), []
    for step in range(8):
        before = jax.device_get(state.params)
        state, _ = learner.update(step, state, next(batches))
        moved.append({name for name, value in jax.device_get(state.params).items() if (value != before[name]).any()})
    assert [learner.setup.phase(step).name for step in range(8)] == 4 * ["local"] + 4 * ["gate"]
    assert set.union(*moved[:4]) == {"down/kernel", "up/kernel", "up/bias"}
    assert set.union(*moved[4:]) == {"gate1/kernel", "gate1/bias", "gate2/kernel", "gate2/bias"}
    learner.close()
    assert first.keys() == state.params.keys()


def forward_of(parts):
    def forward(*inputs, method="__call__", **how):
        assert method == "parts"
        return parts

    return forward


def test_losses_of_the_two_phases():
    """Of four examples two are the user's; the global expert is right on the first, the local one on the second."""
    right, wrong = jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0])
    parts = Parts(jnp.stack([right, wrong, right, wrong]), jnp.stack([wrong, right, right, right]), jnp.arange(4.0) - 1)
    batch = {"label": jnp.zeros(4, jnp.int32), "replay": jnp.array([0.0, 0, 1, 1])}
    example = lambda phase: Example(batch, (None,), jax.nn.one_hot(batch["label"], 2), None, phase, None)
    objective = Customisation("runs/a", mistake_weight=3.0).objective(None, None)
    good, bad = math.log1p(math.exp(-2)), 2 + math.log1p(math.exp(-2))
    local = objective(forward_of(parts), example("local"))
    assert float(local.loss) == pytest.approx((bad + 3 * good) / 4) and float(local.measured["local_accuracy"]) == 0.5
    softplus = [math.log1p(math.exp(x)) for x in (-1, 0, 1, 2)]
    gate = objective(forward_of(parts), example("gate"))
    assert float(gate.loss) == pytest.approx(sum(softplus) / 4)  # the second is wanted, and its logit is 0


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model.name": "lenet5"}, "trains the parts of model customised, not"),
        ({"method.customisation.source": ""}, "give its run: config.method.customisation.source"),
        ({"data.name": "digits", "data.options": None}, "give data.name=replay:NAME"),
        ({"task.mixup": 0.2}, "which task.mixup and task.cutmix mix"),
        ({"train.accumulate": 2}, "set train.accumulate=1"),
        ({"methods": ("customisation", "ema")}, "freezes the global expert, whose weights ema would replace"),
        ({"model.backbone": {"name": "advmoe_resnet18"}}, "gives no embedding that others could read"),
        ({"model.budget": 0.01}, "more than the budget of 1 %"),
    ],
)
def test_what_does_not_fit_is_refused(fields, told):
    config = load_recipe("tests/methods/tiny.py:customisation")
    config.nested.points, config.method.customisation = {}, {"source": "runs/a"}
    for field, value in fields.items():
        *section, option = field.split(".")
        node = config
        for part in section:
            node = node[part]
        with node.unlocked(), node.ignore_type():
            node[option] = {} if value is None else value
    if config.model.name == "lenet5":
        config.model, config.data.augment = {"name": "lenet5"}, {"pad_to": 28}
    with pytest.raises(UserError) as caught:
        make_setup(resolved(config))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_another_backbone_is_refused_when_the_run_starts(tmp_path):
    config, _, _ = run_of("resnet18", tmp_path)
    config["model"]["backbone"]["dims"] = [4, 12]
    learner = Supervised(make_setup(config))
    with pytest.raises(
        UserError, match=r"source=.* does not fit model.backbone at head/kernel; its model is resnet, the"
    ):
        learner.initial(print)
    learner.close()
