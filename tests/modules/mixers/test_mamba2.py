"""Mamba-2's mixer: its implementations against each other, its equations in numpy, published counts, initialisation,
sub-networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.modules.mixers.mamba2 import Mamba2
from tests.modules.mixers.agreement import Functions, check_forms, check_shrink, num_params
from tests.ops.compare import assert_agree, draw

SMALL = Mamba2(d_state=8, head_dim=4, ngroups=2)


@pytest.mark.parametrize("length", [1, 3, pytest.param(65, marks=pytest.mark.slow)])
def test_implementations_agree(length):
    check_forms(SMALL, 8, length, naive=length == 65, packing=length == 65)


def test_against_its_equations():
    """A loop over time in numpy, with step sizes that meet both bounds; gate first, then the norm of each group."""
    spec = Mamba2(d_state=3, head_dim=2, ngroups=2, expand=1.5, d_conv=3, dt_limit=(0.01, 0.1))
    mixer = Functions(spec, 8, 7)
    w = {k: np.asarray(v, np.float64) for k, v in mixer.weights[0].items()}
    silu, x = lambda a: a / (1 + np.exp(-a)), draw((7, 8), 1)
    project = lambda name: np.einsum("td,d...->t...", x, w[name])

    def conv(name, a):
        padded = np.concatenate([np.zeros((2, *a.shape[1:])), a])
        return silu(sum(w[f"{name}/kernel"][j] * padded[j : j + 7] for j in range(3)) + w[f"{name}/bias"])

    inputs, b, c = conv("conv_x", project("x")), conv("conv_b", project("b")), conv("conv_c", project("c"))
    raw = np.logaddexp(0, project("dt") + w["dt_bias"])
    delta = np.clip(raw, 0.01, 0.1)
    assert (raw < 0.01).any() and (raw > 0.1).any() and (delta == raw).any()
    state, out = np.zeros((2, 3, 2, 3)), []
    for t in range(7):
        write = np.einsum("ghp,gn,gh->ghpn", inputs[t], b[t], delta[t])
        state = np.exp(-delta[t] * np.exp(w["a_log"]))[..., None, None] * state + write
        y = np.einsum("ghpn,gn->ghp", state, c[t]) + w["skip"][..., None] * inputs[t]
        g = y * silu(project("z")[t])
        g = g / np.sqrt(np.square(g).mean((1, 2), keepdims=True) + 1e-5) * w["norm/scale"]
        out.append(np.einsum("ghp,ghpd->d", g, w["out"]))
    y, final = mixer.call(mixer.weights, jnp.asarray(x)[None])
    assert_agree(y[0], np.stack(out), 1e-5)
    assert_agree(final["ssm"][0].reshape(state.shape), state, 1e-5)


@pytest.mark.parametrize(
    ("dim", "depth", "count"), [(768, 24, 128_989_632), (1024, 48, 368_346_624), (2048, 48, 1_343_757_312)]
)
def test_published_counts(dim, depth, count):
    """Tied models over 50288 entries: a mixer and a norm a layer, and a last norm."""
    assert depth * (num_params(Mamba2(), dim) + dim) + 50_288 * dim + dim == count
    assert Mamba2().resolve(dim).num_heads == dim // 32


@pytest.mark.slow
def test_initialisation_is_the_released_one():
    weights = Functions(Mamba2(d_state=4, head_dim=2), 512, 8, redraw=False).weights[0]
    steps, rates = np.log1p(np.exp(weights["dt_bias"])).ravel(), np.exp(weights["a_log"]).ravel()
    assert steps.min() >= 1e-4 and 1e-3 * 0.99 < steps.min() < 1.3e-3 and 0.08 < steps.max() < 0.101
    assert abs(np.log10(steps).mean() + 2) < 0.1
    assert rates.min() >= 1 and rates.max() <= 16 and abs(rates.mean() - 8.5) < 0.8
    assert (np.asarray(weights["skip"]) == 1).all() and (np.asarray(weights["norm/scale"]) == 1).all()
    for name, bound in {
        "x": 512**-0.5,
        "dt": 512**-0.5,
        "conv_b/kernel": 0.5,
        "conv_x/bias": 0.5,
        "out": 1024**-0.5,
    }.items():
        largest = float(jnp.abs(weights[name]).max())
        assert 0.9 * bound < largest <= bound * (1 + 1e-6), name


def test_smaller_selves():
    small = check_shrink(SMALL, 32, 16, cut=("embed", "layer/heads"))
    assert (small.num_heads, small.d_state, small.ngroups, small.head_dim) == (8, 8, 2, 4)
    small = check_shrink(SMALL, 32, 32, width=1.0, heads=4, state=0.5, cut=("layer/heads", "layer/state"))
    assert (small.num_heads, small.d_state) == (4, 4)
    with pytest.raises(UserError, match="heads=3 is outside its space; valid: multiples of 2 up to 16"):
        SMALL.resolve(32).shrink(1.0, 3, None)


def test_a_slice_of_heads_is_the_sub_network():
    """With the out-projection of the heads left out at zero and every norm whole, cut heads change nothing but the
    norm."""
    spec = Mamba2(d_state=4, head_dim=2, ngroups=2).resolve(8)
    full, small = Functions(spec, 8, 5), Functions(spec.shrink(1.0, 0.5, None), 8, 5)
    cut = {name: v[tuple(slice(s) for s in small.weights[0][name].shape)] for name, v in full.weights[0].items()}
    x = jnp.asarray(draw((1, 5, 8), 0))
    _, state = full.call(full.weights, x)
    _, own = small.call((cut, full.weights[1]), x)
    kept = state["ssm"].reshape(1, 2, 4, 2, 4)[:, :, :2].reshape(1, 4, 2, 4)
    assert_agree(own["ssm"], kept, 1e-6)


def test_bad_options_are_named():
    with pytest.raises(UserError, match=r"mixer mamba2: head_dim=24 does not divide 32 inner channels \(2.0 \* 16\)"):
        Mamba2(head_dim=24).resolve(16)
    with pytest.raises(UserError, match=r"groups=3 does not divide 4 heads; valid: \[1, 2, 4\]"):
        Mamba2(head_dim=8, ngroups=3).resolve(16)
    with pytest.raises(UserError, match=r"dt_limit=\(1.0, 0.5\)"):
        Mamba2(head_dim=8, dt_limit=(1.0, 0.5)).resolve(16)


@pytest.mark.slow
def test_reduced_precision_keeps_dtype_and_wide_states():
    mixer = Functions(SMALL, 16, 12)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), mixer.weights)
    x = jnp.asarray(draw((2, 12, 16), 3))
    y, state = mixer.call(half, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and state["ssm"].dtype == jnp.float32 and state["conv"].dtype == jnp.bfloat16
    assert_agree(y, mixer.call(mixer.weights, x)[0], 5e-2)
