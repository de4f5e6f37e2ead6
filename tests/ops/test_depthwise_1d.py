"""The 1-D depthwise convolution: every implementation against the definition and the reference implementation, carried
state, steps, packed segments."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.ops import dispatch
from research.ops.depthwise import IMPLEMENTATIONS
from research.ops.depthwise_1d import causal_conv1d, causal_conv1d_step, depthwise_conv1d
from tests.ops.compare import draw
from tests.ops.test_depthwise import agree

FAST_IMPLEMENTATIONS = ("auto", "cpu", "shift", "toeplitz", "dft")

# (B, T, C), K, options
CASES = [
    ((2, 63, 3), 4, {}),
    ((1, 1, 1), 4, {}),
    ((2, 7, 2), 63, {"padding": "SAME"}),  # kernel longer than the sequence
    ((1, 211, 3), 63, {}),  # tiles of the Toeplitz and DFT implementations
    ((1, 307, 2), 32, {"padding": "SAME"}),  # an even kernel: one zero more at the end
    ((2, 140, 2), 13, {"padding": "VALID", "dilation": 5}),
    ((2, 37, 3), 3, {"padding": (5, 2), "stride": 3, "dilation": 2}),
    ((3, 29, 2), 7, {"stride": 2}),
    ((1, 401, 64), 4, {}),  # blocks of the weight gradient, with rows left over
    ((2, 331, 128), 17, {"padding": (0, 0)}),  # more taps than it accumulates at once
]


def _reads(time, taps, padding, stride, dilation):
    """(inputs read by each output and tap, number of outputs), by the definition of each padding."""
    reach = dilation * (taps - 1)
    if padding == "SAME":
        out = -(-time // stride)
        low = max((out - 1) * stride + reach + 1 - time, 0) // 2
    else:
        low, high = (
            {"CAUSAL": (reach, 0), "VALID": (0, 0)}.get(padding, padding) if isinstance(padding, str) else padding
        )
        out = (time + low + high - reach - 1) // stride + 1
    return np.arange(out)[:, None] * stride + np.arange(taps) * dilation - low, out


def _direct(x, kernel, padding="CAUSAL", stride=1, dilation=1, ids=None):
    """The definition, with loops, in float64; kernel [K, C, M]."""
    batch, time, channels = x.shape
    taps, _, multiplier = kernel.shape
    reads, out = _reads(time, taps, padding, stride, dilation)
    y = np.zeros((batch, out, channels, multiplier))
    for o, i in np.ndindex(out, taps):
        source = reads[o, i]
        if 0 <= source < time:
            alike = 1.0 if ids is None else (ids[:, source] == ids[:, o])[:, None, None]
            y[:, o] += alike * x[:, source, :, None].astype(np.float64) * kernel[i]
    return y.reshape(batch, out, -1)


def _outputs_and_grads(x, kernel, g, implementation, options):
    y, vjp = jax.vjp(lambda x, k: depthwise_conv1d(x, k, implementation=implementation, **options), x, kernel)
    return y, vjp(g)


def _jitted(implementation, options):
    return jax.jit(functools.partial(_outputs_and_grads, implementation=implementation, options=options))


def _grad_of(x, taps, options, seed=9):
    shape = jax.eval_shape(lambda x: depthwise_conv1d(x, jnp.zeros((taps, x.shape[-1])), **options), x).shape
    return draw(shape, seed)


@pytest.mark.parametrize("shape, taps, options", CASES)
def test_naive_is_the_definition(shape, taps, options):
    x, kernel = draw(shape, 0), draw((taps, shape[-1]), 1)
    y = depthwise_conv1d(x, kernel, implementation="naive", **options)
    agree(y, _direct(x, kernel[..., None], **options).astype(np.float32), 1e-5)


@pytest.mark.slow_unless(
    "shape0-4-options0-auto",
    "shape1-4-options1-auto",
    "shape2-63-options2-cpu",
    "shape3-63-options3-cpu",
    "shape4-32-options4-shift",
    "shape5-13-options5-toeplitz",
    "shape6-3-options6-dft",
    "shape7-7-options7-auto",
    "shape8-4-options8-auto",
    "shape9-17-options9-toeplitz",
)
@pytest.mark.parametrize("implementation", FAST_IMPLEMENTATIONS)
@pytest.mark.parametrize("shape, taps, options", CASES)
def test_implementations_agree_with_naive(shape, taps, options, implementation):
    x, kernel = draw(shape, 0), draw((taps, shape[-1]), 1)
    g = _grad_of(x, taps, options)
    agree(_jitted(implementation, options)(x, kernel, g), _jitted("naive", options)(x, kernel, g), 1e-5)


@pytest.mark.parametrize("implementation", FAST_IMPLEMENTATIONS)
def test_multiplier_of_channels_and_leading_axes(implementation):
    x, kernel = draw((2, 3, 31, 2), 0), draw((5, 2, 3), 1)
    y = depthwise_conv1d(x, kernel, stride=2, implementation=implementation)
    expected = _direct(x.reshape(6, 31, 2), kernel, stride=2).astype(np.float32).reshape(2, 3, 16, 6)
    agree(y, expected, 1e-5)
    agree(depthwise_conv1d(x[0, 0], kernel, stride=2, implementation=implementation), expected[0, 0], 1e-5)
    g = draw(expected.shape, 2)
    options = {"stride": 2}
    agree(_jitted(implementation, options)(x, kernel, g), _jitted("naive", options)(x, kernel, g), 1e-5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    time=st.integers(1, 150),
    taps=st.integers(1, 63),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 4),
    padding=st.sampled_from(["CAUSAL", "SAME", (3, 0), (250, 7)]),
    multiplier=st.integers(1, 3),
    implementation=st.sampled_from(FAST_IMPLEMENTATIONS),
)
def test_any_shape_agrees_with_the_definition(time, taps, stride, dilation, padding, multiplier, implementation):
    if isinstance(padding, tuple) and time + sum(padding) <= dilation * (taps - 1):
        padding = "SAME"
    x, kernel = draw((2, time, 2), 0), draw((taps, 2, multiplier), 1)
    options = dict(padding=padding, stride=stride, dilation=dilation)
    expected = _direct(x, kernel, **options).astype(np.float32)
    y = jax.jit(functools.partial(depthwise_conv1d, implementation=implementation, **options))(x, kernel)
    np.testing.assert_allclose(y, expected, atol=1e-5 * max(np.max(np.abs(expected)), 1.0), rtol=0)


@pytest.mark.parametrize("implementation", FAST_IMPLEMENTATIONS)
def test_implementations_agree_in_float64(implementation):
    with jax.enable_x64(True):
        for shape, taps, options in (((2, 63, 2), 4, {}), ((1, 211, 2), 63, {"stride": 2})):
            x, kernel = draw(shape, 0, np.float64), draw((taps, shape[-1]), 1, np.float64)
            g = _grad_of(x, taps, options).astype(np.float64)
            actual, expected = _jitted(implementation, options)(x, kernel, g), _jitted("naive", options)(x, kernel, g)
            assert expected[0].dtype == np.float64
            agree(actual, expected, 1e-10)


@pytest.mark.parametrize("implementation", ("naive", *FAST_IMPLEMENTATIONS))
def test_bfloat16_keeps_its_dtype_and_sums_in_float32(implementation):
    x, kernel, g = (jnp.asarray(draw(s, i), jnp.bfloat16) for i, s in enumerate([(2, 131, 3), (31, 3), (2, 131, 3)]))
    expected = _jitted("naive", {})(*(a.astype(jnp.float32) for a in (x, kernel, g)))
    actual = _jitted(implementation, {})(x, kernel, g)
    assert {a.dtype for a in jax.tree.leaves(actual)} == {jnp.dtype(jnp.bfloat16)}
    agree(jax.tree.map(lambda a: a.astype(jnp.float32), actual), expected, 2.0**-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("segmented", [False, True])
def test_causality(implementation, segmented):
    """Output t does not move when inputs after t change."""
    x, kernel, t = draw((1, 203, 2), 0), draw((13, 2), 1), 101
    options = {"segment_ids": jnp.asarray(np.arange(203) // 67)[None]} if segmented else {}
    other = np.concatenate([x[:, : t + 1], draw((1, 203 - t - 1, 2), 5)], 1)
    y, y_other = (np.asarray(depthwise_conv1d(v, kernel, implementation=implementation, **options)) for v in (x, other))
    # Toeplitz and DFT matrices sum over later inputs too, with weights that are zero or cancel.
    np.testing.assert_allclose(y_other[:, : t + 1], y[:, : t + 1], atol=2e-5 if implementation == "dft" else 0, rtol=0)
    assert np.abs(y_other[:, t + 1 :] - y[:, t + 1 :]).max() > 0.1


# --- state ------------------------------------------------------------------------------------------------------------


def _in_pieces(x, kernel, ids, cuts, dilation, implementation):
    state = jnp.zeros((x.shape[0], dilation * (kernel.shape[0] - 1), x.shape[-1]), x.dtype)
    pieces = []
    for start, end in zip((0, *cuts), (*cuts, x.shape[1]), strict=True):
        if ids is not None and start and ids[0, start] != ids[0, start - 1]:
            state = jnp.zeros_like(state)
        piece_ids = None if ids is None else ids[:, start:end]
        y, state = causal_conv1d(
            x[:, start:end], kernel, state, dilation=dilation, segment_ids=piece_ids, implementation=implementation
        )
        pieces.append(y)
    return jnp.concatenate(pieces, 1), state


@pytest.mark.parametrize(
    "implementation, segmented", [("auto", False), ("auto", True), ("toeplitz", False), ("dft", False)]
)
@pytest.mark.parametrize("cuts", [(20,), (1, 3, 62)])
def test_state_may_be_split_anywhere(implementation, cuts, segmented):
    x, kernel = draw((2, 63, 3), 0), draw((4, 3), 1)
    ids = np.broadcast_to(np.searchsorted([20, 22, 50], np.arange(63), side="right"), (2, 63)) if segmented else None

    def loss(function):
        def total(x, kernel):
            y, state = function(x, kernel)
            return jnp.sum(y * draw((2, 63, 3), 2)) + jnp.sum(state * draw((2, 6, 3), 3)), (y, state)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))

    whole = loss(lambda x, k: causal_conv1d(x, k, dilation=2, segment_ids=ids, implementation="naive"))(x, kernel)
    pieces = loss(lambda x, k: _in_pieces(x, k, ids, cuts, 2, implementation))(x, kernel)
    agree(pieces, whole, 1e-5)


def test_short_pieces_and_steps_agree_with_the_whole():
    x, kernel = draw((2, 3, 11, 2), 0), draw((4, 2, 2), 1)
    y, state = causal_conv1d(x, kernel, dilation=3)
    stepped, steps = jnp.zeros((2, 3, 9, 2)), []
    for t in range(11):
        y_t, stepped = causal_conv1d_step(x[..., t, :], kernel, stepped, dilation=3)
        steps.append(y_t)
    agree(jnp.stack(steps, -2), y, 1e-5)
    np.testing.assert_array_equal(stepped, state)
    np.testing.assert_array_equal(
        causal_conv1d(x[..., :2, :], kernel, dilation=3)[1], np.pad(x[..., :2, :], ((0, 0),) * 2 + ((7, 0), (0, 0)))
    )


def test_state_stops_at_the_last_segment():
    x, ids = draw((1, 6, 1), 0), jnp.asarray([[0, 0, 0, 0, 1, 1]])
    _, state = causal_conv1d(x, draw((4, 1), 1), segment_ids=ids)
    np.testing.assert_array_equal(state[0, :, 0], [0, *x[0, 4:, 0]])


# --- packed segments --------------------------------------------------------------------------------------------------


@pytest.mark.slow_unless(
    "CAUSAL-4-1-3-auto",
    "CAUSAL-4-1-3-cpu",
    "CAUSAL-4-1-3-toeplitz",
    "CAUSAL-5-3-128-toeplitz",
    "SAME-12-2-1-dft",
    "SAME-31-1-2-naive",
    "SAME-31-1-2-shift",
)
@pytest.mark.parametrize("implementation", ("naive", *FAST_IMPLEMENTATIONS))
@pytest.mark.parametrize(
    "padding, taps, dilation, channels",
    [("CAUSAL", 4, 1, 3), ("SAME", 31, 1, 2), ("CAUSAL", 5, 3, 128), ("SAME", 12, 2, 1)],
)
def test_segments_are_convolved_apart(implementation, padding, taps, dilation, channels):
    lengths, time = (61, 1, 70, 3), 135
    x, kernel, g = draw((2, time, channels), 0), draw((taps, channels), 1), draw((2, time, channels), 2)
    ids = np.broadcast_to(np.repeat(np.arange(4) * 7 - 3, lengths), (2, time))
    options = dict(padding=padding, dilation=dilation)
    y, (dx, dk) = _jitted(implementation, options | {"segment_ids": ids})(x, kernel, g)
    bounds = np.cumsum((0, *lengths))
    alone = [_outputs_and_grads(x[:, a:b], kernel, g[:, a:b], "naive", options) for a, b in itertools.pairwise(bounds)]
    agree(y, jnp.concatenate([y for y, _ in alone], 1), 1e-5)
    agree(dx, jnp.concatenate([dx for _, (dx, _) in alone], 1), 1e-5)
    agree(dk, sum(dk for _, (_, dk) in alone), 1e-5)
    agree(y, _direct(x, kernel[..., None], ids=ids, **options).astype(np.float32), 1e-5)


def test_segments_in_bfloat16_and_float64():
    x, kernel, ids = draw((1, 40, 2), 0), draw((4, 2, 2), 1), np.arange(40)[None] // 9
    y = depthwise_conv1d(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16), segment_ids=ids)
    assert y.dtype == jnp.bfloat16
    agree(y.astype(jnp.float32), _direct(x, kernel, ids=ids).astype(np.float32), 2e-2)
    with jax.enable_x64(True):
        x, kernel, g = (draw(s, i, np.float64) for i, s in enumerate([(1, 40, 2), (4, 2), (1, 40, 2)]))
        options = {"segment_ids": ids}
        agree(_jitted("auto", options)(x, kernel, g), _jitted("naive", options)(x, kernel, g), 1e-10)


# --- platforms and errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("taps, segmented", [(4, False), (63, False), (4, True)])
def test_lowers_for_other_platforms_without_a_long_loop(platform, taps, segmented):
    options = {"segment_ids": jnp.asarray(np.arange(2048)[None] // 100)} if segmented else {}
    x, kernel = jnp.zeros((1, 2048, 8)), jnp.zeros((taps, 8))
    exported = jax.export.export(_jitted("auto", options), platforms=[platform])(x, kernel, x)
    program = exported.mlir_module()
    assert program.count("stablehlo.convolution") == (0 if segmented else 3)
    assert program.count("stablehlo.while") == (1 if segmented else 0)  # over the taps


def test_implementations_come_from_the_table(tmp_path, monkeypatch):
    rows = [
        f"depthwise_conv1d,{direction},pixels=32 taps=4,{implementation}"
        for direction, implementation in (("forward", "dft"), ("input_grad", "naive"))
    ]
    table = tmp_path / "table.csv"
    table.write_text(
        "\n".join(["op,direction,at,implementation", *rows, "depthwise_conv1d,weight_grad,pixels=32 taps=4,toeplitz"])
    )
    monkeypatch.setattr(dispatch, "TABLE", table)
    dispatch._rows.cache_clear(), dispatch._nearest.cache_clear()
    try:
        x, kernel = draw((1, 30, 2), 0), draw((5, 2), 1)
        program = _jitted("cpu", {}).lower(x, kernel, x).as_text()
        assert program.count("stablehlo.convolution") == 1 and "stablehlo.dot_general" in program
        agree(_jitted("cpu", {})(x, kernel, x), _jitted("naive", {})(x, kernel, x), 1e-5)
    finally:
        monkeypatch.undo()
        dispatch._rows.cache_clear(), dispatch._nearest.cache_clear()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(implementation="fft"), "depthwise_conv1d: implementation is 'fft'.*naive, shift, toeplitz, dft"),
        (dict(taps=64), "kernel is .64, 3.; expected 1 to 63 taps"),
        (dict(channels=5), r"kernel has shape \(3, 5\); expected \[K C\] = \(3, 3\)|\(K, 3\)"),
        (dict(dilation=0), "dilation is 0; expected an integer of at least 1"),
        (dict(stride=0), "stride is 0"),
        (dict(padding="FULL"), "padding is 'FULL'; expected \"CAUSAL\""),
        (dict(padding=(-1, 0)), r"padding is \(-1, 0\)"),
        (dict(padding="VALID", taps=9), r"x is \(1, 8, 3\); expected at least 9 steps"),
        (dict(segment_ids=jnp.zeros((1, 7), int)), r"segment_ids has shape \(1, 7\).*\(1, 8\)"),
        (dict(segment_ids=jnp.zeros((1, 8), int), padding="VALID"), "padding is VALID.*with segment_ids"),
        (dict(segment_ids=jnp.zeros((1, 8), int), stride=2), "stride is 2; expected 1 with segment_ids"),
    ],
)
def test_invalid_arguments_name_what_was_expected(options, message):
    options = dict(options)
    kernel = jnp.zeros((options.pop("taps", 3), options.pop("channels", 3)))
    with pytest.raises(ValueError, match=message):
        depthwise_conv1d(jnp.zeros((1, 8, 3)), kernel, **options)


def test_a_state_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"state is of shape \(1, 3, 3\); expected .* = \(1, 6, 3\)"):
        causal_conv1d(jnp.zeros((1, 8, 3)), jnp.zeros((4, 3)), jnp.zeros((1, 3, 3)), dilation=2)
    with pytest.raises(ValueError, match=r"state is of shape \(1, 2, 3\); expected .* = \(1, 3, 3\)"):
        causal_conv1d_step(jnp.zeros((1, 3)), jnp.zeros((4, 3)), jnp.zeros((1, 2, 3)))
