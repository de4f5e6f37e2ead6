"""Depthwise 1-D convolution over time: causal or centred, whole, in pieces with carried-in state, or token by token.

Time takes the place of the rows of a map of one column, so implementations and gradients are those of `depthwise`, and
the rows of the table are its own. Its first use is the short convolution of Mamba (Gu and Dao 2023, arXiv:2312.00752,
section 3.4).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.ops import checks, depthwise, depthwise_shift, dispatch, precision
from research.ops import depthwise_geometry as geometry

OP = "depthwise_conv1d"
IMPLEMENTATIONS = depthwise.IMPLEMENTATIONS
Padding = str | tuple[int, int]


def depthwise_conv1d(
    x: Float[Array, "*B T C"],
    kernel: Float[Array, "K C"] | Float[Array, "K C M"],
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: Padding = "CAUSAL",
    segment_ids: Int[Array, "*B T"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "*B To D"]:
    """Depthwise cross-correlation over time with zero padding, as torch.nn.Conv1d(groups=C) computes it.

    Args:
      x: sequences [*B, T, C], float32, bfloat16 (sums are float32) or float64.
      kernel: one filter a channel [K, C], 1 to 63 taps, the last one the latest; [K, C, M] gives each channel M
        outputs, of which output m of channel c is channel c * M + m.
      stride: distance between outputs, in steps.
      dilation: distance between taps, in steps.
      padding: "CAUSAL" ((K - 1) * dilation zeros before, none after), "SAME", "VALID" or (low, high) zeros.
      segment_ids: number of the segment that each step belongs to; taps that reach into another count as zero. It wants
        stride 1 and padding "CAUSAL" or "SAME". Every implementation but "naive" is then "shift".
      implementation: 'auto' (by platform and shape), 'cpu' (by shape, for a CPU), or 'naive', 'shift', 'toeplitz' or
        'dft' in all directions.

    Returns:
      Sequences [*B, To, C * M] in the dtype of x. Differentiable once, in reverse.

    Raises:
      ValueError: for an unknown implementation or padding, shapes that do not fit, a kernel that is too large, a stride
        or dilation below 1.

    Source: Mamba (Gu and Dao 2023, arXiv:2312.00752), section 3.4.
    """
    implementation = _checked(x, kernel, dilation, segment_ids, implementation)
    checks.require(stride >= 1, OP, "stride", stride, "an integer of at least 1")
    _check_padding(padding)
    if segment_ids is not None:
        checks.require(padding in ("CAUSAL", "SAME"), OP, "padding", padding, '"CAUSAL" or "SAME" with segment_ids')
        checks.require(stride == 1, OP, "stride", stride, "1 with segment_ids")
    return _convolve(x, kernel, stride, dilation, padding, segment_ids, segment_ids, implementation)


def causal_conv1d(
    x: Float[Array, "*B T C"],
    kernel: Float[Array, "K C"] | Float[Array, "K C M"],
    state: Float[Array, "*B S C"] | None = None,
    *,
    dilation: int = 1,
    segment_ids: Int[Array, "*B T"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "*B T D"], Float[Array, "*B S C"]]:
    """Causal `depthwise_conv1d` of a piece of a sequence, from the inputs before it to the inputs that the next piece
    wants.

    Args:
      x: the piece [*B, T, C].
      kernel: as in `depthwise_conv1d`.
      state: the last S = (K - 1) * dilation inputs before the piece, [*B, S, C]; None for zeros. It belongs to the
        segment of the piece's first step.
      dilation: distance between taps, in steps.
      segment_ids: as in `depthwise_conv1d`.
      implementation: as in `depthwise_conv1d`.

    Returns:
      (outputs [*B, T, C * M], the state after the piece [*B, S, C], zero where an input is not of the last step's
      segment).

    Raises:
      ValueError: as in `depthwise_conv1d`, or for a state of another shape.

    Source: Mamba (Gu and Dao 2023, arXiv:2312.00752), section 3.4.
    """
    implementation = _checked(x, kernel, dilation, segment_ids, implementation)
    reach, time = dilation * (kernel.shape[0] - 1), x.shape[-2]
    if state is None:
        y = _convolve(x, kernel, 1, dilation, "CAUSAL", segment_ids, segment_ids, implementation)
        before = jnp.zeros((*x.shape[:-2], max(reach - time, 0), x.shape[-1]), x.dtype)
        latest = jnp.concatenate([before, x[..., max(time - reach, 0) :, :]], -2)
        return y, _of_last_segment(latest, segment_ids, reach)
    _check_state(x, state, reach)
    whole = jnp.concatenate([state.astype(x.dtype), x], -2)
    ids = None if segment_ids is None else jnp.concatenate([_repeat_first(segment_ids, reach), segment_ids], -1)
    y = _convolve(whole, kernel, 1, dilation, "VALID", ids, segment_ids, implementation)
    return y, _of_last_segment(whole[..., time:, :], ids, reach)


def causal_conv1d_step(
    x_t: Float[Array, "*B C"],
    kernel: Float[Array, "K C"] | Float[Array, "K C M"],
    state: Float[Array, "*B S C"],
    *,
    dilation: int = 1,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B S C"]]:
    """One step of `causal_conv1d`.

    Args:
      x_t: inputs of one step [*B, C].
      kernel: as in `depthwise_conv1d`.
      state: the last S = (K - 1) * dilation inputs [*B, S, C]; zeros at the start of a sequence.
      dilation: distance between taps, in steps.

    Returns:
      (outputs of the step [*B, C * M], the state after it [*B, S, C]).

    Raises:
      ValueError: as in `causal_conv1d`.

    Source: Mamba (Gu and Dao 2023, arXiv:2312.00752), section 3.4.
    """
    _checked(x_t[..., None, :], kernel, dilation, None, "auto")
    _check_state(x_t[..., None, :], state, dilation * (kernel.shape[0] - 1))
    whole = jnp.concatenate([state.astype(x_t.dtype), x_t[..., None, :]], -2)
    taps = precision.wide(whole[..., ::dilation, :])
    filters = kernel.reshape(*kernel.shape[:2], -1).astype(taps.dtype)
    y = (taps[..., None] * filters).sum(-3)
    return y.reshape(*x_t.shape[:-1], -1).astype(x_t.dtype), whole[..., 1:, :]


# --- checks and states ------------------------------------------------------------------------------------------------


def _checked(x, kernel, dilation, segment_ids, implementation):
    implementation = dispatch.resolve(implementation, OP, IMPLEMENTATIONS)
    pattern = "K C M" if kernel.ndim == 3 else "K C"
    checks.shapes(OP, x=(x, "*B T C"), kernel=(kernel, pattern), segment_ids=(segment_ids, "*B T"))
    checks.require(
        1 <= kernel.shape[0] <= depthwise.MAX_KERNEL_SIZE,
        OP,
        "kernel",
        kernel.shape,
        f"1 to {depthwise.MAX_KERNEL_SIZE} taps",
    )
    checks.require(dilation >= 1, OP, "dilation", dilation, "an integer of at least 1")
    return implementation


def _check_padding(padding):
    expected = '"CAUSAL", "SAME", "VALID" or (low, high) of at least 0'
    if isinstance(padding, str):
        checks.require(padding in ("CAUSAL", "SAME", "VALID"), OP, "padding", repr(padding), expected)
    else:
        checks.require(len(padding) == 2 and min(padding) >= 0, OP, "padding", padding, expected)


def _check_state(x, state, reach):
    wanted = (*x.shape[:-2], reach, x.shape[-1])
    checks.require(
        tuple(state.shape) == wanted,
        OP,
        "state",
        f"of shape {tuple(state.shape)}",
        f"[*B, (K - 1) * dilation, C] = {wanted}",
    )


def _repeat_first(ids, count):
    return jnp.broadcast_to(ids[..., :1], (*ids.shape[:-1], count))


def _of_last_segment(latest, ids, reach):
    """The last inputs with zeros where they are not of the last step's segment."""
    if ids is None or reach == 0:
        return latest
    ids = jnp.concatenate(
        [_repeat_first(ids, max(reach - ids.shape[-1], 0)), ids[..., max(ids.shape[-1] - reach, 0) :]], -1
    )
    return jnp.where((ids == ids[..., -1:])[..., None], latest, 0)


