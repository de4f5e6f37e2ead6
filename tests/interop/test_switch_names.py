"""A sparse block of transformers' Switch: in and out, places counted along each sequence, live parity with its
gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.interop.switch_names import switch_from_foreign, switch_to_foreign
from research.modules.axes import Init
from research.modules.mixers.base import Call
from research.modules.moe import MoeFfn
from research.modules.state import merge, split
from tests.models.twins import fast_jit

EXPERTS, DIM, HIDDEN, BATCH, LENGTH = 4, 6, 10, 3, 12
PREFIX = "encoder.block.1.layer.1.mlp."


def block(seed=0, prefix=""):
    rng = np.random.default_rng(seed)
    shapes = {"router.classifier.weight": (EXPERTS, DIM)}
    for j in range(EXPERTS):
        shapes |= {f"experts.expert_{j}.wi.weight": (HIDDEN, DIM), f"experts.expert_{j}.wo.weight": (DIM, HIDDEN)}
    return {prefix + name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def tokens(seed=1):
    return np.random.default_rng(seed).standard_normal((BATCH, LENGTH, DIM)).astype(np.float32)


def run(spec, params, x, weights):
    """Returns (output, gradients of the sum of output times weights)."""
    graphdef, shapes, stats, _ = split(MoeFfn(spec, DIM, ("embed", "layer/mlp"), "layer", Init(jax.random.key(0))))
    assert {name: w.shape for name, w in shapes.items()} == {name: w.shape for name, w in params.items()}

    def total(params):
        y = merge(graphdef, params, stats)(jnp.asarray(x), Call())
        return (weights * y).sum(), y

    (_, y), grads = fast_jit(jax.value_and_grad(total, has_aux=True))(params)
    return np.asarray(y), grads


def token_by_token(state, x, capacity):
    """The block in float64: each sequence fills the places of its experts from its first token on."""
    w = {name: value.astype(np.float64) for name, value in state.items()}
    y, free = np.zeros(x.shape), np.full((len(x), EXPERTS), capacity)
    for b, t in np.ndindex(x.shape[:2]):
        logits = w["router.classifier.weight"] @ x[b, t]
        p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        j = int(p.argmax())
        if free[b, j]:
            free[b, j] -= 1
            y[b, t] = p[j] * (
                w[f"experts.expert_{j}.wo.weight"] @ np.maximum(w[f"experts.expert_{j}.wi.weight"] @ x[b, t], 0)
            )
    return y


@pytest.mark.parametrize("capacity", [pytest.param(64, marks=pytest.mark.slow), 2, 1])
def test_each_sequence_has_its_own_places(capacity):
    state, x = block(), tokens()
    spec, params = switch_from_foreign(state, expert_capacity=capacity)
    y, _ = run(spec, params, x, np.ones_like(x))
    expected = token_by_token(state, x, capacity)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    gone = (expected == 0).all(-1).sum()
    assert (gone == 0) == (capacity == 64) and (y[(expected == 0).all(-1)] == 0).all()


def test_round_trips_are_bitwise():
    state = block(prefix=PREFIX)
    spec, params = switch_from_foreign({**state, "shared.weight": np.zeros((3, 3))}, PREFIX, expert_capacity=5)
    assert (spec.num_experts, spec.num_experts_per_tok, spec.ffn_dim, spec.expert, spec.renormalize) == (
        EXPERTS,
        1,
        HIDDEN,
        "relu",
        False,
    )
    again = switch_to_foreign(spec, params, PREFIX)
    assert again.keys() == state.keys()
    for name, w in state.items():
        np.testing.assert_array_equal(again[name], w, strict=True, err_msg=name)


def test_what_does_not_fit_is_named():
    state = block()
    with pytest.raises(UserError, match=r"1 missing \(experts.expert_2.wo.weight\)"):
        switch_from_foreign({name: w for name, w in state.items() if name != "experts.expert_2.wo.weight"})
    with pytest.raises(
        UserError, match=r"fit 4 experts of 10 hidden units for 6 channels: 1 unknown \(router.classifier.bias\)"
    ):
        switch_from_foreign({**state, "router.classifier.bias": np.zeros(4)})
    with pytest.raises(UserError, match=r"experts.expert_1.wi.weight is \(7, 6\), needs \(10, 6\)"):
        switch_from_foreign({**state, "experts.expert_1.wi.weight": np.zeros((7, 6))})
    with pytest.raises(UserError, match="router.classifier.weight is missing or no matrix; give the prefix"):
        switch_from_foreign(block(prefix=PREFIX))
    with pytest.raises(UserError, match="expert_capacity=0; valid: whole numbers from 1"):
        switch_from_foreign(state, expert_capacity=0)
    spec, params = switch_from_foreign(state)
    with pytest.raises(UserError, match="switch has no place for moe.num_experts_per_tok=2; valid: 1"):
        switch_to_foreign(dataclasses.replace(spec, num_experts_per_tok=2), params)


@pytest.mark.parametrize("capacity", [64, 2, 1])
def test_transformers_agrees_with_its_gradients(capacity):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.SwitchTransformersConfig(
        d_model=DIM, d_ff=HIDDEN, num_experts=EXPERTS, expert_capacity=capacity
    )
    theirs = transformers.models.switch_transformers.modeling_switch_transformers.SwitchTransformersSparseMLP(
        config
    ).eval()
    state, x, weights = block(), tokens(), tokens(2)
    theirs.load_state_dict({name: torch.tensor(w) for name, w in state.items()})
    expected = theirs(torch.tensor(x))
    (torch.tensor(weights) * expected).sum().backward()
    expected = expected.detach().numpy()
    assert (expected == 0).all(-1).any() == (capacity < 64), "this release does not bind the capacity"
    spec, params = switch_from_foreign(
        {name: w.detach().numpy() for name, w in theirs.state_dict().items()}, expert_capacity=capacity
    )
    y, grads = run(spec, params, x, weights)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    grads = switch_to_foreign(spec, grads)
    for name, p in theirs.named_parameters():
        expected = np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        np.testing.assert_allclose(
            grads[name], expected, rtol=0, atol=1e-5 * max(np.abs(expected).max(), 1), err_msg=name
        )
