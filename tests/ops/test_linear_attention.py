"""Linear attention of all kinds: reference values, the reference implementation in outputs and gradients, float64,
state carried anywhere, packing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.ops.linear_attention import linear_attention, linear_attention_step
from tests.ops.compare import assert_agree, assert_lowers_everywhere, draw, filler, outputs_and_grads

KINDS = ("none", "scalar", "vector", "delta", "gated_delta", "vector_delta")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def operands(kind, batch, length, heads, width, columns, *, groups=None, dtype=np.float32, strength=1.0):
    """(q, k, v, log_decay, beta, initial state) of a kind; None for what it does not have."""
    groups = heads if groups is None else groups
    k = draw((batch, length, groups, width), 1, dtype)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    gates = {"scalar": (batch, length, heads), "gated_delta": (batch, length, heads)}
    gates |= dict.fromkeys(("vector", "vector_delta"), (batch, length, heads, width))
    log_decay = (strength * np.log(sigmoid(draw(gates[kind], 3, dtype)))).astype(dtype) if kind in gates else None
    beta = sigmoid(draw((batch, length, heads), 4, dtype)).astype(dtype) if "delta" in kind else None
    return (
        draw((batch, length, groups, width), 0, dtype),
        k.astype(dtype),
        draw((batch, length, heads, columns), 2, dtype),
        log_decay,
        beta,
        draw((batch, heads, width, columns), 5, dtype),
    )


@functools.partial(jax.jit, static_argnames=("chunk_size", "implementation"))
def run(q, k, v, log_decay, beta, state, segment_ids=None, **options):
    return linear_attention(
        q, k, v, log_decay=log_decay, beta=beta, initial_state=state, segment_ids=segment_ids, **options
    )


def loop(q, k, v, log_decay, beta, state, segment_ids=None):
    """The definition in float64 NumPy."""
    q, k, v, state = (np.asarray(x, np.float64) for x in (q, k, v, state))
    repeats = v.shape[2] // q.shape[2]
    q, k = np.repeat(q, repeats, 2) * q.shape[-1] ** -0.5, np.repeat(k, repeats, 2)
    outs = []
    for t in range(q.shape[1]):
        if segment_ids is not None and t:
            state = state * (segment_ids[:, t] == segment_ids[:, t - 1])[:, None, None, None]
        if log_decay is not None:
            decay = np.exp(np.asarray(log_decay[:, t], np.float64))
            state = state * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
        value = v[:, t]
        if beta is not None:
            value = np.asarray(beta[:, t], np.float64)[..., None] * (value - np.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * value[:, :, None]
        outs.append(np.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return np.stack(outs, 1), state


# --- reference values: T=6, K=3, V=2, one head, of the filler ---------------------------------------------------------

LOG_SIGMOID = lambda x: -np.log1p(np.exp(-x))
UNIT = lambda x: x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
REFERENCES = {
    "linear": (
        {},
        [-0.84769856, -1.05177801],
        [[1.29398759, 1.38373307], [0.27828497, 0.74163351], [-0.86829942, -0.24926787]],
    ),
    "retention": ({"log_decay": np.full((1, 6, 1), np.log(31 / 32))}, [-0.71489592, -0.96190682], None),
    "simple_gla": (
        {"log_decay": LOG_SIGMOID(filler((6,), 3)).reshape(1, 6, 1)},
        [0.18402130, -0.21061453],
        [[-0.00818656, 0.51127336], [-0.54780384, -0.27002256], [-0.82978041, -0.92432264]],
    ),
    "gla": (
        {"log_decay": LOG_SIGMOID(filler((6, 3), 3)).reshape(1, 6, 1, 3) / 16},
        [-0.66807507, -0.94025354],
        [[1.06884333, 1.27188853], [0.13087097, 0.59968008], [-0.88201946, -0.37109867]],
    ),
    "delta": (
        {"beta": sigmoid(filler((6,), 4)).reshape(1, 6, 1)},
        [0.07087121, -0.12772553],
        [[-0.00354313, 0.34619033], [-0.24459768, -0.16647225], [-0.37061411, -0.60084033]],
    ),
    "gated_delta": (
        {"beta": sigmoid(filler((6,), 4)).reshape(1, 6, 1), "log_decay": LOG_SIGMOID(filler((6,), 3)).reshape(1, 6, 1)},
        [0.12612840, -0.03988390],
        [[-0.10655875, 0.21187399], [-0.25613674, -0.23744140], [-0.28524962, -0.57508438]],
    ),
}


@pytest.mark.slow_unless(
    "delta-1", "gated_delta-1", "gla-1", "linear-1", "retention-1", "simple_gla-1", "simple_gla-4", "simple_gla-None"
)
@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("name", REFERENCES)
def test_reference_values(name, chunk_size):
    options, last, state = REFERENCES[name]
    q, k, v = (filler(shape, i).reshape(1, 6, 1, -1) for i, shape in enumerate([(6, 3), (6, 3), (6, 2)]))
    if "beta" in options:
        q, k = UNIT(q), UNIT(k)
    to32 = lambda x: jnp.asarray(x, jnp.float32)
    for implementation in ("naive", "chunked") if chunk_size is None else ("chunked",):
        attend = jax.jit(functools.partial(linear_attention, chunk_size=chunk_size, implementation=implementation))
        out, final = attend(*map(to32, (q, k, v)), **jax.tree.map(to32, options))
        assert_agree(out[0, -1, 0], np.array(last), 1e-6)
        if state is not None:
            assert_agree(final[0, 0], np.array(state), 1e-6)


# --- implementations
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow_unless(
    "delta-shape1", "gated_delta-shape2", "none-shape1", "scalar-shape0", "vector-shape1", "vector_delta-shape1"
)
@pytest.mark.parametrize("shape", [(2, 63, 2, 5, 3), (1, 1, 1, 4, 2), (1, 131, 3, 7, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_agrees_with_naive_in_outputs_and_gradients(kind, shape):
    args = operands(kind, *shape)
    expected = outputs_and_grads(functools.partial(run, implementation="naive"), *args)
    assert_agree(expected[0], loop(*args), 1e-5)
    assert_agree(outputs_and_grads(functools.partial(run, implementation="chunked"), *args), expected, 1e-5)


@pytest.mark.parametrize("kind", ["none", "scalar"])
def test_heads_of_values_share_queries_and_keys(kind):
    args = operands(kind, 2, 70, 6, 4, 3, groups=2)
    expected = outputs_and_grads(functools.partial(run, implementation="naive"), *args)
    assert_agree(expected[0], loop(*args), 1e-5)
    assert_agree(
        outputs_and_grads(functools.partial(run, implementation="chunked", chunk_size=16), *args), expected, 1e-5
    )


@pytest.mark.slow_unless("scalar-200.0")
@pytest.mark.parametrize("strength", [0.1, 200.0])
@pytest.mark.parametrize("kind", ["scalar", "vector", "gated_delta"])
def test_weak_and_strong_decays_are_stable(kind, strength):
    """At strength 200 decays underflow within a token: no NaN, no infinity, in gradients neither."""
    args = operands(kind, 1, 130, 2, 4, 3, strength=strength)
    outputs, grads = outputs_and_grads(functools.partial(run, implementation="chunked"), *args)
    expected, expected_grads = outputs_and_grads(functools.partial(run, implementation="naive"), *args)
    assert_agree(outputs, expected, 1e-5)
    # The decays' own gradient vanishes when they underflow: it is compared at the scale of the others.
    scale = max(np.max(np.abs(g)) for g in expected_grads)
    assert all(np.max(np.abs(a - b)) <= 1e-5 * scale for a, b in zip(grads, expected_grads, strict=True))


@pytest.mark.slow_unless("scalar")
@pytest.mark.parametrize("kind", KINDS)
def test_float64_and_bfloat16(kind):
    with jax.enable_x64(True):
        args = operands(kind, 2, 37, 2, 3, 2, dtype=np.float64)
        expected = outputs_and_grads(functools.partial(run, implementation="naive"), *args)
        assert_agree(expected[0], loop(*args), 1e-12)
        assert_agree(
            outputs_and_grads(functools.partial(run, implementation="chunked", chunk_size=16), *args), expected, 1e-10
        )
    low = [
        x if x is None or i > 2 else jnp.asarray(x, jnp.bfloat16) for i, x in enumerate(operands(kind, 2, 300, 2, 8, 4))
    ]
    out, state = jax.jit(run)(*low)
    exact = loop(*(None if x is None else np.asarray(x, np.float64) for x in low))
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert_agree((out, state), exact, 2e-2)
    assert_agree(state, exact[1], 1e-5)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 2),
    length=st.integers(1, 90),
    heads=st.integers(1, 3),
    width=st.integers(1, 5),
    columns=st.integers(1, 4),
    split=st.integers(1, 89),
    chunk=st.sampled_from([1, 4, 32, 64]),
)
def test_any_shape_with_the_state_carried_anywhere(kind, batch, length, heads, width, columns, split, chunk):
    q, k, v, log_decay, beta, state = args = operands(kind, batch, length, heads, width, columns)
    expected = loop(*args)
    assert_agree(run(*args, chunk_size=chunk), expected, 1e-5)
    outs = []
    for piece in (slice(0, split), slice(split, None)):
        cut = lambda x, piece=piece: None if x is None else x[:, piece]
        out, state = run(*map(cut, (q, k, v, log_decay, beta)), state, chunk_size=chunk)
        outs.append(out)
    assert_agree((np.concatenate(outs, 1), state), expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_whole(kind):
    q, k, v, log_decay, beta, state = args = operands(kind, 2, 5, 2, 4, 3)
    expected = loop(*args)
    outs = []
    for t in range(5):
        at = lambda x, t=t: None if x is None else x[:, t]
        out, state = linear_attention_step(at(q), at(k), at(v), state, log_decay=at(log_decay), beta=at(beta))
        outs.append(out)
    assert_agree((np.stack(outs, 1), state), expected, 1e-6)


@pytest.mark.slow_unless("delta", "none")
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_equal_separate_runs(kind):
    lengths = (1, 15, 70, 44)
    ids = np.repeat(np.arange(len(lengths)), lengths)[None]
    args = operands(kind, 1, sum(lengths), 2, 3, 2)
    assert_agree(run(*args, ids, implementation="chunked"), loop(*args, ids), 1e-5)
    expected = outputs_and_grads(functools.partial(run, implementation="naive"), *args, ids)
    assert_agree(outputs_and_grads(functools.partial(run, implementation="chunked"), *args, ids), expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_output_does_not_move_when_later_inputs_change(kind):
    args = operands(kind, 1, 150, 2, 3, 2)
    changed = [None if x is None else x.copy() for x in args]
    for x in changed[:5]:
        if x is not None:
            x[:, 90:] *= 0.5
    assert np.array_equal(run(*args)[0][:, :90], run(*changed)[0][:, :90])


def test_normalised_outputs_are_weighted_means():
    q, k, v, log_decay, _, _ = operands("scalar", 2, 77, 2, 4, 3)
    q, k = np.abs(q) + 0.1, np.abs(k) + 0.1
    with_norm = jax.jit(functools.partial(linear_attention, normalize=True, eps=0.0))
    for decay in (None, log_decay):
        out, state = with_norm(q, k, v, log_decay=decay)
        weighted, total = (
            loop(q, k, x, decay, None, np.zeros((2, 2, 4, x.shape[-1])))[0] for x in (v, np.ones_like(v[..., :1]))
        )
        assert_agree(out, weighted / total, 1e-5)
        assert state.shape == (2, 2, 4, 4)
        constant, _ = with_norm(q, k, np.full_like(v, 3.0), log_decay=decay)
        np.testing.assert_allclose(constant, 3.0, rtol=1e-5)
    first, state = with_norm(q[:, :40], k[:, :40], v[:, :40])
    rest, _ = with_norm(q[:, 40:], k[:, 40:], v[:, 40:], initial_state=state)
    assert_agree(np.concatenate([first, rest], 1), with_norm(q, k, v)[0], 1e-5)


@pytest.mark.slow
def test_special_cases_coincide():
    q, k, v, log_decay, beta, state = operands("gated_delta", 2, 50, 2, 4, 3)
    zero = np.zeros_like(log_decay)
    plain = run(q, k, v, None, None, state)
    assert_agree(run(q, k, v, zero, None, state), plain, 1e-6)
    assert_agree(run(q, k, v, np.zeros(k.shape, np.float32), None, state), plain, 1e-6)
    assert_agree(run(q, k, v, zero, beta, state), run(q, k, v, None, beta, state), 1e-6)
    assert_agree(
        run(q, k, v, np.repeat(log_decay[..., None], 4, -1), beta, state), run(q, k, v, log_decay, beta, state), 1e-5
    )
    orthonormal = np.broadcast_to(np.eye(4, dtype=np.float32)[None, :, None], (2, 4, 2, 4))
    once = run(q[:, :4], orthonormal, v[:, :4], None, np.ones_like(beta[:, :4]), np.zeros_like(state))
    assert_agree(once, run(q[:, :4], orthonormal, v[:, :4], None, None, np.zeros_like(state)), 1e-6)


def test_the_delta_rule_stores_a_value_exactly():
    _, k, v, *_ = operands("delta", 1, 1, 1, 5, 3)
    twice = lambda x: np.repeat(x, 2, 1)
    _, state = linear_attention(twice(k), twice(k), twice(v), beta=np.ones((1, 2, 1), np.float32))
    np.testing.assert_allclose(np.einsum("kv,k->v", state[0, 0], k[0, 0, 0]), v[0, 0, 0], rtol=1e-5)


@pytest.mark.slow_unless("scalar")
@pytest.mark.parametrize("kind", ["scalar", "vector", "gated_delta"])
def test_stable_at_length_16384(kind):
    args = operands(kind, 1, 16384, 1, 2, 2)
    outputs, grads = outputs_and_grads(run, *args)
    assert_agree(outputs, loop(*args), 2e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("kind", ["scalar", "vector", "gated_delta"])
def test_lowers_for_accelerators_in_products(kind):
    args = [x for x in operands(kind, 1, 2048, 2, 4, 4) if x is not None]
    names = [
        n
        for n, x in zip(
            ("q", "k", "v", "log_decay", "beta", "initial_state"), operands(kind, 1, 4, 2, 4, 4), strict=True
        )
        if x is not None
    ]
    text = assert_lowers_everywhere(lambda *a: linear_attention(**dict(zip(names, a, strict=True))), *args)
    assert "dense<2048> : tensor<i32>" not in text, "a loop over tokens"


@pytest.mark.slow
def test_gradient_at_the_size_whose_reductions_once_crashed_the_process():
    """Vector decays, 4 x 512 tokens, 4 heads of 32 x 64: XLA:CPU's library of kernels ended the process on arrays of
    ten axes."""
    args = operands("vector", 4, 512, 4, 32, 64)
    outputs, grads = outputs_and_grads(run, *args)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((outputs, grads)))


def test_bad_input_is_named():
    q, k, v, _, beta, state = operands("gated_delta", 2, 5, 4, 3, 2)
    with pytest.raises(
        ValueError, match=r"linear_attention: k has shape \(2, 5, 4, 2\); expected \[\*B T G K\] = \(2, 5, 4, 3\)"
    ):
        linear_attention(q, k[..., :2], v)
    with pytest.raises(ValueError, match="v is of 4 heads; expected a multiple of the 3 heads"):
        linear_attention(q[:, :, :3], k[:, :, :3], v)
    with pytest.raises(ValueError, match="one for each of v, under a beta"):
        linear_attention(q[:, :, :2], k[:, :, :2], v, beta=beta)
    with pytest.raises(ValueError, match="chunk_size is 48; expected a power of two"):
        linear_attention(q, k, v, chunk_size=48)
    with pytest.raises(ValueError, match="normalize is True; expected False under the delta rule"):
        linear_attention(q, k, v, beta=beta, normalize=True)
    with pytest.raises(ValueError, match="initial_state has shape"):
        linear_attention(q, k, v, initial_state=state, normalize=True)
