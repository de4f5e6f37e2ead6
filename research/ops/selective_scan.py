"""The selective scan of Mamba-1: a diagonal state space whose step size, input and output maps depend on the token.

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t        y_t = sum_n C_t[n] h_t[:, n] + skip u_t

Source: Gu and Dao 2023 (arXiv 2312.00752), algorithm 2 and section 3.3.2. The fast implementations keep the state at
  every chunk
boundary only and make the states of a chunk again in the backward pass, as section 3.3.2 proposes; the loop over steps
then holds nothing but the recurrence itself, and every sum is taken over a whole chunk at once. Channels are the last
axis of the state: sums over N and the outer products run along them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from research.ops import checks, dispatch, precision
from research.ops.linear_recurrence import combine

OP = "selective_scan"
IMPLEMENTATIONS = ("naive", "sequential", "chunked", "associative")
_SEQUENTIAL_STATES = 2**19  # numbers of a chunk's states in the sequential implementation: they stay in the cache
_CHUNK = 256  # of the chunked implementation: logarithmic depth inside, one loop over chunks


def selective_scan(
    u: Float[Array, "*B T D"],
    delta: Float[Array, "*B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "*B T N"],
    C: Float[Array, "*B T N"],
    skip: Float[Array, " D"] | None = None,
    *,
    initial_state: Float[Array, "*B D N"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "*B T D"], Float[Array, "*B D N"]]:
    """Runs the selective state space over a sequence.

    Args:
      u: inputs.
      delta: step sizes, positive (after the softplus).
      A: negative real diagonal, -exp(A_log).
      B: input maps, shared by all channels.
      C: output maps, shared by all channels.
      skip: factor of the direct path u -> y ("D" in the paper).
      initial_state: state before the first token; None for zeros.
      segment_ids: packed sequences: where the id changes the state starts from zero. The first segment continues from
        `initial_state`.
      implementation: "auto" (by platform), "cpu", "sequential" (a loop over time inside a loop over chunks, for CPUs),
        "chunked" (logarithmic depth inside chunks of 256), "associative" (logarithmic depth throughout), or "naive" (a
        loop, gradient by autodiff).

    Returns:
      (y in the dtype of u, final state in float32 at least). Differentiable once, in reverse, in all arrays.

    Raises:
      ValueError: when shapes do not fit or the implementation is unknown.
    """
    implementation = dispatch.resolve(implementation, OP, IMPLEMENTATIONS)
    sizes = checks.shapes(
        OP,
        u=(u, "*B T D"),
        delta=(delta, "*B T D"),
        A=(A, "D N"),
        B=(B, "*B T N"),
        C=(C, "*B T N"),
        skip=(skip, "D"),
        initial_state=(initial_state, "*B D N"),
        segment_ids=(segment_ids, "*B T"),
    )
    lead, (length, channels, d_state) = sizes["*B"], (sizes[name] for name in "TDN")

    def time_major(x):
        return jnp.swapaxes(precision.wide(x).reshape(-1, *x.shape[len(lead) :]), 0, 1)

    if initial_state is None:
        initial_state = jnp.zeros((*lead, channels, d_state), precision.wide(u).dtype)
    h0 = jnp.swapaxes(precision.wide(initial_state).reshape(-1, channels, d_state), 1, 2)
    keep = None
    if segment_ids is not None:
        ids = jnp.swapaxes(segment_ids.reshape(-1, length), 0, 1)
        keep = jnp.concatenate([jnp.ones_like(ids[:1]), ids[1:] == ids[:-1]]).astype(h0.dtype)
    u_, delta_ = time_major(u), time_major(delta)
    y, state = _as_two_rows(
        functools.partial(_run, implementation),
        u_,
        delta_,
        precision.wide(A).T[None],
        time_major(B),
        time_major(C),
        h0,
        keep,
    )
    if skip is not None:
        y = y + precision.wide(skip) * u_
    y = jnp.swapaxes(y, 0, 1).reshape(u.shape).astype(u.dtype)
    return y, jnp.swapaxes(state, 1, 2).reshape(*lead, channels, d_state)


def selective_scan_step(
    u: Float[Array, "*B D"],
    delta: Float[Array, "*B D"],
    A: Float[Array, "D N"],
    B: Float[Array, "*B N"],
    C: Float[Array, "*B N"],
    skip: Float[Array, " D"] | None = None,
    *,
    state: Float[Array, "*B D N"],
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D N"]]:
    """One token of `selective_scan`: returns (y, next state); same arguments without the axis of time.

    Raises:
      ValueError: when shapes do not fit.
    """
    checks.shapes(
        "selective_scan_step",
        u=(u, "*B D"),
        delta=(delta, "*B D"),
        A=(A, "D N"),
        B=(B, "*B N"),
        C=(C, "*B N"),
        skip=(skip, "D"),
        state=(state, "*B D N"),
    )
    u_, delta_, A, B, C, state = map(precision.wide, (u, delta, A, B, C, state))
    state = jnp.exp(delta_[..., None] * A) * state + (delta_ * u_)[..., None] * B[..., None, :]
    y = jnp.einsum("...dn,...n->...d", state, C, precision=lax.Precision.HIGHEST)
    if skip is not None:
        y = y + precision.wide(skip) * u_
    return y.astype(u.dtype), state


def _as_two_rows(run, u, delta, A, B, C, h0, keep):
    """Runs a batch of one as two rows with half the channels each: XLA:CPU does not vectorise the loop over the state
    of a batch of one."""
    length, rows, channels = u.shape
    if rows != 1 or channels % 2:
        return run(u, delta, A, B, C, h0, keep)
    halves = lambda x: x.reshape(*x.shape[:-2], 2, channels // 2)
    both = lambda x: None if x is None else jnp.broadcast_to(x, (length, 2, *x.shape[2:]))
    states = lambda x: jnp.swapaxes(x.reshape(-1, 2, channels // 2), 0, 1)
    y, state = run(halves(u), halves(delta), states(A), both(B), both(C), states(h0), both(keep))
    return y.reshape(u.shape), jnp.swapaxes(state, 0, 1).reshape(h0.shape)


def _run(implementation, *operands):
    if implementation == "naive":
        return _naive(*operands)
    return _scan(implementation, *operands)


def _naive(u, delta, A, B, C, h0, keep):
    """The definition, one token a step; arrays are [T, B, ...], A is [1 or B, N, D], the state [B, N, D]."""

    def step(h, token):
        u_t, delta_t, b_t, c_t, keep_t = token
        decay = jnp.exp(delta_t[:, None] * A)
        if keep_t is not None:
            decay = decay * keep_t[:, None, None]
        h = decay * h + (delta_t * u_t)[:, None] * b_t[:, :, None]
        return h, (h * c_t[:, :, None]).sum(1)

    state, y = lax.scan(step, h0, (u, delta, B, C, keep))
    return y, state


# --- the fast implementations: chunks, and one recurrence for both directions
# --------------------------------------------------


def _decay(delta, keep, A):
    decay = jnp.exp(delta[..., None, :] * A)
    return decay if keep is None else decay * keep[..., None, None]


def _states(name, decay, w, v, h0, *, reverse=False):
    """States [c, B, N, D] of h_t = decay_t h_{t-1} + w_t (outer) v_t over a chunk of c steps."""
    if name == "sequential":

        def step(h, token):
            decay_t, w_t, v_t = token
            h = decay_t * h + w_t[:, None] * v_t[:, :, None]
            return h, h

        return lax.scan(step, h0, (decay, w, v), reverse=reverse)[1]
    x = w[:, :, None] * v[..., None]
    first = -1 if reverse else 0
    x = x.at[first].add(decay[first] * h0)
    return lax.associative_scan(combine, (decay, x), reverse=reverse)[1]


def _chunk_length(name, length, state_numbers):
    if name == "associative":
        return length
    if name == "chunked":
        return min(_CHUNK, length)
    fitting = _SEQUENTIAL_STATES // state_numbers if dispatch.known(state_numbers) else 64
    return min(max(8, min(64, fitting)), length)


def _split(name, state_numbers, arrays):
    """Pads time by steps that leave the state alone (delta 0, keep 1, inputs 0) and splits it: [chunks, c, ...]
    each."""
    length = arrays[0].shape[0]
    chunk = _chunk_length(name, length, state_numbers)
    pad = -length % chunk

    def split(x, fill=0):
        if x is None:
            return None
        x = jnp.pad(x, ((0, pad), *[(0, 0)] * (x.ndim - 1)), constant_values=fill)
        return x.reshape(-1, chunk, *x.shape[1:])

    *data, keep = arrays
    return (*map(split, data), split(keep, 1))


def _join(x, length):
    return x.reshape(-1, *x.shape[2:])[:length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(implementation, u, delta, A, B, C, h0, keep):
    return _forward(implementation, u, delta, A, B, C, h0, keep)[0]


def _forward(implementation, *operands):
    """The platform is chosen inside each direction: a differentiated choice would keep what every platform's branch
    keeps."""
    length, numbers = operands[0].shape[0], operands[5].size
    rows = max(
        _chunks(name, length, numbers)
        for name in (("sequential", "chunked") if implementation in ("auto", "cpu") else (implementation,))
    )

    def forward(name):
        def run(*operands):
            outputs, boundaries = _forward_pass(name, *operands)
            return outputs, jnp.pad(boundaries, ((0, rows - len(boundaries)), *[(0, 0)] * (boundaries.ndim - 1)))

        return run

    outputs, boundaries = _per_platform(implementation, forward, *operands)
    return outputs, (*operands, boundaries)


def _backward(implementation, residuals, cotangents):
    return _per_platform(implementation, lambda name: functools.partial(_backward_pass, name), residuals, cotangents)


def _per_platform(implementation, run, *operands):
    if implementation in ("auto", "cpu"):
        return dispatch.per_platform(implementation, run("sequential"), run("chunked"), *operands)
    return run(implementation)(*operands)


def _chunks(name, length, state_numbers):
    return -(-length // _chunk_length(name, length, state_numbers))


def _forward_pass(name, u, delta, A, B, C, h0, keep):
    length = u.shape[0]

    def chunk_step(h, chunk):
        u_c, delta_c, b_c, c_c, keep_c = chunk
        states = _states(name, _decay(delta_c, keep_c, A), delta_c * u_c, b_c, h)
        return states[-1], (_contract(c_c, states), h)

    state, (y, boundaries) = lax.scan(chunk_step, h0, _split(name, h0.size, (u, delta, B, C, keep)))
    return (_join(y, length), state), boundaries


def _contract(v, states):
    """[c, B, N] with [c, B, N, D] over N."""
    return jnp.einsum("tbn,tbnd->tbd", v, states, precision=lax.Precision.HIGHEST)


def _along_channels(w, states):
    """[c, B, D] with [c, B, N, D] over D."""
    return jnp.einsum("tbd,tbnd->tbn", w, states, precision=lax.Precision.HIGHEST)


def _backward_pass(name, residuals, cotangents):
    u, delta, A, B, C, h0, keep, boundaries = residuals
    d_y, d_state = cotangents
    length = u.shape[0]
    boundaries = boundaries[: _chunks(name, length, h0.size)]

    def chunk_step(carry, chunk):
        carried, d_A = (
            carry  # dL/dh of the step before this chunk's end, already through the decay of the step after it
        )
        (u_c, delta_c, b_c, c_c, dy_c, keep_c), h = chunk
        inputs = delta_c * u_c
        decay = _decay(delta_c, keep_c, A)
        states = _states(name, decay, inputs, b_c, h)
        before = jnp.concatenate([h[None], states[:-1]])
        last = carried + dy_c[-1][:, None] * c_c[-1][:, :, None]
        g = last[None]
        if u_c.shape[0] > 1:
            g = jnp.concatenate([_states(name, decay[1:], dy_c[:-1], c_c[:-1], last, reverse=True), g])
        through_decay = g * decay * before
        d_input = _contract(b_c, g)
        d_delta = (through_decay * A).sum(2) + u_c * d_input
        d_A = d_A + (through_decay * delta_c[:, :, None]).sum((0, 1) if A.shape[0] == 1 else 0)
        grads = delta_c * d_input, d_delta, _along_channels(inputs, g), _along_channels(dy_c, states)
        return (g[0] * decay[0], d_A), grads

    chunks = _split(name, h0.size, (u, delta, B, C, d_y, keep)), boundaries
    (d_h0, d_A), grads = lax.scan(chunk_step, (d_state, jnp.zeros_like(A)), chunks, reverse=True)
    d_u, d_delta, d_B, d_C = (_join(x, length) for x in grads)
    return d_u, d_delta, d_A, d_B, d_C, d_h0, None if keep is None else jnp.zeros_like(keep)


_scan.defvjp(_forward, _backward)
