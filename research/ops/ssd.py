"""State space duality: the scan of Mamba-2 as linear attention with a scalar decay per head.

    S_t = e^{dt_t A} S_{t-1} + dt_t x_t (outer) B_t        y_t = S_t C_t + skip x_t

Source: Dao and Gu 2024 (arXiv 2405.21060), sections 6 and 7; B and C are shared by the heads of a group.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.ops import checks, precision
from research.ops.linear_attention import linear_attention, linear_attention_step

OP = "ssd"


def ssd(
    x: Float[Array, "*B T H P"],
    dt: Float[Array, "*B T H"],
    A: Float[Array, " H"],
    B: Float[Array, "*B T G N"],
    C: Float[Array, "*B T G N"],
    skip: Float[Array, " H"] | None = None,
    *,
    initial_state: Float[Array, "*B H P N"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "*B T H P"], Float[Array, "*B H P N"]]:
    """Runs the state space of Mamba-2 over a sequence, in chunks of matrix products.

    Args:
      x: inputs.
      dt: step sizes, positive (after the softplus and its clamp).
      A: negative scalar per head, -exp(A_log).
      B: input maps; G groups, G divides H, head h uses group h // (H / G).
      C: output maps.
      skip: factor of the direct path x -> y ("D" in the paper).
      initial_state: state before the first token; None for zeros.
      segment_ids: packed sequences: where the id changes the state starts from zero. The first segment continues from
        `initial_state`.
      chunk_size: tokens a chunk, a power of two; 64 by default.
      implementation: "auto", "cpu", "chunked" or "naive", as in `linear_attention`.

    Returns:
      (y in the dtype of x, final state in float32 at least).

    Raises:
      ValueError: when shapes do not fit.
    """
    _check(x, dt, A, B, C, skip, initial_state, segment_ids, "*B T")
    values, log_decay = _values_and_decay(x, dt, A)
    state = None if initial_state is None else jnp.swapaxes(initial_state, -1, -2)
    y, state = linear_attention(
        C,
        B,
        values,
        log_decay=log_decay,
        scale=1.0,
        initial_state=state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    return _skip(y, x, skip), jnp.swapaxes(state, -1, -2)


def ssd_step(
    x: Float[Array, "*B H P"],
    dt: Float[Array, "*B H"],
    A: Float[Array, " H"],
    B: Float[Array, "*B G N"],
    C: Float[Array, "*B G N"],
    skip: Float[Array, " H"] | None = None,
    *,
    state: Float[Array, "*B H P N"],
) -> tuple[Float[Array, "*B H P"], Float[Array, "*B H P N"]]:
    """One token of `ssd`: the same arguments without the axis of time; returns (y, next state).

    Raises:
      ValueError: when shapes do not fit.
    """
    _check(x, dt, A, B, C, skip, state, None, "*B")
    values, log_decay = _values_and_decay(x, dt, A)
    y, state = linear_attention_step(C, B, values, jnp.swapaxes(state, -1, -2), log_decay=log_decay, scale=1.0)
    return _skip(y, x, skip), jnp.swapaxes(state, -1, -2)


def _check(x, dt, A, B, C, skip, state, segment_ids, lead):
    sizes = checks.shapes(
        OP,
        x=(x, f"{lead} H P"),
        dt=(dt, f"{lead} H"),
        A=(A, "H"),
        B=(B, f"{lead} G N"),
        C=(C, f"{lead} G N"),
        skip=(skip, "H"),
        initial_state=(state, "*B H P N"),
        segment_ids=(segment_ids, lead),
    )
    checks.require(
        sizes["H"] % sizes["G"] == 0, OP, "B", f"of {sizes['G']} groups", f"a divisor of the {sizes['H']} heads of x"
    )


def _values_and_decay(x, dt, A):
    dt = precision.wide(dt)
    return precision.wide(x) * dt[..., None], dt * precision.wide(A)


def _skip(y, x, skip):
    if skip is not None:
        y = y + precision.wide(skip)[:, None] * precision.wide(x)
    return y.astype(x.dtype)
