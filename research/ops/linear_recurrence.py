"""The diagonal linear recurrence h_t = a_t h_{t-1} + b_t, forwards or backwards in time, in three parallelisations.

All implementations share one hand-written gradient: with g_t = dL/dh_t, g_t = dh_t + a_{t+1} g_{t+1} is the same
recurrence run the other way (Martin and Cundy 2018, arXiv 1709.04057, section 2.2), so that only a and the states are
kept. Nothing is ever divided by a product of decays: those underflow.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from research.ops import checks, dispatch, precision

OP = "linear_recurrence"
IMPLEMENTATIONS = ("naive", "sequential", "chunked", "associative")
CHUNK = 64


def combine(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
    """Composes two steps h -> a h + b, the earlier one applied first; associative, for `lax.associative_scan`."""
    return later[0] * earlier[0], later[0] * earlier[1] + later[1]


def linear_recurrence(
    a: Float[Array, "*#S"],
    b: Float[Array, "*S"],
    initial_state: Float[Array, "..."] | None = None,
    *,
    axis: int = 1,
    reverse: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "*S"], Float[Array, "..."]]:
    """Returns all states of h_t = a_t h_{t-1} + b_t, elementwise, and the last one.

    Args:
      a: decays, any real numbers; axes of size 1 are broadcast against b (a scalar decay of a vector or matrix state),
        time is not.
      b: inputs; time on `axis`, anything on the others.
      initial_state: b without the time axis; None for zeros.
      axis: the axis of time, which may not be negative.
      reverse: run from the last step to the first: h_t = a_t h_{t+1} + b_t, and the last state is that of step 0.
      implementation: "auto" (by platform), "cpu", "sequential" (a loop over time: the fastest on a CPU at any shape),
        "chunked" (a loop over the steps of all chunks of 64 at once, then one over chunks), "associative" (logarithmic
        depth) or "naive" (a loop, gradient by autodiff).

    Returns:
      (states like b, last state), in the dtype of b; computed in float32 at least. Differentiable once, in reverse.

    Raises:
      ValueError: when shapes do not fit or the implementation is unknown.
    """
    implementation = dispatch.resolve(implementation, OP, IMPLEMENTATIONS)
    checks.require(0 <= axis < b.ndim, OP, "axis", axis, f"an axis of b, which has {b.ndim}")
    fits = (
        a.ndim == b.ndim
        and a.shape[axis] == b.shape[axis]
        and all(m in (1, n) for m, n in zip(a.shape, b.shape, strict=True))
    )
    checks.require(fits, OP, "a", f"of shape {a.shape}", f"the shape of b, {b.shape}, or 1 on axes other than {axis}")
    state_shape = b.shape[:axis] + b.shape[axis + 1 :]
    if initial_state is None:
        initial_state = jnp.zeros(state_shape, precision.wide(b).dtype)
    checks.require(
        initial_state.shape == state_shape, OP, "initial_state", f"of shape {initial_state.shape}", str(state_shape)
    )
    if b.shape[axis] == 0:
        return b, initial_state.astype(b.dtype)

    a_, b_ = (jnp.moveaxis(precision.wide(x), axis, 0) for x in (a, b))
    states = _run(implementation, a_, b_, precision.wide(initial_state), reverse)
    last = states[0 if reverse else -1]
    return jnp.moveaxis(states, 0, axis).astype(b.dtype), last.astype(b.dtype)


def _run(implementation, a, b, h0, reverse):
    if implementation == "naive":
        return _sequential(a, b, h0, reverse)
    return _states(implementation, reverse, a, b, h0)


def _sequential(a, b, h0, reverse):
    def step(h, step_in):
        a_t, b_t = step_in
        h = a_t * h + b_t
        return h, h

    return lax.scan(step, h0, (a, b), reverse=reverse)[1]


def _associative(a, b, h0, reverse):
    a = jnp.broadcast_to(a, b.shape)
    first = -1 if reverse else 0
    b = b.at[first].add(a[first] * h0)
    return lax.associative_scan(combine, (a, b), reverse=reverse)[1]


def _chunked(a, b, h0, reverse):
    """All chunks run at once from zero; then their last states are chained; then each gets what came before it."""
    length = b.shape[0]
    pad = -length % CHUNK
    at_end = (0, 0) if not pad else ((pad, 0) if reverse else (0, pad))
    a = jnp.pad(a, (at_end, *[(0, 0)] * (a.ndim - 1)), constant_values=1)
    b = jnp.pad(b, (at_end, *[(0, 0)] * (b.ndim - 1)))
    # [chunks, CHUNK, ...] with the step first: one scan over steps runs all chunks
    a, b = (jnp.swapaxes(x.reshape(-1, CHUNK, *x.shape[1:]), 0, 1) for x in (a, b))

    def step(carry, step_in):
        decay, h = carry
        a_t, b_t = step_in
        carry = decay * a_t, a_t * h + b_t
        return carry, carry

    start = jnp.ones_like(a[0]), jnp.zeros_like(b[0])
    (total, last), (decay, states) = lax.scan(step, start, (a, b), reverse=reverse)
    carried = _sequential(total, last, h0, reverse)
    before = jnp.concatenate([carried[1:], h0[None]] if reverse else [h0[None], carried[:-1]])
    states = jnp.swapaxes(states + decay * before, 0, 1).reshape(-1, *b.shape[2:])
    return states[pad:] if reverse else states[:length]


_IMPLEMENTATIONS = {"sequential": _sequential, "chunked": _chunked, "associative": _associative}


def _recur(implementation, a, b, h0, reverse):
    """The platform is chosen inside each direction: a differentiated choice would keep what every platform's branch
    keeps."""
    if implementation in _IMPLEMENTATIONS:
        return _IMPLEMENTATIONS[implementation](a, b, h0, reverse)
    run = lambda name: functools.partial(_IMPLEMENTATIONS[name], reverse=reverse)
    return dispatch.per_platform(implementation, run("sequential"), run("associative"), a, b, h0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _states(implementation, reverse, a, b, h0):
    return _recur(implementation, a, b, h0, reverse)


def _states_fwd(implementation, reverse, a, b, h0):
    states = _states(implementation, reverse, a, b, h0)
    return states, (a, states, h0)


def _states_bwd(implementation, reverse, residuals, d_states):
    a, states, h0 = residuals
    # The state at t reaches the next one through its decay; the step after the last is given a decay that no state
    # meets.
    ones = jnp.ones_like(a[:1])
    a_next = jnp.concatenate([ones, a[:-1]] if reverse else [a[1:], ones])
    g = _recur(implementation, a_next, d_states, jnp.zeros_like(h0), not reverse)
    before = jnp.concatenate([states[1:], h0[None]] if reverse else [h0[None], states[:-1]])
    first = -1 if reverse else 0
    d_a = g * before
    summed = [i for i, (m, n) in enumerate(zip(a.shape, d_a.shape, strict=True)) if m != n]
    return jnp.sum(d_a, summed, keepdims=True) if summed else d_a, g, jnp.broadcast_to(a[first] * g[first], h0.shape)


_states.defvjp(_states_fwd, _states_bwd)
