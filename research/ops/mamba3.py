"""The recurrence of Mamba-3: a decaying state written by the exponential-trapezoidal rule, read and written at rotating
angles.

    S_t = a_t S_{t-1} + (1 - l_t) dt_t a_t x_{t-1} (outer) B_{t-1} + l_t dt_t x_t (outer) B_t        a_t =
        e^{log_decay_t}
    y_t = S_t C_t + skip x_t

Source: "Mamba-3" (arXiv 2603.15569), sections 3.1 (trapezoidal rule), 3.2 (rotation) and 3.3 (several inputs and
outputs a head: R outer products are written and R vectors read in each step). l = 1 is the rule of Mamba-2. In
parallel, token s counts for all later ones with l_s dt_s + (1 - l_{s+1}) dt_{s+1}, which is linear attention; for
itself it counts with l_s dt_s alone.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from research.ops import checks, dispatch, linear_attention, precision

OP = "trapezoidal_scan"
State = dict[str, Array]


def trapezoidal_scan(
    x: Float[Array, "*B T R H P"],
    dt: Float[Array, "*B T H"],
    log_decay: Float[Array, "*B T H"],
    mix: Float[Array, "*B T H"],
    B: Float[Array, "*B T R H N"],
    C: Float[Array, "*B T R H N"],
    skip: Float[Array, " H"] | None = None,
    *,
    initial_state: State | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "*B T R H P"], State]:
    """Runs the state space of Mamba-3 over a sequence, in chunks of matrix products.

    Args:
      x: inputs; R of them a head and step (1: the plain implementation).
      dt: step sizes, positive.
      log_decay: dt A, at most 0.
      mix: l, in 0..1: how much of the input is taken at the end of a step and not at its beginning.
      B: input maps, rotated.
      C: output maps, rotated.
      skip: factor of the direct path x -> y ("D" in the paper).
      initial_state: `ssm` [*B, H, P, N], and the last token's `x` [*B, R, H, P] and `b` [*B, R, H, N]; None for zeros.
      segment_ids: packed sequences: where the id changes the state starts from zero. The first segment continues from
        `initial_state`.
      chunk_size, implementation: as in `linear_attention`; the implementation "naive" is a loop of steps.

    Returns:
      (y in the dtype of x, state after the last token, in float32 at least).

    Raises:
      ValueError: when shapes do not fit.
    """
    _check(x, dt, log_decay, mix, B, C, skip, initial_state, segment_ids, "*B T")
    dtype = x.dtype
    x, dt, log_decay, mix, B, C = map(precision.wide, (x, dt, log_decay, mix, B, C))
    if dispatch.resolve(implementation, linear_attention.OP, linear_attention.IMPLEMENTATIONS) == "naive":
        y, state = _naive(x, dt, log_decay, mix, B, C, initial_state, segment_ids)
    else:
        options = {"segment_ids": segment_ids, "chunk_size": chunk_size, "implementation": implementation}
        y, state = _parallel(x, dt, log_decay, mix, B, C, initial_state, options)
    return _skip(y, x, skip).astype(dtype), state


def trapezoidal_step(
    x: Float[Array, "*B R H P"],
    dt: Float[Array, "*B H"],
    log_decay: Float[Array, "*B H"],
    mix: Float[Array, "*B H"],
    B: Float[Array, "*B R H N"],
    C: Float[Array, "*B R H N"],
    skip: Float[Array, " H"] | None = None,
    *,
    state: State,
) -> tuple[Float[Array, "*B R H P"], State]:
    """One token of `trapezoidal_scan`: the same arguments without the axis of time; returns (y, next state).

    Raises:
      ValueError: when shapes do not fit.
    """
    _check(x, dt, log_decay, mix, B, C, skip, state, None, "*B")
    y, state = _step(state, *map(precision.wide, (x, dt, log_decay, mix, B, C)))
    return _skip(y, x, skip).astype(x.dtype), state


def wrap(turns: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns the same angles, counted in turns, between -1/2 and 1/2; the gradient is that of the identity."""
    return turns - lax.stop_gradient(jnp.round(turns))


def cumulative_turns(
    turns: Float[Array, "B T *S"], initial: Float[Array, " B *S"] | None = None
) -> Float[Array, "B T *S"]:
    """Returns the angles after each step, wrapped at every addition: precise however long the sequence is."""
    turns = wrap(turns)
    if initial is not None:
        turns = turns.at[:, 0].set(wrap(turns[:, 0] + initial))
    return lax.associative_scan(lambda a, b: wrap(a + b), turns, axis=1)


