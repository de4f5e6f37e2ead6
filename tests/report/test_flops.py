"""FLOP counts against numbers computed by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from research.report.flops import count_flops, count_macs, flops_by_primitive


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def conv(x, w, stride=1, **kwargs):
    kwargs = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")} | kwargs
    return lax.conv_general_dilated(x, w, (stride, stride), **kwargs)


def test_dense_counts_two_per_multiply_add_and_no_bias():
    fn = lambda x, w, b: jax.nn.relu(x @ w + b)
    args = array(5, 73), array(73, 256), array(256)
    assert count_flops(fn, *args) == 2 * 5 * 73 * 256
    assert count_macs(fn, *args) == 5 * 73 * 256


def test_batched_attention_scores():
    fn = lambda q, k: jnp.einsum("blhd,bmhd->bhlm", q, k)
    assert count_flops(fn, array(2, 7, 3, 5), array(2, 11, 3, 5)) == 2 * (2 * 3 * 7 * 11 * 5)


def test_complex_multiply_add_is_four_real_ones():
    args = array(3, 4, dtype=jnp.complex64), array(4, 5, dtype=jnp.complex64)
    assert count_flops(jnp.matmul, *args) == 8 * 3 * 4 * 5


@pytest.mark.parametrize(
    "x, w, kwargs, macs",
    [
        ((2, 9, 9, 4), (3, 3, 4, 6), {}, 2 * 9 * 9 * 6 * 4 * 9),
        ((2, 9, 9, 4), (3, 3, 4, 6), {"stride": 2}, 2 * 5 * 5 * 6 * 4 * 9),
        ((2, 9, 9, 4), (3, 3, 4, 6), {"padding": "VALID"}, 2 * 7 * 7 * 6 * 4 * 9),
        ((2, 9, 9, 4), (3, 3, 4, 6), {"rhs_dilation": (2, 2)}, 2 * 9 * 9 * 6 * 4 * 9),
        ((2, 9, 9, 4), (3, 3, 2, 6), {"feature_group_count": 2}, 2 * 9 * 9 * 6 * 2 * 9),
        ((1, 8, 8, 4), (5, 5, 1, 4), {"feature_group_count": 4}, 8 * 8 * 4 * 25),
        ((4, 8, 8, 3), (3, 3, 3, 6), {"batch_group_count": 2}, 2 * 8 * 8 * 6 * 3 * 9),
        ((1, 4, 4, 3), (2, 2, 3, 5), {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))}, 4 * 4 * 3 * 5 * 4),
    ],
    ids=["same", "stride", "valid", "dilated", "groups", "depthwise", "batch groups", "transposed"],
)
def test_conv(x, w, kwargs, macs):
    assert count_flops(lambda x, w: conv(x, w, **kwargs), array(*x), array(*w)) == 2 * macs


@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_conv_gradient_costs_three_forwards(stride, groups):
    loss = lambda x, w: conv(x, w, stride, feature_group_count=groups).sum()
    args = array(2, 8, 8, 4), array(3, 3, 4 // groups, 8)
    assert count_flops(jax.grad(loss, (0, 1)), *args) == 3 * count_flops(loss, *args)


def test_dense_gradient_costs_three_forwards():
    loss = lambda x, w: jnp.sum((x @ w) ** 2)
    args = array(5, 7), array(7, 11)
    assert count_flops(jax.value_and_grad(loss, (0, 1)), *args) == 3 * 2 * 5 * 7 * 11
    assert count_flops(jax.value_and_grad(loss, 1), *args) == 2 * 2 * 5 * 7 * 11


def test_scan_multiplies_by_length_and_nests():
    step = lambda carry, w: (jnp.tanh(carry @ w), None)
    inner = lambda x, ws: lax.scan(step, x, ws)[0]
    outer = lambda x, ws: lax.fori_loop(0, 3, lambda i, x: inner(x, ws), x)
    assert count_flops(inner, array(2, 4), array(6, 4, 4)) == 6 * 2 * 2 * 4 * 4
    assert count_flops(outer, array(2, 4), array(6, 4, 4)) == 3 * 6 * 2 * 2 * 4 * 4


def test_remat_gradient_counts_the_second_forward():
    layer = lambda x, w: jnp.tanh(x @ w)
    plain = jax.value_and_grad(lambda x, w: layer(x, w).sum(), (0, 1))
    remat = jax.value_and_grad(lambda x, w: jax.checkpoint(layer)(x, w).sum(), (0, 1))
    args = array(3, 4), array(4, 5)
    assert count_flops(plain, *args) == 3 * 2 * 3 * 4 * 5
    assert count_flops(remat, *args) == 4 * 2 * 3 * 4 * 5


def test_branches_take_the_dearest():
    cheap, dear = (lambda x: x), (lambda x: x @ x @ x)
    x, i = array(4, 4), array(dtype=jnp.int32)
    assert count_flops(lambda i, x: lax.switch(i, [cheap, dear, jnp.sin], x), i, x) == 2 * 2 * 64
    assert count_flops(lambda x: lax.platform_dependent(x, cpu=cheap, default=dear), x) == 2 * 2 * 64


def test_custom_rules_jit_and_vmap_are_entered_once():
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
    smooth = jax.custom_jvp(lambda x: x @ x)
    smooth.defjvp(lambda p, t: (smooth(*p), t[0]))
    x = array(4, 4)
    assert count_flops(square, x) == count_flops(smooth, x) == count_flops(jax.jit(jax.jit(square)), x) == 128
    assert count_flops(jax.grad(lambda x: square(x).sum()), x) == 3 * 128
    assert count_flops(jax.vmap(square), array(10, 4, 4)) == 1280


def test_while_with_work_is_an_error_and_without_is_free():
    x = array(4, 4)
    with pytest.raises(ValueError, match="while loop runs dot_general an unknown number"):
        count_flops(lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), x)
    assert count_flops(lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x) @ x, x) == 128


def test_shard_map_counts_all_shards_once():
    mesh = AbstractMesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    body = lambda x, w: x @ w
    spec = PartitionSpec("data", None)
    fn = jax.shard_map(body, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    assert count_flops(fn, array(8, 3), array(3, 5)) == 2 * 8 * 3 * 5
    spec = PartitionSpec(("data", "tensor"))
    fn = jax.shard_map(body, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    assert count_flops(fn, array(8, 3), array(3, 5)) == 2 * 8 * 3 * 5


def test_ragged_dot_meets_one_group_per_row():
    args = array(12, 4), array(3, 4, 5), array(3, dtype=jnp.int32)
    assert count_flops(lax.ragged_dot, *args) == 2 * 12 * 4 * 5
    loss = lambda x, w, sizes: lax.ragged_dot(x, w, sizes).sum()
    assert count_flops(jax.grad(loss, (0, 1)), *args) == 3 * 2 * 12 * 4 * 5


def test_fft_and_triangular_solve():
    assert count_flops(jnp.fft.fft, array(3, 8, dtype=jnp.complex64)) == 3 * 5 * 8 * 3
    assert count_flops(jnp.fft.rfft, array(3, 8)) == count_flops(jnp.fft.irfft, array(3, 5)) == 3 * 5 * 8 * 3 // 2
    solve = lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True, lower=True)
    assert count_flops(solve, array(6, 6), array(6, 2)) == 6 * 6 * 2


def test_split_by_primitive_the_dearest_first():
    def fn(v, x, w):
        return (v @ v).sum() * conv(x, w)

    counts = flops_by_primitive(fn, array(4, 4), array(1, 8, 8, 3), array(3, 3, 3, 4))
    assert counts == {"conv_general_dilated": 2 * 64 * 4 * 3 * 9, "dot_general": 2 * 64}
    assert list(counts) == ["conv_general_dilated", "dot_general"]
    assert flops_by_primitive(jnp.tanh, array(3)) == {}
