"""Every implementation of softmax attention against its reference implementation and the definition in float64, in
outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.ops import attention_blocks, dispatch
from research.ops.attention import IMPLEMENTATIONS, OP, block_size, softmax_attention
from tests.ops.compare import assert_agree, draw

FAST_IMPLEMENTATIONS = tuple(implementation for implementation in IMPLEMENTATIONS if implementation != "naive")


def _operands(batch, queries, keys, heads, groups, size, value_size, dtype=np.float32):
    shapes = (
        (*batch, queries, heads, size),
        (*batch, keys, groups, size),
        (*batch, keys, groups, value_size),
        (*batch, queries, heads, value_size),
    )
    return tuple(draw(shape, i, dtype) for i, shape in enumerate(shapes))


def _definition(query, key, value, visible, scale, bias=0.0):
    """Loops over heads, in float64; `visible` [*B, H, T, S]."""
    out = np.zeros((*query.shape[:-1], value.shape[-1]))
    for at in np.ndindex(query.shape[:-3]):
        for head in range(query.shape[-2]):
            group = head // (query.shape[-2] // key.shape[-2])
            logits = query[at][:, head].astype(np.float64) @ key[at][:, group].T * scale
            logits = logits + (bias if np.isscalar(bias) else bias[at][head])
            weights = np.where(visible[at][head], np.exp(logits - logits.max()), 0)
            weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
            out[at][:, head] = weights @ value[at][:, group]
    return out


@functools.partial(jax.jit, static_argnames=("causal", "implementation", "scale"))
def _outputs_and_grads(
    query, key, value, d_out, mask=None, bias=None, segment_ids=None, causal=False, implementation="auto", scale=None
):
    def attend(*arrays):
        bias = arrays[3] if len(arrays) > 3 else None
        return softmax_attention(
            *arrays[:3],
            causal=causal,
            mask=mask,
            bias=bias,
            segment_ids=segment_ids,
            scale=scale,
            implementation=implementation,
        )

    out, vjp = jax.vjp(attend, query, key, value, *([] if bias is None else [bias]))
    return out, vjp(d_out)


agree = functools.partial(assert_agree, dtypes=True, floor=1e-2)

# *B, T, S, H, G, K, V, causal
CASES = [
    ((), 1, 1, 1, 1, 1, 1, True),
    ((2,), 63, 63, 4, 2, 8, 5, True),
    ((1, 3), 31, 97, 3, 1, 7, 16, False),
    ((1,), 521, 521, 2, 2, 4, 3, True),  # two blocks of 272, the last not full
    ((2,), 1, 67, 4, 4, 16, 8, False),
    ((1,), 600, 7, 2, 1, 4, 4, False),
]


@pytest.mark.slow_unless(
    "((), 1, 1, 1, 1, 1, 1, True)-fused",
    "((1, 3), 31, 97, 3, 1, 7, 16, False)-fused",
    "((1,), 521, 521, 2, 2, 4, 3, True)-chunked",
    "((1,), 600, 7, 2, 1, 4, 4, False)-chunked",
    "((2,), 1, 67, 4, 4, 16, 8, False)-fused",
    "((2,), 63, 63, 4, 2, 8, 5, True)-chunked",
)
@pytest.mark.parametrize("implementation", FAST_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_implementations_agree_with_naive_in_outputs_and_gradients(case, implementation):
    operands = _operands(*case[:-1])
    expected = _outputs_and_grads(*operands, causal=case[-1], implementation="naive")
    agree(_outputs_and_grads(*operands, causal=case[-1], implementation=implementation), expected, 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementations_are_the_definition_with_every_mask_at_once(implementation):
    query, key, value, _ = _operands((2,), 67, 67, 4, 2, 8, 5)
    rng = np.random.default_rng(9)
    mask, segments = rng.random((2, 1, 67, 67)) > 0.3, np.sort(rng.integers(0, 4, (2, 67)), -1)
    mask[1, 0, 11] = False  # a query that sees nothing
    visible = np.tril(np.ones((67, 67), bool)) & mask & (segments[:, None, :, None] == segments[:, None, None])
    expected = _definition(query, key, value, np.broadcast_to(visible, (2, 4, 67, 67)), 0.3).astype(np.float32)
    out = softmax_attention(
        query, key, value, causal=True, mask=mask, segment_ids=segments, scale=0.3, implementation=implementation
    )
    agree(out, expected, 1e-5)
    np.testing.assert_array_equal(out[1, 11], 0)


@pytest.mark.slow_unless(
    "shape0-chunked", "shape1-fused", "shape2-fused", "shape3-fused", "shape4-chunked", "shape5-fused", "shape6-fused"
)
@pytest.mark.parametrize("implementation", FAST_IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape", [(67, 97), (1, 97), (67, 1), (4, 67, 97), (3, 1, 1, 97), (2, 1, 4, 1, 97), (2, 3, 4, 67, 97)]
)
def test_masks_broadcast(shape, implementation):
    operands = _operands((2, 3), 67, 97, 4, 2, 3, 3)
    mask = np.random.default_rng(1).random(shape) > 0.4
    expected = _outputs_and_grads(*operands, np.broadcast_to(mask, (2, 3, 4, 67, 97)), implementation="naive")
    agree(_outputs_and_grads(*operands, mask, implementation=implementation), expected, 1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))


@pytest.mark.parametrize("implementation", ["naive", "fused", "auto"])
def test_a_bias_and_its_gradient(implementation):
    operands, bias = _operands((2,), 13, 17, 4, 2, 8, 5), draw((4, 1, 17), 7)
    out, grads = _outputs_and_grads(*operands, bias=bias, implementation=implementation)
    expected = _definition(*operands[:3], np.ones((2, 4, 13, 17), bool), 8**-0.5, np.broadcast_to(bias, (2, 4, 13, 17)))
    agree(out, expected.astype(np.float32), 1e-5)
    assert grads[3].shape == bias.shape
    agree(grads, _outputs_and_grads(*operands, bias=bias, implementation="naive")[1], 1e-5)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 140),
    keys=st.integers(1, 140),
    groups=st.integers(1, 3),
    rep=st.integers(1, 3),
    size=st.integers(1, 9),
    causal=st.booleans(),
    implementation=st.sampled_from(IMPLEMENTATIONS),
)
def test_any_shape_agrees_with_the_definition(queries, keys, groups, rep, size, causal, implementation):
    keys = queries if causal else keys
    query, key, value, _ = _operands((2,), queries, keys, groups * rep, groups, size, 3)
    visible = np.broadcast_to(np.tril(np.ones((queries, keys), bool)) | (not causal), (2, groups * rep, queries, keys))
    expected = _definition(query, key, value, visible, size**-0.5).astype(np.float32)
    agree(softmax_attention(query, key, value, causal=causal, implementation=implementation), expected, 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_keeps_its_dtype(implementation):
    operands = tuple(jnp.asarray(x, jnp.bfloat16) for x in _operands((2,), 131, 131, 4, 2, 16, 16))
    exact = _outputs_and_grads(*(x.astype(jnp.float32) for x in operands), causal=True, implementation="naive")
    actual = _outputs_and_grads(*operands, causal=True, implementation=implementation)
    assert {x.dtype for x in jax.tree.leaves(actual)} == {jnp.dtype(jnp.bfloat16)}
    agree(jax.tree.map(lambda x: x.astype(jnp.float32), actual), exact, 2e-2)


@pytest.mark.parametrize("implementation", ["chunked", "auto", "cpu"])
def test_float64_is_exact_and_the_gradient_is_that_of_differences(implementation):
    with jax.enable_x64(True):
        operands = _operands((1,), 67, 67, 2, 1, 3, 2, np.float64)
        expected = _outputs_and_grads(*operands, causal=True, implementation="naive")
        assert expected[0].dtype == np.float64
        actual = _outputs_and_grads(*operands, causal=True, implementation=implementation)
        agree(actual, expected, 1e-10)
        step = [draw(x.shape, 20 + i, np.float64) for i, x in enumerate(operands[:3])]
        ends = [
            (
                _outputs_and_grads(
                    *(x + h * s for x, s in zip(operands[:3], step, strict=True)),
                    operands[3],
                    causal=True,
                    implementation=implementation,
                )[0]
                * operands[3]
            ).sum()
            for h in (1e-5, -1e-5)
        ]
        slope = sum((s * g).sum() for s, g in zip(step, actual[1], strict=True))
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causal_attention_does_not_see_later_tokens(implementation):
    query, key, value, _ = _operands((1,), 200, 200, 2, 2, 4, 4)
    at = 131
    later = [np.concatenate([x[:, :at], 7 * x[:, at:] + 1], 1) for x in (query, key, value)]
    a, b = (softmax_attention(*x, causal=True, implementation=implementation) for x in ((query, key, value), later))
    np.testing.assert_array_equal(a[:, :at], b[:, :at])
    assert not np.allclose(a[:, at:], b[:, at:])


def test_large_logits_stay_finite():
    operands = tuple(300 * x for x in _operands((1,), 130, 130, 2, 2, 8, 4))
    expected = _outputs_and_grads(*operands, causal=True, implementation="naive")
    actual = _outputs_and_grads(*operands, causal=True, implementation="chunked")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(actual))
    agree(actual[0], expected[0], 1e-5)


def test_vmap_agrees_with_a_batch():
    operands = _operands((3,), 97, 97, 2, 1, 4, 4)
    run = functools.partial(_outputs_and_grads, causal=True, implementation="chunked")
    agree(jax.vmap(run)(*operands), run(*operands), 1e-5)


def test_blocks_of_any_sizes_agree():
    query, key, value, d_out = (jnp.asarray(np.moveaxis(x, 1, 2)) for x in _operands((2,), 61, 61, 2, 2, 4, 4))
    pattern = attention_blocks.Pattern(after=0)

    @functools.partial(jax.jit, static_argnums=0)
    def run(blocks):
        attend = lambda q, k, v: attention_blocks.attend(attention_blocks.Operands(q[:, :, None], k, v), blocks)[
            :, :, 0
        ]
        out, vjp = jax.vjp(attend, query, key, value)
        return out, vjp(d_out)

    expected = run(attention_blocks.Blocks(61, 61, pattern, 1.0))
    for rows, columns in ((8, 8), (16, 5), (3, 32), (64, 128), (1, 61)):
        agree(run(attention_blocks.Blocks(rows, columns, pattern, 1.0)), expected, 1e-5)


@pytest.mark.parametrize("length", [1, 17, 64, 65, 197, 512, 513, 8192])
def test_block_size_leaves_little_padding(length):
    size = block_size(length)
    assert size % 16 == 0 and 16 <= size <= 512
    assert -(-length // size) * size - length < 16 * -(-length // size)


def test_chunked_memory_is_linear_and_fused_is_not():
    def megabytes(implementation, length):
        shape = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        run = jax.jit(
            jax.grad(
                lambda q, k, v: softmax_attention(q, k, v, causal=True, implementation=implementation).sum(), (0, 1, 2)
            )
        )
        return run.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes / 1e6

    assert megabytes("chunked", 8192) < 20 < 200 < megabytes("fused", 8192)


@pytest.mark.parametrize("length", [64, 2048])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_auto_lowers_for_every_platform_and_loops_only_on_cpu(length, platform):
    shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    run = jax.jit(jax.grad(lambda q, k, v: softmax_attention(q, k, v, causal=True).sum(), (0, 1, 2)))
    text = jax.export.export(run, platforms=[platform])(shape, shape, shape).mlir_module()
    by_table = dispatch.choose(OP, queries=length, keys=length, causal=2)
    assert by_table == "chunked" or length < 2048
    assert ("stablehlo.while" in text) == (platform == "cpu" and by_table == "chunked")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(implementation="flash"),
            "softmax_attention: implementation is 'flash'; expected one of auto, cpu, naive, fused, chunked",
        ),
        (dict(key=(2, 9, 4, 8)), r"key has shape \(2, 9, 4, 8\).*\(2, 9, 4, 4\)"),
        (dict(value=(2, 8, 2, 4)), r"value has shape \(2, 8, 2, 4\).*\(2, 9, 2, V\)"),
        (dict(query=(2, 9, 3, 4)), "query is of 3 heads; expected a multiple of the 2 heads"),
        (dict(query=(2, 5, 4, 4), causal=True), "causal is given with 5 queries and 9 keys; expected as many"),
        (dict(segment_ids=jnp.zeros((2, 5))), r"segment_ids has shape \(2, 5\).*\(2, 9\)"),
        (
            dict(mask=jnp.ones((9, 8), bool)),
            r"mask is of shape \(9, 8\); expected one that broadcasts to .* \(2, 4, 9, 9\)",
        ),
        (dict(bias=jnp.ones((3, 9, 9))), r"bias is of shape \(3, 9, 9\)"),
        (dict(bias=jnp.ones((9, 9)), implementation="chunked"), "bias is given with implementation 'chunked'"),
    ],
)
def test_errors_name_argument_shape_and_what_was_expected(change, message):
    shapes = dict(query=(2, 9, 4, 4), key=(2, 9, 2, 4), value=(2, 9, 2, 4))
    arrays = {name: jnp.zeros(change.pop(name, shape)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        softmax_attention(**arrays, **change)


def test_fused_refuses_float64():
    with jax.enable_x64(True), pytest.raises(ValueError, match="query is float64 with implementation 'fused'"):
        softmax_attention(*(jnp.zeros((1, 3, 1, 2), jnp.float64),) * 3, implementation="fused")