def rotate(x: Float[Array, "*#B N"], turns: Float[Array, "*#B S"]) -> Float[Array, "*_ N"]:
    """Rotates the first S pairs of neighbours (2i, 2i + 1) of the last axis, each by its own angle."""
    angles = 2 * jnp.pi * turns
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    size = 2 * turns.shape[-1]
    even, odd = x[..., 0:size:2], x[..., 1:size:2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return jnp.concatenate(
        [turned.reshape(*turned.shape[:-2], size), jnp.broadcast_to(x, (*turned.shape[:-2], x.shape[-1]))[..., size:]],
        -1,
    )


def _check(x, dt, log_decay, mix, B, C, skip, state, segment_ids, lead):
    state = state or {}
    checks.shapes(
        OP,
        x=(x, f"{lead} R H P"),
        dt=(dt, f"{lead} H"),
        log_decay=(log_decay, f"{lead} H"),
        mix=(mix, f"{lead} H"),
        B=(B, f"{lead} R H N"),
        C=(C, f"{lead} R H N"),
        skip=(skip, "H"),
        **{
            f"state {name}": (state.get(name), pattern)
            for name, pattern in (("ssm", "*B H P N"), ("x", "*B R H P"), ("b", "*B R H N"))
        },
        segment_ids=(segment_ids, lead),
    )


def _skip(y, x, skip):
    return y if skip is None else y + precision.wide(skip)[:, None] * precision.wide(x)


def _product(text, *operands):
    return jnp.einsum(text, *operands, precision=lax.Precision.HIGHEST)


def _step(state, x, dt, log_decay, mix, B, C):
    """The definition."""
    per_head = lambda factor: factor[..., None, None]
    ssm = state["ssm"] + per_head((1 - mix) * dt) * _product("...rhp,...rhn->...hpn", state["x"], state["b"])
    ssm = per_head(jnp.exp(log_decay)) * ssm + per_head(mix * dt) * _product("...rhp,...rhn->...hpn", x, B)
    return _product("...hpn,...rhn->...rhp", ssm, C), {"ssm": ssm, "x": x, "b": B}


def _zeros(x, B):
    """The state before the first token."""
    x, b = jnp.zeros_like(x[..., 0, :, :, :]), jnp.zeros_like(B[..., 0, :, :, :])
    lead, (heads, width) = x.shape[:-3], x.shape[-2:]
    return {"ssm": jnp.zeros((*lead, heads, width, b.shape[-1]), x.dtype), "x": x, "b": b}


def _naive(x, dt, log_decay, mix, B, C, state, segment_ids):
    """A loop of steps, with the gradient by autodiff."""
    axis = x.ndim - 4
    state = jax.tree.map(precision.wide, state or _zeros(x, B))
    starts = None
    if segment_ids is not None:
        starts = jnp.concatenate(
            [jnp.zeros_like(segment_ids[..., :1], bool), segment_ids[..., 1:] != segment_ids[..., :-1]], -1
        )

    def body(state, token):
        *operands, start = token
        if start is not None:
            state = jax.tree.map(
                lambda a: jnp.where(start.reshape(*start.shape, *[1] * (a.ndim - start.ndim)), 0, a), state
            )
        y, state = _step(state, *operands)
        return state, y

    in_time = lambda a: None if a is None else jnp.moveaxis(a, axis, 0)
    state, y = lax.scan(body, state, tuple(map(in_time, (x, dt, log_decay, mix, B, C, starts))))
    return jnp.moveaxis(y, 0, axis), state


def _parallel(x, dt, log_decay, mix, B, C, state, options):
    """Linear attention over R * T writes. Where R > 1, the writes of one token come one after the other, the decay
    before them."""
    *lead, time, rank, heads, _ = x.shape
    own, carried = mix * dt, (1 - mix) * dt
    later = jnp.concatenate([carried[..., 1:, :], jnp.zeros_like(carried[..., :1, :])], -2)

    in_line = lambda a: a.reshape(*lead, time * rank, *a.shape[-2:])
    values = in_line(x * (own + later)[..., None, :, None])
    decays = jnp.concatenate([log_decay[..., None, :], jnp.zeros((*lead, time, rank - 1, heads), x.dtype)], -2)
    if options["segment_ids"] is not None:
        options = options | {"segment_ids": jnp.repeat(options["segment_ids"], rank, -1)}
    before = None
    if state is not None:
        written = _product("...rhp,...rhn->...hnp", precision.wide(state["x"]), precision.wide(state["b"]))
        before = jnp.swapaxes(precision.wide(state["ssm"]), -1, -2) + carried[..., 0, :, None, None] * written
    y, ssm = linear_attention.linear_attention(
        in_line(C),
        in_line(B),
        values,
        log_decay=decays.reshape(*lead, time * rank, heads),
        scale=1.0,
        initial_state=before,
        **options,
    )
    # Within a token every read meets every write, with `own` alone: read r has met the writes up to r with `own +
    # later`.
    met = jnp.tril(jnp.ones((rank, rank), x.dtype))[..., None]
    missing = (1 - met) * own[..., None, None, :] - met * later[..., None, None, :]
    scores = _product("...rhn,...shn->...rsh", C, B) * missing
    y = y.reshape(x.shape) + _product("...rsh,...shp->...rhp", scores, x)
    return y, {"ssm": jnp.swapaxes(ssm, -1, -2), "x": x[..., -1, :, :, :], "b": B[..., -1, :, :, :]}