# --- maps of one column -----------------------------------------------------------------------------------------------


def _convolve(x, kernel, stride, dilation, padding, ids_in, ids_out, implementation):
    taps, time = kernel.shape[0], x.shape[-2]
    out, low = geometry.extent_and_low(time, taps, dilation, stride, padding)
    checks.require(
        out >= 1,
        OP,
        "x",
        tuple(x.shape),
        f"at least {dilation * (taps - 1) + 1} steps for a {padding} kernel of {taps} taps",
    )
    branch = geometry.Branch((taps, 1), (dilation, 1), (low, 0), (out, 1), (stride, 1))
    maps, filters = x.reshape(-1, time, 1, x.shape[-1]), kernel.reshape(taps, 1, -1)
    if ids_in is None:
        (y,) = depthwise.convolve(maps, (filters,), (branch,), implementation, OP)
    else:
        multiplier = filters.shape[-1] // x.shape[-1]
        ids = tuple(jnp.asarray(v).reshape(-1, v.shape[-1], 1, 1) for v in (ids_in, ids_out))
        arguments = (jnp.repeat(maps, multiplier, -1), filters, *ids, branch)
        y = _within_naive(*arguments) if implementation == "naive" else _within_segments(*arguments, implementation)
    return y.reshape(*x.shape[:-2], out, -1)


