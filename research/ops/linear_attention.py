"""Linear attention in chunks: one op for no decay, scalar and vector decay, the delta rule and the gated delta rule.

The state S [K, V] of a head is a matrix that maps keys to values:

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T                                    linear attention, retention, SSD, GLA
    S'  = diag(e^{g_t}) S_{t-1};  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T     (gated) delta rule
    o_t = scale * S_t^T q_t

Sources: Katharopoulos et al. 2020 (arXiv 2006.16236, section 3.3); Yang et al. 2023 (GLA, arXiv 2312.06635, section 4:
chunks and vector decays); Dao and Gu 2024 (SSD, arXiv 2405.21060, section 6); Yang et al. 2024 (arXiv 2406.06484,
section 3, delta rule by products of matrices, and arXiv 2412.06464, section 3.3, gated). All chunks are computed at
once; only the states at their boundaries are chained. Every exponent is a sum of log decays over a segment, at most 0.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from research.ops import checks, chunk_decay, dispatch, precision
from research.ops.linear_recurrence import linear_recurrence
from research.ops.spread import spread
from research.ops.unit_lower import unit_lower_inverse

OP = "linear_attention"
IMPLEMENTATIONS = ("naive", "chunked")
CHUNK = 64
CPU_CHUNK = 32  # of vector decays and the delta rule, whose work inside a chunk grows faster with it
_CPU_TOKENS = 1024  # tokens times heads whose chunks are computed at once on a CPU: they stay in the cache
_ALL = 2**62


def linear_attention(
    q: Float[Array, "*B T G K"],
    k: Float[Array, "*B T G K"],
    v: Float[Array, "*B T H V"],
    *,
    log_decay: Float[Array, "*B T H"] | Float[Array, "*B T H K"] | None = None,
    beta: Float[Array, "*B T H"] | None = None,
    scale: float | None = None,
    initial_state: Float[Array, "*B H K _"] | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    segment_ids: Int[Array, "*B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "*B T H V"], Float[Array, "*B H K _"]]:
    """Causal linear attention with optional decay and delta rule.

    Args:
      q: queries, after their feature map. G heads; G divides H, and head h of v meets head h // (H / G) of q and k.
      k: keys, after their feature map.
      v: values.
      log_decay: g, logarithms of decays, at most 0: one a head, or one a head and key channel (then G = H).
      beta: writing strengths of the delta rule (then G = H); its keys should have unit length.
      scale: factor of q; K^-0.5 by default.
      initial_state: state before the first token; None for zeros.
      normalize: divide by scale * q_t . z_t + eps, with z_t the same recurrence over k alone. The states then have V +
        1 columns, the last of which is z. Not with beta.
      eps: added to the normaliser.
      segment_ids: packed sequences: where the id changes the state starts from zero. The first segment continues from
        `initial_state`.
      chunk_size: tokens a chunk, a power of two; by default 64, on a CPU 32 for vector decays and the delta rule.
      implementation: "auto" and "cpu" are "chunked"; "naive" is a loop over tokens with the gradient by autodiff.

    Returns:
      (outputs in the dtype of v, final state in float32 at least).

    Raises:
      ValueError: when shapes do not fit, the chunk size is no power of two, or options exclude each other.
    """
    implementation = dispatch.resolve(implementation, OP, IMPLEMENTATIONS)
    sizes = _check(q, k, v, log_decay, beta, initial_state, normalize, segment_ids)
    whole = chunk_size is None or (chunk_size > 0 and not chunk_size & (chunk_size - 1))
    checks.require(whole, OP, "chunk_size", chunk_size, "a power of two")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lead, (length, heads, width) = sizes["*B"], (sizes[name] for name in "THK")

    batch = math.prod(lead)
    flat = lambda x: precision.wide(x).reshape(batch, *x.shape[len(lead) :])
    q_, k_, v_ = flat(q), flat(k), flat(v)
    g, beta_ = None if log_decay is None else flat(log_decay), None if beta is None else flat(beta)
    if normalize:
        v_ = jnp.concatenate([v_, jnp.ones_like(v_[..., :1])], -1)
    state_shape = (heads, width, v_.shape[-1])
    state = jnp.zeros((v_.shape[0], *state_shape), v_.dtype) if initial_state is None else flat(initial_state)
    starts = None if segment_ids is None else _starts(segment_ids.reshape(batch, length))
    if implementation == "naive" or 0 in v_.shape:
        out, state = _naive(q_ * scale, k_, v_, g, beta_, state, starts)
    else:
        longest = 1 << (length - 1).bit_length()
        run = lambda tokens, size: functools.partial(_chunked, tokens, size=min(chunk_size or size, longest))
        costly = beta is not None or (g is not None and g.ndim == v_.ndim)
        on_cpu, elsewhere = run(_CPU_TOKENS, CPU_CHUNK if costly else CHUNK), run(_ALL, CHUNK)
        out, state = dispatch.per_platform(
            implementation, on_cpu, elsewhere, q_ * scale, k_, v_, g, beta_, state, starts
        )
    out = _divide(out, eps) if normalize else out
    return out.reshape(v.shape).astype(v.dtype), state.reshape(*lead, *state_shape)


def linear_attention_step(
    q: Float[Array, "*B G K"],
    k: Float[Array, "*B G K"],
    v: Float[Array, "*B H V"],
    state: Float[Array, "*B H K _"],
    *,
    log_decay: Float[Array, "*B H"] | Float[Array, "*B H K"] | None = None,
    beta: Float[Array, "*B H"] | None = None,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
) -> tuple[Float[Array, "*B H V"], Float[Array, "*B H K _"]]:
    """One token of `linear_attention`: the same arguments without the axis of time; returns (output, next state).

    Raises:
      ValueError: as `linear_attention`.
    """
    in_time = lambda x, axes: jnp.expand_dims(x, -axes)
    out, state = linear_attention(
        in_time(q, 3),
        in_time(k, 3),
        in_time(v, 3),
        log_decay=None if log_decay is None else in_time(log_decay, 2 + (log_decay.ndim - (v.ndim - 1))),
        beta=None if beta is None else in_time(beta, 2),
        initial_state=state,
        scale=scale,
        normalize=normalize,
        eps=eps,
        implementation="naive",
    )
    return jnp.squeeze(out, -3), state


def _check(q, k, v, log_decay, beta, initial_state, normalize, segment_ids) -> dict[str, Any]:
    columns = "V" if not normalize else str(v.shape[-1] + 1)
    vector = log_decay is not None and log_decay.ndim == v.ndim
    sizes = checks.shapes(
        OP,
        q=(q, "*B T G K"),
        k=(k, "*B T G K"),
        v=(v, "*B T H V"),
        log_decay=(log_decay, "*B T H K" if vector else "*B T H"),
        beta=(beta, "*B T H"),
        initial_state=(initial_state, f"*B H K {columns}"),
        segment_ids=(segment_ids, "*B T"),
    )
    groups, heads = sizes["G"], sizes["H"]
    checks.require(heads % groups == 0, OP, "v", f"of {heads} heads", f"a multiple of the {groups} heads of q and k")
    if vector or beta is not None:
        what = "vector log_decay" if vector else "beta"
        checks.require(
            groups == heads, OP, "q", f"of {groups} heads", f"{heads} heads, one for each of v, under a {what}"
        )
    checks.require(not (normalize and beta is not None), OP, "normalize", True, "False under the delta rule (beta)")
    return sizes


def _starts(ids):
    """Whether a token starts a segment [B, T]; the first never does: it continues from the initial state."""
    return jnp.concatenate([jnp.zeros_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], 1)


def _divide(out, eps):
    return out[..., :-1] / (out[..., -1:] + eps)


def _naive(q, k, v, g, beta, state, starts):
    """The definition, one token a step."""
    repeats = v.shape[2] // q.shape[2]

    def step(state, token):
        q_t, k_t, v_t, g_t, beta_t, starts_t = token
        q_t, k_t = jnp.repeat(q_t, repeats, 1), jnp.repeat(k_t, repeats, 1)
        if starts_t is not None:
            state = jnp.where(starts_t[:, None, None, None], 0, state)
        if g_t is not None:
            state = jnp.exp(g_t if g_t.ndim == 3 else g_t[..., None])[..., None] * state
        if beta_t is not None:
            v_t = beta_t[..., None] * (v_t - _product("bhkv,bhk->bhv", state, k_t))
        state = state + k_t[..., None] * v_t[..., None, :]
        return state, _product("bhkv,bhk->bhv", state, q_t)

    in_time = lambda x: None if x is None else jnp.swapaxes(x, 0, 1)
    state, out = lax.scan(step, state, tuple(map(in_time, (q, k, v, g, beta, starts))))
    return jnp.swapaxes(out, 0, 1), state


def _product(text, *operands):
    return jnp.einsum(text, *operands, precision=lax.Precision.HIGHEST)


# --- the chunked implementation. Axes: n chunks, b batch, g heads of q and k, r heads of v for each of them, c (i, j)
# tokens of a
# chunk ---


def _chunked(tokens_at_once, *operands, size):
    """Runs as many rows of the batch at once as fit the cache with one chunk each, one set of rows after the other."""
    batch, _, heads, _ = operands[2].shape
    if not dispatch.known(batch):
        return _chunked_rows(tokens_at_once, *operands, size=size)
    fitting = max(1, tokens_at_once // (heads * size))
    rows = max(n for n in range(1, min(batch, fitting) + 1) if batch % n == 0)
    if rows == batch:
        return _chunked_rows(tokens_at_once, *operands, size=size)
    sets = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), operands)
    results = lax.map(lambda one: _chunked_rows(tokens_at_once, *one, size=size), sets)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), results)


def _chunked_rows(tokens_at_once, q, k, v, g, beta, state, starts, *, size):
    """Scans over groups of chunks that fit the cache; the chunks of a group are computed at once, and again for the
    gradient."""
    batch, length, groups, width = q.shape
    repeats, columns = v.shape[2] // groups, v.shape[-1]
    vector = g is not None and g.ndim == v.ndim
    rows = batch if dispatch.known(batch) else 1
    at_once = max(1, min(tokens_at_once // (rows * groups * repeats * size), -(-length // size)))
    split = lambda x, heads: _split(x, size, at_once, heads)
    operands = (
        *(split(x, (groups, 1)) for x in (q, k)),
        *(None if x is None else split(x, (groups, repeats)) for x in (v, g, beta)),
        None if starts is None else split(starts, ())[:, :, :, None, None],
    )

    def group_step(state, group):
        q_c, k_c, v_c, g_c, beta_c, starts_c = group
        decay = chunk_decay.make(g_c, starts_c, size, vector=vector)
        out, state = (
            _additive(q_c, k_c, v_c, decay, state) if beta is None else _delta(q_c, k_c, v_c, beta_c, decay, state)
        )
        return state, out

    state = state.reshape(batch, groups, repeats, width, columns)
    state, out = lax.scan(jax.checkpoint(group_step, prevent_cse=False), state, operands)
    out = out.transpose(2, 0, 1, 5, 3, 4, 6).reshape(batch, -1, groups * repeats, columns)[:, :length]
    return out, state.reshape(batch, groups * repeats, width, columns)


def _split(x, size, at_once, heads):
    """[b, T, heads, ...] to [groups, n, b, *heads, c, ...], with zeros at the end: tokens that leave the state
    alone."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % (size * at_once)), *[(0, 0)] * (x.ndim - 2)))
    x = x.reshape(x.shape[0], -1, at_once, size, *heads, *x.shape[3 if heads else 2 :])
    before = 4 + len(heads)
    return x.transpose(1, 2, 0, *range(4, before), 3, *range(before, x.ndim))


