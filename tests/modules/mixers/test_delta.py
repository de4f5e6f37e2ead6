"""DeltaNet and Gated DeltaNet: their implementations, an independent recurrence, published counts, sub-networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.modules.mixers.delta import DeltaNet, GatedDeltaNet, a_log_init
from research.modules.ssm import dt_bias_init
from research.modules.state import abstract, apply
from tests.modules.mixers.agreement import check_forms, check_shrink, num_params
from tests.modules.mixers.recurrent import (
    Alone,
    check_recurrent,
    check_slices,
    convolved,
    heads,
    recurrence,
    rms,
    run,
    run_steps,
    sigmoid,
    silu,
    weights,
)
from tests.ops.compare import assert_agree

SPECS = {
    "deltanet": DeltaNet(num_heads=2),
    "deltanet with a gate": DeltaNet(num_heads=2, use_gate=True, allow_neg_eigval=True),
    "gated_deltanet": GatedDeltaNet(num_heads=2),
}


def unit(x):
    return x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6)


def twin(spec, w, x):
    q, k, v = (silu(convolved(heads(x, w[name]), w[f"{name}_conv/kernel"])) for name in "qkv")
    beta = sigmoid(x @ w["beta"]) * (2 if spec.allow_neg_eigval else 1)
    decay = (
        np.exp(-np.exp(w["a_log"]) * np.log1p(np.exp(x @ w["decay"] + w["dt_bias"])))[..., None]
        if "decay" in w
        else 1.0
    )
    y = rms(recurrence(unit(q) / np.sqrt(q.shape[-1]), unit(k), v, decay=decay, beta=beta), w["norm/scale"])
    y = y * silu(heads(x, w["gate"])) if "gate" in w else y
    return np.einsum("bthv,hvd->btd", y, w["out"])


@pytest.mark.parametrize("name", ["deltanet with a gate", pytest.param("gated_deltanet", marks=pytest.mark.slow)])
def test_implementations_agree_and_follow_the_recurrence(name):
    w, x, y = check_recurrent(SPECS[name], 16, 5, gradients=name == "gated_deltanet")
    assert_agree(y, twin(SPECS[name], w, x), 1e-5)


def test_the_plain_delta_rule_follows_the_recurrence():
    config = Alone(SPECS["deltanet"], 16, 5)
    arrays, x = weights(config), np.random.default_rng(0).normal(size=(2, 5, 16))
    w = {k: np.asarray(v, np.float64) for k, v in arrays[0].items()}
    assert "gate" not in w and "decay" not in w
    assert_agree(run(config, arrays, jnp.asarray(x, jnp.float32))[0], twin(config.spec, w, x), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 3, 65, 128])
@pytest.mark.parametrize("name", SPECS)
def test_implementations_agree_at_other_lengths(name, length):
    check_forms(SPECS[name], 16, length)


@pytest.mark.parametrize("dim, count, total", [(1024, 8, 374_362_112), (2048, 16, 1_365_677_056)])
def test_published_counts_of_deltanet(dim, count, total):
    hidden = {1024: 2816, 2048: 5632}[dim]
    layer = num_params(DeltaNet(num_heads=count), dim)
    assert layer == 4 * dim**2 + dim * count + 12 * dim + dim // count
    assert 24 * (layer + 3 * dim * hidden + 2 * dim) + 2 * 32000 * dim + dim == total


@pytest.mark.parametrize("dim, count, expand, total", [(1024, 4, 1, 357_781_928), (2048, 6, 2, 1_387_348_732)])
def test_published_counts_of_gated_deltanet(dim, count, expand, total):
    keys, values, hidden = 256 * count, 256 * count * expand, {1024: 2816, 2048: 5632}[dim]
    layer = num_params(GatedDeltaNet(num_heads=count, d_state=256, expand_v=expand), dim)
    formula = 2 * dim * keys + 2 * dim * values + values * dim + 2 * dim * count + 2 * count
    assert layer == formula + 4 * (2 * keys + values) + values // count
    assert 21 * (layer + 3 * dim * hidden + 2 * dim) + 2 * 32000 * dim + dim == total


def test_initial_rates_are_those_of_the_paper():
    rates, steps = (np.asarray(init(jax.random.key(0), (4096,), jnp.float32)) for init in (a_log_init, dt_bias_init))
    rates, steps = np.exp(rates), np.log1p(np.exp(steps))
    assert rates.min() >= 0.0099 and rates.max() <= 16.001 and 7.8 < rates.mean() < 8.2
    assert steps.min() >= 1e-4 and steps.max() <= 0.1001 and -2.05 < np.log10(steps).mean() < -1.95
    assert abstract(Alone(GatedDeltaNet(), 16, 4)).precise == {"a_log", "dt_bias"}


def test_writing_twice_stores_the_value_exactly():
    """beta 1 and unit keys: what a key recalls is its value, and writing it again changes nothing."""
    config = Alone(DeltaNet(num_heads=1, d_state=3, head_dim=2, d_conv=1), 4, 4)
    params = {k: jnp.zeros(a.shape) for k, a in abstract(config).params.items()}
    for name, size in {"q": 3, "k": 3, "v": 2}.items():
        params[name] = jnp.eye(4)[:, None, :size]
        params[f"{name}_conv/kernel"] = jnp.ones((1, 1, size))
    params["beta"] = jnp.full((4, 1), 100.0)
    x = jnp.asarray([[1.0, 2.0, 3.0, 1.0], [1.0, 2.0, 3.0, 1.0], [3.0, 0.5, 1.0, 1.0], [3.0, 0.5, 1.0, 1.0]])
    state, memories = apply(config, params, {}, 1, 4, method="init_state")[0], []
    for t in range(4):
        state = run_steps(config, (params, {}), x[None, t : t + 1], state, jnp.int32(t))[1]
        memories.append(np.asarray(state["memory"][0, 0]))
        key, value = unit(silu(np.asarray(x[t, :3]))), silu(np.asarray(x[t, :2]))
        np.testing.assert_allclose(memories[t].T @ key, value, atol=1e-5)
    np.testing.assert_allclose(memories[1], memories[0], atol=1e-5)
    np.testing.assert_allclose(memories[3], memories[2], atol=1e-5)
    assert np.abs(memories[2] - memories[1]).max() > 0.1


@pytest.mark.parametrize("name", SPECS)
def test_smaller_selves_are_leading_slices(name):
    spec = {
        "deltanet": DeltaNet(),
        "deltanet with a gate": DeltaNet(use_gate=True),
        "gated_deltanet": GatedDeltaNet(expand_k=1.0),
    }[name]
    small = check_shrink(spec, 32, 16, state=0.5, cut=("embed", "layer/heads", "layer/state"))
    assert (small.num_heads, small.d_state, small.head_dim) == (2, 4, 16 if name == "gated_deltanet" else 8)
    assert check_slices(spec, 32, 16, small)["k_conv/kernel"] == (4, 2, 4)


@pytest.mark.slow
def test_reduced_precision_keeps_the_memory_wide():
    config = Alone(GatedDeltaNet(num_heads=2), 16, 8)
    params, _ = weights(config)
    half = {k: v if k in ("a_log", "dt_bias") else v.astype(jnp.bfloat16) for k, v in params.items()}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 16)), jnp.float32)
    y, state = run(config, (half, {}), x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and state["memory"].dtype == jnp.float32 and state["conv"].dtype == jnp.bfloat16
    exact = run(config, (params, {}), x)[0]
    assert float(jnp.abs(y.astype(jnp.float32) - exact).max()) < 0.1 * float(jnp.abs(exact).max())
