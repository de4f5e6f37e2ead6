"""Schedules, rules and optimizers against optax and the sheet's numbers."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from research.errors import UserError
from research.modules.axes import Kind
from research.optim.build import make_optimizer, state_bytes
from research.optim.muon import MUON_RMS, matrix_axes
from research.optim.rules import resolve
from research.optim.schedules import cosine_power, make_schedule
from research.optim.section import OptimSection

BASE = OptimSection(
    name="lion",
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    momentum=0.9,
    nesterov=True,
    weight_decay=0.5,
    clip_norm=0.0,
    decay_rules=(),
    lr_rules=(),
)
AXES = {"a/kernel": ("stage1/embed", "stage1/layer/mlp"), "a/bias": ("stage1/layers", "stage1/layer/mlp")}
KINDS = {"a/kernel": Kind.MATRIX, "a/bias": Kind.BIAS}


def params():
    return {"a/kernel": jnp.linspace(-1, 1, 12).reshape(3, 4), "a/bias": jnp.linspace(0.5, 2, 8).reshape(2, 4)}


def gradients(i):
    return jax.tree.map(lambda p: jnp.sin(7 * p + i), params())


def run(optimizer, steps=5):
    p = params()
    state = optimizer.init(p)
    for i in range(steps):
        updates, state = optimizer.update(gradients(i), state, p)
        p = optax.apply_updates(p, updates)
    return p, state


@pytest.mark.parametrize(
    "name, reference",
    [
        ("lion", lambda mask: optax.lion(0.01, b1=0.9, b2=0.99, weight_decay=0.5, mask=mask)),
        ("adamw", lambda mask: optax.adamw(0.01, b1=0.9, b2=0.99, weight_decay=0.5, mask=mask)),
    ],
)
def test_update_is_optax_s(name, reference):
    ours, _ = run(make_optimizer(dataclasses.replace(BASE, name=name), optax.constant_schedule(0.01), AXES, KINDS))
    theirs, _ = run(reference({"a/kernel": True, "a/bias": False}))
    for k in ours:
        np.testing.assert_allclose(ours[k], theirs[k], rtol=1e-6, atol=1e-7)


def test_sgd_is_optax_s():
    config = dataclasses.replace(BASE, name="sgd", weight_decay=0.0)
    ours, _ = run(make_optimizer(config, optax.constant_schedule(0.1), AXES, KINDS))
    theirs, _ = run(optax.sgd(0.1, momentum=0.9, nesterov=True))
    for k in ours:
        np.testing.assert_allclose(ours[k], theirs[k], rtol=1e-6)


@pytest.mark.parametrize(
    "axes, inputs, outputs",
    [
        (("stage1/embed", "stage1/layer/mlp"), (0,), (1,)),
        (("stage1/layers", "stage1/embed", "stage1/layer/mlp"), (1,), (2,)),
        (("window_h", "window_w", "stage1/embed", "stage2/embed"), (0, 1, 2), (3,)),
        (("layers", "embed", "layer/heads", "layer/head_dim"), (1,), (2, 3)),
        (("layers", "layer/heads", "layer/head_dim", "embed"), (1, 2), (3,)),
        (("layers", "layer/experts", "embed", "layer/mlp"), (2,), (3,)),
        (("layers", "layer/directions", "layer/inner", "layer/rank"), (2,), (3,)),
    ],
)
def test_muon_takes_the_matrices_of_the_axis_names(axes, inputs, outputs):
    assert matrix_axes(axes, Kind.MATRIX) == optax.contrib.MuonDimensionNumbers(inputs, outputs)


@pytest.mark.parametrize(
    "axes",
    [
        ("stage2/embed", "classes"),
        ("window_h", "window_w", "image", "embed"),
        ("embed", "layer/experts"),
        ("embed", "layer/experts", "layer/slots"),
        ("domains", "embed"),
    ],
)
def test_muon_leaves_what_is_no_hidden_matrix_to_adam(axes):
    assert matrix_axes(axes, Kind.MATRIX) is None


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.MATRIX])
def test_muon_leaves_every_other_kind_to_adam(kind):
    assert matrix_axes(("embed", "layer/mlp"), kind) is None


def test_biases_of_experts_are_not_decayed():
    axes = {"up": ("experts", "embed", "mlp"), "up_bias": ("experts", "mlp"), "router": ("embed", "experts")}
    kinds = {"up": Kind.MATRIX, "up_bias": Kind.BIAS, "router": Kind.MATRIX}
    start = {k: jnp.ones([3] * len(v)) for k, v in axes.items()}
    optimizer = make_optimizer(
        dataclasses.replace(BASE, name="sgd", momentum=0.0, nesterov=False), optax.constant_schedule(0.1), axes, kinds
    )
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, start), optimizer.init(start), start)
    assert not updates["up_bias"].any() and updates["up"].all() and updates["router"].all()


def test_muon_orthogonalises_each_stacked_layer_and_is_adam_elsewhere():
    axes = {"up": ("s/layers", "s/embed", "s/layer/mlp"), "bias": ("s/layers", "s/layer/mlp")}
    start = {"up": jnp.zeros((2, 12, 30)), "bias": jnp.zeros((2, 30))}
    grads = {k: jax.random.normal(jax.random.key(len(k)), v.shape) for k, v in start.items()}
    config = dataclasses.replace(BASE, name="muon", weight_decay=0.0)
    optimizer = make_optimizer(config, optax.constant_schedule(0.1), axes, {"up": Kind.MATRIX, "bias": Kind.BIAS})
    updates, _ = optimizer.update(grads, optimizer.init(start), start)
    for layer, gradient in zip(updates["up"], grads["up"], strict=True):
        u, _, v = jnp.linalg.svd(-gradient, full_matrices=False)
        inside = jnp.diag(u.T @ layer @ v.T) / (0.1 * MUON_RMS * 30**0.5)
        assert float(inside.min()) > 0.6 and float(inside.max()) < 1.3  # five Newton-Schulz steps bring them near one
        np.testing.assert_allclose(jnp.sqrt(jnp.square(layer).mean()), 0.1 * MUON_RMS, rtol=0.2)
    adam = optax.adam(0.1, b1=0.9, b2=0.99, nesterov=True)
    expected, _ = adam.update({"bias": grads["bias"]}, adam.init({"bias": start["bias"]}))
    np.testing.assert_allclose(updates["bias"], expected["bias"], rtol=1e-5)


def test_lion_holds_half_of_adamw_s_state():
    schedule = optax.constant_schedule(0.01)
    moments = {
        n: state_bytes(make_optimizer(dataclasses.replace(BASE, name=n), schedule, AXES, KINDS).init(params()))
        for n in ("lion", "adamw")
    }
    counters = 2 * 4  # the schedule's and the optimizer's step counters
    assert moments["lion"] - counters == 20 * 4 and moments["adamw"] - counters == 2 * 20 * 4


def test_lion_trace_of_the_sheet():
    """theta 1, lr 0.1, decay 0.5, gradients 1, -0.05, -2 (facts: section 5.13)."""
    config = dataclasses.replace(BASE, decay_rules=((".*", 1.0),))
    optimizer = make_optimizer(config, optax.constant_schedule(0.1), {"w": ("embed",)}, {"w": Kind.BIAS})
    p, out = {"w": jnp.ones(1)}, []
    state = optimizer.init(p)
    for g in (1.0, -0.05, -2.0):
        updates, state = optimizer.update({"w": jnp.array([g])}, state, p)
        p = optax.apply_updates(p, updates)
        out.append(float(p["w"][0]))
    np.testing.assert_allclose(out, [0.85, 0.7075, 0.772125], rtol=1e-6)


def test_learning_rate_rules_scale_updates():
    config = dataclasses.replace(BASE, weight_decay=0.0, lr_rules=(("mlp$", 0.1), (".*", 1.0)))
    axes = {"a/kernel": ("stage1/layer/mlp", "stage1/embed"), "a/bias": ("stage1/layer/mlp",)}
    optimizer = make_optimizer(config, optax.constant_schedule(1.0), axes, KINDS)
    updates, _ = optimizer.update(gradients(0), optimizer.init(params()), params())
    assert np.allclose(np.abs(updates["a/bias"]), 0.1) and np.allclose(np.abs(updates["a/kernel"]), 1.0)


def test_a_rule_that_no_parameter_meets_is_an_error():
    with pytest.raises(
        UserError, match=r"optim.lr_rules: 'hed\$' is found in no parameter; they read like 'a/kernel\|"
    ):
        make_optimizer(
            dataclasses.replace(BASE, lr_rules=(("hed$", 0.1), (".*", 1.0))), optax.constant_schedule(0.01), AXES, KINDS
        )


def test_rules_are_about_the_whole_model_where_a_phase_trains_a_part():
    config = dataclasses.replace(BASE, lr_rules=(("bias", 0.0), (".*", 1.0)))
    optimizer = make_optimizer(config, optax.constant_schedule(0.01), AXES, KINDS, ["a/kernel"])
    own = {"a/kernel": params()["a/kernel"]}
    updates, _ = optimizer.update(own, optimizer.init(own), own)
    assert set(updates) == {"a/kernel"}


def test_uncovered_parameter_is_an_error():
    with pytest.raises(UserError, match=r"optim.decay_rules: no rule covers a/bias\|stage1/layer/mlp"):
        resolve((("kernel", 1.0),), AXES, "optim.decay_rules")
    with pytest.raises(UserError, match="regular expression"):
        resolve((("(", 1.0),), AXES, "optim.decay_rules")


def test_first_rule_wins_and_stack_axes_do_not_count():
    found = resolve(((r"\|[^,]*$", 0.0), (".*", 1.0)), AXES, "x")
    assert found == {"a/kernel": 1.0, "a/bias": 0.0}


def test_cosine_power_values_of_the_sheet():
    found = {p: [float(cosine_power(0.1, 5, p, 0.001)(i)) for i in range(5)] for p in (1, 10)}
    np.testing.assert_allclose(found[10], [0.1, 0.05050510, 0.01812803, 0.00446511, 0.001], atol=2e-8)
    np.testing.assert_allclose(found[1], [0.1, 0.07263707, 0.03881464, 0.01145171, 0.001], atol=2e-8)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "cosine_power"])
def test_schedule_warms_up_then_falls(kind):
    schedule = make_schedule(kind, peak=1.0, total=100, warmup=10, final=0.1)
    values = [float(schedule(i)) for i in range(100)]
    np.testing.assert_allclose(values[:10], np.arange(1, 11) / 11, rtol=1e-5)
    assert values[10] == pytest.approx(1.0, abs=1e-6)
    assert all(b <= a + 1e-7 for a, b in itertools.pairwise(values[10:]))
    assert values[-1] == pytest.approx(1.0 if kind == "constant" else 0.1, abs=0.02)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "cosine_power"])
@pytest.mark.parametrize("total, warmup", [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (7, 1), (7, 6), (7, 7)])
def test_schedules_of_odd_lengths_stay_between_their_ends(kind, total, warmup):
    schedule = make_schedule(kind, peak=1.0, total=total, warmup=warmup, final=0.1, order=10.0)
    values = [float(schedule(i)) for i in range(total + 1)]
    assert np.isfinite(values).all() and all(0.1 - 1e-6 <= v <= 1 + 1e-6 for v in values[min(warmup, total) :])
    np.testing.assert_allclose(values[:warmup], np.arange(1, warmup + 1) / (warmup + 1), rtol=1e-6)
    if warmup < total:
        assert values[warmup] == pytest.approx(1.0, abs=1e-6)


def test_cosine_power_near_order_one_is_plain_cosine():
    near, plain = cosine_power(1.0, 50, 1 + 1e-6), cosine_power(1.0, 50, 1.0)
    np.testing.assert_allclose([float(near(i)) for i in range(50)], [float(plain(i)) for i in range(50)], atol=2e-6)
    assert all(np.isfinite(float(cosine_power(1.0, 5, 1e6)(i))) for i in range(5))


def test_schedule_errors():
    with pytest.raises(UserError, match="valid: cosine, linear, constant, cosine_power"):
        make_schedule("cos", peak=1.0, total=10)
    with pytest.raises(UserError, match="warmup of 11 updates does not fit in a run of 10"):
        make_schedule("cosine", peak=1.0, total=10, warmup=11)


def test_clipping_bounds_the_global_norm():
    config = dataclasses.replace(BASE, name="sgd", momentum=0.0, nesterov=False, weight_decay=0.0, clip_norm=0.5)
    optimizer = make_optimizer(config, optax.constant_schedule(1.0), AXES, KINDS)
    updates, _ = optimizer.update(gradients(0), optimizer.init(params()), params())
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5, rel=1e-5)