def _times(x, factor):
    """x times a factor whose last axis is as long, or 1; None stands for ones."""
    if factor is None:
        return x
    return x * (factor if factor.shape[-1] == x.shape[-1] else spread(factor, -1, x.shape[-1]))


def _additive(q, k, v, decay, state):
    """S_t = decay S_{t-1} + k v^T: (output [n, b, g, r, c, V], final state)."""
    scores = decay.scores(q, k)
    shared = scores.shape[3] < v.shape[3]
    inside = _product("nbgij,nbgrjv->nbgriv", scores[:, :, :, 0], v) if shared else _matmul(scores, v)
    scalar = decay.leave is None or decay.leave.shape[-1] == 1
    keys, values = (k, _times(v, decay.leave)) if scalar else (k * decay.leave, v)
    written = _product("nbgck,nbgrcv->nbgrkv", keys[:, :, :, 0], values)
    before, state = _chain(decay.total, written, state)
    queries = q if scalar else q * decay.enter
    entering = _product("nbgck,nbgrkv->nbgrcv", queries[:, :, :, 0], before)
    return inside + (_times(entering, decay.enter) if scalar else entering), state


def _chain(total, written, state):
    """The states before each chunk and after the last, from what each chunk keeps of the state and what it writes."""
    keeps = (
        jnp.ones_like(written[..., :1, :1])
        if total is None
        else jnp.broadcast_to(total[..., None], (*written.shape[:-2], total.shape[-1], 1))
    )
    after, last = linear_recurrence(keeps, written, state, axis=0)
    return jnp.concatenate([state[None], after[:-1]]), last


def _delta(q, k, v, beta, decay, state):
    """The delta rule: writes within a chunk depend on each other by a triangular system, on the state before it
    linearly."""
    strictly_lower = jnp.tril(jnp.ones((q.shape[-2],) * 2, q.dtype), -1)
    solve = unit_lower_inverse(decay.scores(k * beta[..., None], k) * strictly_lower)
    writes = _matmul(solve, v * beta[..., None])
    reads = _matmul(solve, _times(k * beta[..., None], decay.enter))
    leaving = _times(k, decay.leave)

    def chunk_step(state, chunk):
        writes_c, reads_c, leaving_c, total_c = chunk
        new = writes_c - _matmul(reads_c, state)
        after = _times(state, None if total_c is None else total_c[..., None]) + _matmul(
            jnp.swapaxes(leaving_c, -1, -2), new
        )
        return after, (state, new)

    state, (before, new) = lax.scan(chunk_step, state, (writes, reads, leaving, decay.total))
    return _matmul(decay.scores(q, k), new) + _matmul(_times(q, decay.enter), before), state


def _matmul(x, y):
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
