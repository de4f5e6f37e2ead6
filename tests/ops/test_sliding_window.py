"""Windows and blocks against masked full attention, in outputs and gradients; piece by piece; linear in memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.ops.attention import softmax_attention
from research.ops.sliding_window import (
    IMPLEMENTATIONS,
    block_local_attention,
    sliding_window_attention,
    sliding_window_extend,
    window_state,
)
from tests.ops.compare import assert_agree, draw

FAST_IMPLEMENTATIONS = tuple(implementation for implementation in IMPLEMENTATIONS if implementation != "naive")


def _operands(length, batch=(2,), heads=4, groups=2, size=4, value_size=3, dtype=np.float32):
    shapes = (
        (*batch, length, heads, size),
        (*batch, length, groups, size),
        (*batch, length, groups, value_size),
        (*batch, length, heads, value_size),
    )
    return tuple(draw(shape, i, dtype) for i, shape in enumerate(shapes))


def _packed(length, batch=(2,)):
    return np.sort(np.random.default_rng(5).integers(0, 4, (*batch, length)), -1)


@functools.partial(jax.jit, static_argnames=("op", "options"))
def _run(op, options, query, key, value, d_out, segment_ids=None):
    out, vjp = jax.vjp(lambda q, k, v: op(q, k, v, segment_ids=segment_ids, **dict(options)), query, key, value)
    return out, vjp(d_out)


def _outputs_and_grads(op, *arrays, **options):
    return _run(op, tuple(options.items()), *arrays)


@functools.partial(jax.jit, static_argnames=("op", "options"))
def _run_forward(op, options, *arrays, **segments):
    return op(*arrays, **segments, **dict(options))


def _output(op, *arrays, segments=None, **options):
    """One compiled program, where op by op each primitive would be compiled alone."""
    return _run_forward(op, tuple(options.items()), *arrays, **({} if segments is None else {"segment_ids": segments}))


agree = functools.partial(assert_agree, dtypes=True, floor=1e-2)

# length, window, causal, packed
CASES = [
    (1, 1, True, False),
    (63, 7, True, False),
    (63, 64, True, True),
    (67, 1, False, False),
    (131, 17, False, True),
    (197, 150, True, False),
    (300, 129, False, False),
]


@pytest.mark.slow_unless(
    "(1, 1, True, False)-chunked",
    "(131, 17, False, True)-chunked",
    "(197, 150, True, False)-chunked",
    "(300, 129, False, False)-parallel",
    "(63, 64, True, True)-chunked",
    "(63, 7, True, False)-parallel",
    "(67, 1, False, False)-parallel",
)
@pytest.mark.parametrize("implementation", FAST_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_implementations_agree_with_naive_in_outputs_and_gradients(case, implementation):
    length, window, causal, packed = case
    arrays = _operands(length) + ((_packed(length),) if packed else ())
    expected = _outputs_and_grads(
        sliding_window_attention, *arrays, window=window, causal=causal, implementation="naive"
    )
    found = _outputs_and_grads(
        sliding_window_attention, *arrays, window=window, causal=causal, implementation=implementation
    )
    agree(found, expected, 1e-5, floor=1.0 if window == 1 else 0.0)  # of one token the gradients of q and k cancel


@pytest.mark.slow_unless(
    "1-3-False-chunked", "130-64-True-parallel", "197-13-False-chunked", "67-100-False-chunked", "67-5-True-parallel"
)
@pytest.mark.parametrize("implementation", FAST_IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "length, block, packed", [(1, 3, False), (67, 5, True), (67, 100, False), (130, 64, True), (197, 13, False)]
)
def test_block_local_implementations_agree_with_naive(length, block, packed, implementation):
    arrays = _operands(length) + ((_packed(length),) if packed else ())
    expected = _outputs_and_grads(block_local_attention, *arrays, block=block, implementation="naive")
    agree(
        _outputs_and_grads(block_local_attention, *arrays, block=block, implementation=implementation), expected, 1e-5
    )


@pytest.mark.parametrize("causal", [True, False])
def test_naive_window_is_the_definition(causal):
    query, key, value, _ = _operands(23, groups=4)
    out = sliding_window_attention(query, key, value, window=5, causal=causal, implementation="naive")
    for t in range(23):
        seen = slice(max(t - 4, 0), t + 1 if causal else t + 5)
        weights = jax.nn.softmax(np.einsum("bhk,bshk->bhs", query[:, t], key[:, seen]) / 2)
        np.testing.assert_allclose(out[:, t], np.einsum("bhs,bshv->bhv", weights, value[:, seen]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_window_or_block_of_the_whole_length_is_full_attention(implementation):
    query, key, value, _ = _operands(67)
    causal = softmax_attention(query, key, value, causal=True, implementation="naive")
    agree(_output(sliding_window_attention, query, key, value, window=67, implementation=implementation), causal, 1e-5)
    agree(_output(block_local_attention, query, key, value, block=80, implementation=implementation), causal, 1e-5)
    full = softmax_attention(query, key, value, implementation="naive")
    agree(
        _output(sliding_window_attention, query, key, value, window=67, causal=False, implementation=implementation),
        full,
        1e-5,
    )


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 150),
    window=st.integers(1, 160),
    causal=st.booleans(),
    implementation=st.sampled_from(FAST_IMPLEMENTATIONS),
)
def test_any_shape_agrees_with_naive(length, window, causal, implementation):
    query, key, value, _ = _operands(length, batch=())
    expected = _output(
        sliding_window_attention, query, key, value, window=window, causal=causal, implementation="naive"
    )
    agree(
        _output(
            sliding_window_attention, query, key, value, window=window, causal=causal, implementation=implementation
        ),
        expected,
        1e-5,
    )


@pytest.mark.slow_unless("1-parallel")
@pytest.mark.parametrize("implementation", ["auto", *FAST_IMPLEMENTATIONS])
@pytest.mark.parametrize("window", [1, 40])
def test_pieces_carry_the_state_whatever_the_split(window, implementation):
    query, key, value, _ = _operands(67)
    segments = _packed(67)
    expected = _output(
        sliding_window_attention, query, key, value, segments=segments, window=window, implementation="naive"
    )
    state, pieces = window_state(key, value, window), []
    for start, stop in ((0, 1), (1, 3), (3, 66), (66, 67)):
        piece = (x[:, start:stop] for x in (query, key, value))
        out, state = _output(
            sliding_window_extend, *piece, state, segments=segments[:, start:stop], implementation=implementation
        )
        pieces.append(out)
    agree(jnp.concatenate(pieces, 1), expected, 1e-5)


def test_single_steps_in_a_scan_equal_the_whole_with_its_gradients():
    arrays = _operands(23)

    def stepwise(query, key, value, segment_ids=None):
        def step(state, token):
            out, state = sliding_window_extend(*(x[:, None] for x in token), state)
            return state, out[:, 0]

        tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value))
        return jnp.moveaxis(jax.lax.scan(step, window_state(key, value, 6), tokens)[1], 0, 1)

    expected = _outputs_and_grads(sliding_window_attention, *arrays, window=6, implementation="naive")
    agree(_outputs_and_grads(stepwise, *arrays), expected, 1e-5)


def test_packed_sequences_equal_separate_runs():
    query, key, value, _ = _operands(60)
    lengths = [1, 15, 44]
    segments = np.tile(np.repeat(np.arange(3), lengths), (2, 1))
    for implementation in IMPLEMENTATIONS:
        packed = _output(
            sliding_window_attention, query, key, value, segments=segments, window=9, implementation=implementation
        )
        ends = np.cumsum([0, *lengths])
        alone = [
            _output(
                sliding_window_attention,
                *(x[:, a:b] for x in (query, key, value)),
                window=9,
                implementation=implementation,
            )
            for a, b in itertools.pairwise(ends)
        ]
        agree(packed, jnp.concatenate(alone, 1), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_lies_outside_the_reach_changes_nothing(implementation):
    arrays = _operands(150)[:3]
    later = [np.concatenate([x[:, :100], 9 * x[:, 100:]], 1) for x in arrays]
    earlier = [np.concatenate([9 * x[:, :40], x[:, 40:]], 1) for x in arrays]
    for op, options, reach in (
        (sliding_window_attention, dict(window=11), 50),
        (block_local_attention, dict(block=20), 60),
    ):
        out, after, before = (
            np.asarray(_output(op, *x, implementation=implementation, **options)) for x in (arrays, later, earlier)
        )
        np.testing.assert_array_equal(out[:, :100], after[:, :100])
        assert not np.allclose(out[:, 100], after[:, 100])
        np.testing.assert_array_equal(out[:, reach:], before[:, reach:])
        assert not np.allclose(out[:, reach - 1], before[:, reach - 1], atol=1e-7)


@pytest.mark.slow_unless("parallel")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_and_float64(implementation):
    half = tuple(jnp.asarray(x, jnp.bfloat16) for x in _operands(131))
    exact = _outputs_and_grads(
        sliding_window_attention, *(x.astype(jnp.float32) for x in half), window=30, implementation="naive"
    )
    actual = _outputs_and_grads(sliding_window_attention, *half, window=30, implementation=implementation)
    assert {x.dtype for x in jax.tree.leaves(actual)} == {jnp.dtype(jnp.bfloat16)}
    agree(jax.tree.map(lambda x: x.astype(jnp.float32), actual), exact, 2e-2)
    with jax.enable_x64(True):
        double = _operands(131, dtype=np.float64)
        expected = _outputs_and_grads(sliding_window_attention, *double, window=30, implementation="naive")
        assert expected[0].dtype == np.float64
        agree(
            _outputs_and_grads(sliding_window_attention, *double, window=30, implementation=implementation),
            expected,
            1e-10,
        )


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_auto_lowers_for_every_platform_and_loops_only_on_cpu(platform):
    shape = jax.ShapeDtypeStruct((1, 1000, 2, 16), jnp.float32)
    for op, options in ((sliding_window_attention, dict(window=100)), (block_local_attention, dict(block=100))):
        run = jax.jit(jax.grad(lambda q, k, v, op=op, options=options: op(q, k, v, **options).sum(), (0, 1, 2)))
        text = jax.export.export(run, platforms=[platform])(shape, shape, shape).mlir_module()
        assert ("stablehlo.while" in text) == (platform == "cpu")


@pytest.mark.parametrize("implementation", FAST_IMPLEMENTATIONS)
def test_memory_is_linear_in_the_length(implementation):
    def size(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        run = jax.jit(
            jax.grad(
                lambda q, k, v: sliding_window_attention(q, k, v, window=64, implementation=implementation).sum(),
                (0, 1, 2),
            )
        )
        return run.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert size(16384) < 4.4 * size(4096)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda q, k, v: sliding_window_attention(q, k, v, window=0),
            "sliding_window_attention: window is 0; expected at least 1",
        ),
        (
            lambda q, k, v: block_local_attention(q, k, v, block=0),
            "block_local_attention: block is 0; expected at least 1",
        ),
        (
            lambda q, k, v: sliding_window_attention(q, k[:, :3], v, window=2),
            r"key has shape \(2, 3, 2, 4\).*\(2, 9, G, 4\)",
        ),
        (
            lambda q, k, v: sliding_window_attention(q[:, :, :3], k, v, window=2),
            "query is of 3 heads; expected a multiple of the 2 heads",
        ),
        (
            lambda q, k, v: sliding_window_attention(q, k, v, window=2, implementation="fused"),
            "implementation is 'fused'; expected one of auto, cpu, naive",
        ),
        (
            lambda q, k, v: sliding_window_extend(q, k, v, window_state(k[:1], v[:1], 4)),
            r"sliding_window_extend: state.key has shape \(1, 3, 2, 4\).*\(2, W, 2, 4\)",
        ),
    ],
)
def test_errors_name_argument_shape_and_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call(*_operands(9)[:3])
