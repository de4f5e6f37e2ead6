"""Small modules and the axis names: norms against numpy, guards, keys, stacks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.errors import UserError
from research.modules.attention import Attention
from research.modules.axes import Init, Kind, layer_stack, role
from research.modules.layers import Linear, normal_02, zeros
from research.modules.norms import GeluGRN, LayerNorm
from research.modules.state import Stack, abstract, merge, rematerialize, split

INIT = Init(jax.random.key(0))


def test_roles_and_stacks_of_names():
    assert role("stage2/layer/phase0/mlp") == "mlp" and role("embed") == "embed"
    assert layer_stack("stage2/layer/phase0/mlp") == "stage2/layers" and layer_stack("layer/heads") == "layers"
    assert layer_stack("stage2/embed") is None and layer_stack("stage2/block0/first/bottleneck") is None


def test_arrays_need_known_names_one_per_axis():
    with pytest.raises(ValueError, match=r"unknown axis role in \['width'\]; near: .* \(all: "):
        INIT.param("kernel", (3, 4), ("embed", "width"), zeros, Kind.MATRIX)
    with pytest.raises(ValueError, match="2 axes need as many names"):
        INIT.param("kernel", (3, 4), ("embed",), zeros, Kind.BIAS)


def test_keys_differ_between_tags_and_layers_and_repeat():
    draw = lambda init: np.asarray(init.param("w", (4,), ("embed",), normal_02, Kind.GAIN)[...])
    assert (draw(INIT.child("a")) == draw(INIT.child("a"))).all() and not (
        draw(INIT.child("a")) == draw(INIT.child("b"))
    ).any()
    stacked = INIT.stacked(3, "layers").param("w", (4,), ("embed",), normal_02, Kind.GAIN)
    assert stacked[...].shape == (3, 4) and stacked.axes == ("layers", "embed") and len(np.unique(stacked[...])) == 12


def test_layer_norm_and_grn_against_numpy():
    x = np.random.default_rng(0).normal(3, 2, (2, 5, 4, 6)).astype(np.float32)
    y = LayerNorm(6, "embed", INIT)(jnp.asarray(x))
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    gelu = jax.nn.gelu(jnp.asarray(x), approximate=False)
    np.testing.assert_allclose(GeluGRN(6, "embed", INIT)(jnp.asarray(x)), gelu, atol=1e-6)  # with scale and bias zero


def test_grn_of_zeros_is_its_bias_with_finite_gradients():
    grn = GeluGRN(4, "embed", INIT)
    grn.scale[...], grn.bias[...] = jnp.ones(4), jnp.arange(4.0)
    x = jnp.ones((1, 3, 3, 4)).at[..., 1].set(0)
    np.testing.assert_array_equal(grn(jnp.zeros_like(x)), np.broadcast_to(np.arange(4.0), x.shape))
    for at in (x, jnp.zeros_like(x)):
        assert np.isfinite(jax.grad(lambda x: grn(x).sum())(at)).all()


@pytest.mark.slow
def test_attention_scale_is_that_of_one_head_and_heads_are_a_sum():
    """Fewer heads give the sum over fewer heads: a leading slice of heads is a smaller attention."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 12)), jnp.float32)
    graphdef, params, stats, axes = split(Attention(12, 3, 4, "embed", "layer", Init(jax.random.key(1))))
    params = {k: 10 * v + 0.1 for k, v in params.items()}
    assert sum(v.size for v in params.values()) == 4 * 12 * 3 * 4 + 3 * 3 * 4 + 12

    def heads(keep):
        graph, _, _, _ = split(Attention(12, len(keep), 4, "embed", "layer", INIT))
        take = lambda k, v: (
            jnp.take(v, jnp.array(keep), axes[k].index("layer/heads")) if "layer/heads" in axes[k] else v
        )
        cut = {k: take(k, v) for k, v in params.items()}
        return merge(graph, cut, stats)(x) - params["out/bias"]

    np.testing.assert_allclose(heads([0, 1, 2]), heads([0, 1]) + heads([2]), rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(heads([0, 1, 2]), merge(graphdef, params, stats)(x) - params["out/bias"], rtol=1e-5)


class Layer(nnx.Module):
    """tanh(x W + b) + shift, for the tests of Stack."""

    def __init__(self, init: Init):
        self.linear = Linear(
            3, 3, ("embed", "embed"), init.child("linear"), kernel_init=jax.nn.initializers.normal(1.0)
        )

    def __call__(self, x, shift, *, gain):
        return jnp.tanh(gain * self.linear(x)) + shift


def test_stack_is_a_loop_over_its_layers():
    shifts = jnp.array([0.1, -0.2, 0.3])
    x = jnp.ones((2, 3))
    outs = [
        Stack(Layer, 3, "layers", INIT, unroll=u)(x, xs=shifts, remat=r, gain=2.0)
        for u in (False, True)
        for r in ("none", "dots")
    ]
    stack = Stack(Layer, 3, "layers", INIT)
    y = np.ones((2, 3))
    for kernel, shift in zip(np.asarray(stack.layer.linear.kernel[...]), np.asarray(shifts), strict=True):
        y = np.tanh(2 * y @ kernel) + shift
    for out in outs:
        np.testing.assert_allclose(out, y, rtol=1e-5)


def test_unknown_remat_policy_names_the_valid_ones():
    with pytest.raises(
        ValueError, match=r"unknown remat policy 'all'; valid: \['dots', 'dots_no_batch', 'full', 'none'\]"
    ):
        rematerialize(functools.partial(max), "all")


@dataclasses.dataclass(frozen=True)
class Swapped:
    """Two matrices, the axes of one of which may be swapped."""

    axes: tuple[str, str]

    def build(self, init):
        module = nnx.Module()
        module.first = init.param("first", (4, 6), ("embed", "inner"), zeros, Kind.MATRIX)
        module.second = init.param("second", (4, 6), self.axes, zeros, Kind.MATRIX)
        return module

    def kept(self):
        return {}


def test_axes_of_one_name_have_one_size():
    assert abstract(Swapped(("embed", "inner"))).num_params() == 48
    told = r"axis inner has 6 entries in first \[embed=4, inner=6\] and 4 in second \[inner=4, embed=6\]"
    with pytest.raises(UserError, match=told):
        abstract(Swapped(("inner", "embed")))
    assert abstract(Swapped(("kernel_h", "kernel_w"))).num_params() == 48  # each kernel has its own
