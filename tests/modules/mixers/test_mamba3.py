"""Mamba-3's mixer: its implementations against each other, its equations in numpy, published counts, sub-networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.modules.mixers.mamba3 import Mamba3, heavy
from tests.modules.mixers.agreement import Functions, check_forms, check_shrink, num_params
from tests.ops.compare import assert_agree, draw

SMALL = Mamba3(d_state=8, head_dim=4, ngroups=2)
MIMO = Mamba3(d_state=8, head_dim=4, mimo_rank=2)


@pytest.mark.parametrize("length", [1, pytest.param(65, marks=pytest.mark.slow)])
def test_implementations_agree(length):
    check_forms(SMALL, 8, length, naive=length == 65)


@pytest.mark.slow
def test_implementations_with_several_inputs_and_outputs_agree():
    check_forms(MIMO, 8, 9, naive=False, packing=False)


@pytest.mark.parametrize("rank", [1, 2])
def test_against_its_equations(rank):
    """A loop over time in numpy with complex numbers for the rotated pairs."""
    spec = Mamba3(d_state=6, head_dim=2, ngroups=2, expand=1.0, mimo_rank=rank, num_rope_angles=2, a_floor=0.6)
    mixer = Functions(spec, 8, 7)
    w = {k: np.asarray(v, np.float64) for k, v in mixer.weights[0].items()}
    x = draw((7, 8), 1)
    project = lambda name: np.einsum("td,d...->t...", x, w[name])
    unit = lambda a: a / np.sqrt(np.square(a).mean(-1, keepdims=True) + 1e-5)
    maps = {n: (unit(project(n)) * w[f"{n}_norm/scale"])[..., None, :] + w[f"{n}_bias"] for n in "bc"}
    delta, mix = np.logaddexp(0, project("dt") + w["dt_bias"]), 1 / (1 + np.exp(-project("mix")))
    raw = project("decay")
    rate = np.where(raw >= 0, 1 + raw, 1 / (1 - np.minimum(raw, 0)))
    assert (rate < 0.6).any() and (rate > 0.6).any()
    decay = np.exp(-np.maximum(rate, 0.6) * delta)
    theta = np.cumsum(np.pi * np.tanh(project("angle"))[:, None, None] * delta[..., None], 0)

    def turned(a, t):
        pairs = (a[..., 0:4:2] + 1j * a[..., 1:4:2]) * np.exp(1j * theta[t])
        return np.concatenate([np.stack([pairs.real, pairs.imag], -1).reshape(*a.shape[:-1], 4), a[..., 4:]], -1)

    silu = lambda a: a / (1 + np.exp(-a))
    spread = lambda a, name: a[:, None] * w[name] if rank > 1 else a[:, None]
    inputs, gates = spread(project("x"), "spread_x"), spread(project("z"), "spread_z")
    gather = w["gather"] if rank > 1 else np.ones((1, 1, 1, 1))
    state, last, out = np.zeros((2, 2, 2, 6)), 0, []
    for t in range(7):
        write = np.einsum("rghp,rghn->ghpn", inputs[t], turned(maps["b"][t], t))
        wide = lambda a: a[..., None, None]
        state = wide(decay[t]) * (state + wide((1 - mix[t]) * delta[t]) * last) + wide(mix[t] * delta[t]) * write
        last = write
        y = np.einsum("ghpn,rghn->rghp", state, turned(maps["c"][t], t)) + w["skip"][..., None] * inputs[t]
        out.append(np.einsum("rghp,ghpd->d", y * silu(gates[t]) * gather, w["out"]))
    y, final = mixer.call(mixer.weights, jnp.asarray(x)[None])
    assert_agree(y[0], np.stack(out), 1e-5)
    assert_agree(final["ssm"][0].reshape(state.shape), state, 1e-5)


@pytest.mark.parametrize(
    ("dim", "rank", "count"),
    [
        (768, 1, 3_821_872),
        (768, 4, 4_448_560),
        (1024, 1, 6_693_184),
        (1024, 4, 7_528_768),
        (2048, 1, 26_165_632),
        (2048, 4, 27_836_800),
    ],
)
def test_published_counts(dim, rank, count):
    assert num_params(Mamba3(mimo_rank=rank), dim) == count


@pytest.mark.slow
def test_initialisation_is_the_released_one():
    weights = Functions(Mamba3(d_state=8, head_dim=2, mimo_rank=2), 256, 8, redraw=False).weights[0]
    steps = np.log1p(np.exp(weights["dt_bias"])).ravel()
    assert 1e-3 * 0.99 < steps.min() < 2e-3 and 0.07 < steps.max() < 0.101
    ones = ("b_bias", "c_bias", "b_norm/scale", "skip", "spread_z")
    assert all((np.asarray(weights[name]) == 1).all() for name in ones)
    assert (np.asarray(weights["spread_x"]) == 0.5).all() and (np.asarray(weights["gather"]) == 0.5).all()
    for name, bound in {"x": 1 / 16, "b": 1 / 16, "angle": 1 / 16, "decay": 1 / 16, "out": 512**-0.5}.items():
        largest = float(jnp.abs(weights[name]).max())
        assert 0.9 * bound < largest <= bound * (1 + 1e-6), name


def test_smaller_selves():
    small = check_shrink(SMALL, 32, 16, cut=("embed", "layer/heads"))
    assert (small.num_heads, small.d_state, small.num_rope_angles) == (8, 8, 2)
    cut = ("layer/heads", "layer/state", "layer/angles")
    small = check_shrink(MIMO, 16, 16, width=1.0, heads=2, state=0.5, cut=cut)
    assert (small.num_heads, small.d_state, small.num_rope_angles, small.mimo_rank) == (2, 4, 1, 2)


def test_heavy_tail_and_its_gradient():
    x = jnp.array([-3.0, -1.0, 0.0, 1.0, 2.0])
    np.testing.assert_allclose(heavy(x), [0.25, 0.5, 1, 2, 3])
    np.testing.assert_allclose(jax.vmap(jax.grad(heavy))(x), [1 / 16, 1 / 4, 1, 1, 1])


def test_bad_options_are_named():
    with pytest.raises(UserError, match="mixer mamba3: num_rope_angles=5; valid: 1 to 4, half of d_state=8"):
        Mamba3(d_state=8, head_dim=4, num_rope_angles=5).resolve(16)
    with pytest.raises(UserError, match="mimo_rank=0; valid: whole numbers from 1"):
        Mamba3(head_dim=4, mimo_rank=0).resolve(16)
    with pytest.raises(UserError, match="state=1 leaves one feature"):
        SMALL.resolve(16).shrink(1.0, None, 1)