def _within_naive(x, kernel, ids_in, ids_out, branch):
    """The reference implementation of `_within_segments`: the inputs under each tap are gathered, and autodiff makes
    the gradients."""
    reads = jnp.arange(branch.out[0])[:, None] + branch.dilation[0] * jnp.arange(branch.size[0]) - branch.low[0]
    there, reads = (reads >= 0) & (reads < x.shape[1]), jnp.clip(reads, 0, x.shape[1] - 1)
    alike = ids_in[:, :, 0, 0][:, reads] == ids_out[:, :, 0, 0][:, :, None]
    taken = jnp.where((alike & there)[..., None], precision.wide(x)[:, reads, 0], 0)
    return jnp.einsum("btkc,kc->btc", taken, precision.wide(kernel[:, 0]), precision="highest")[:, :, None].astype(
        x.dtype
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _within_segments(x, kernel, ids_in, ids_out, branch, implementation):
    x_, kernel_ = precision.wide(x), precision.wide(kernel)
    return depthwise_shift.conv_single(x_, kernel_, branch, (ids_in, ids_out)).astype(x.dtype)


def _within_fwd(x, kernel, ids_in, ids_out, branch, implementation):
    return _within_segments(x, kernel, ids_in, ids_out, branch, implementation), (x, kernel, ids_in, ids_out)


def _within_bwd(branch, implementation, residuals, g):
    x, kernel, *ids = residuals
    x_, kernel_, g = precision.wide(x), precision.wide(kernel), precision.wide(g)
    dx = depthwise_shift.input_grad_single(kernel_, g, branch, x.shape[1:3], tuple(ids))

    def blocked(x, g, *ids):
        return depthwise_shift.weight_grad_single(x, g, branch, ids)

    def plain(x, g, *ids):
        return depthwise_shift.weight_grad_plain(x, g, branch, ids)

    implementation = "cpu" if implementation != "auto" else implementation
    dk = dispatch.per_platform(implementation, blocked, plain, x_, g, *ids)
    return dx.astype(x.dtype), dk.astype(kernel.dtype), None, None


_within_segments.defvjp(_within_fwd, _within_bwd)
