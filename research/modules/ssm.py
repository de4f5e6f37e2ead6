"""The selective state space of Mamba-1 without its gate: short convolution, input-dependent step sizes and maps, scan.

Gu and Dao 2023 (arXiv 2312.00752), section 3 and the released code, whose initialisers these are. Every split of the
released projections is a kernel of its own here, so that channels, state and rank are axes with names.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from research.modules.axes import Init, Initializer, Kind
from research.modules.layers import ones
from research.modules.mesh import TENSOR_AXIS, own_size
from research.ops.depthwise_1d import causal_conv1d, causal_conv1d_step
from research.ops.precision import matmul, wide
from research.ops.selective_scan import selective_scan, selective_scan_step

State = dict[str, Array]
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


def uniform(bound: float) -> Initializer:
    """U(-bound, bound)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def torch_linear(fan_in: int) -> Initializer:
    """PyTorch's default for linear layers and convolutions: U(-1 / sqrt(fan_in), 1 / sqrt(fan_in))."""
    return uniform(1 / math.sqrt(fan_in))


def dt_bias_init(key: Array, shape: Sequence[int], dtype: Any) -> Array:
    """Inverse softplus of step sizes that are log-uniform in [0.001, 0.1]."""
    steps = jnp.exp(jax.random.uniform(key, tuple(shape), jnp.float32, math.log(DT_MIN), math.log(DT_MAX)))
    steps = jnp.maximum(steps, DT_FLOOR)
    return (steps + jnp.log(-jnp.expm1(-steps))).astype(dtype)


def a_log_init(key: Array, shape: Sequence[int], dtype: Any) -> Array:
    """log(1), ..., log(N) along the last axis (S4D-real)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1.0, shape[-1] + 1)), tuple(shape)).astype(dtype)


class ShortConv(nnx.Module):
    """Causal depthwise convolution over time, then SiLU; its state is the last `kernel_size - 1` inputs.

    Args:
      shape: sizes of the channel axes, of which there may be several.
      axes: their names.
      activation: False leaves the SiLU out.
    """

    def __init__(
        self,
        shape: Sequence[int],
        axes: Sequence[str],
        init: Init,
        *,
        kernel_size: int = 4,
        bias: bool = True,
        activation: bool = True,
        implementation: str = "auto",
    ):
        self.kernel_size, self.activation, self.implementation = kernel_size, activation, implementation
        self.kernel = init.param(
            "kernel", (kernel_size, *shape), ("taps", *axes), torch_linear(kernel_size), Kind.DEPTHWISE
        )
        self.bias = (
            init.param("bias", tuple(shape), tuple(axes), torch_linear(kernel_size), Kind.BIAS) if bias else None
        )

    def flat(self) -> tuple[Float[Array, "K C"], Float[Array, " C"] | None]:
        """Returns kernel and bias with all channels on one axis."""
        kernel = self.kernel[...].reshape(self.kernel_size, -1)
        return kernel, None if self.bias is None else self.bias[...].reshape(-1)

    def __call__(
        self,
        x: Float[Array, "B T C"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: Float[Array, "B S C"] | None = None,
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B S C"]]:
        return short_conv(
            x, *self.flat(), segment_ids, state, activation=self.activation, implementation=self.implementation
        )

    def step(
        self, x: Float[Array, "B C"], state: Float[Array, "B S C"]
    ) -> tuple[Float[Array, "B C"], Float[Array, "B S C"]]:
        return short_conv_step(x, *self.flat(), state, activation=self.activation)


def short_conv(x, kernel, bias, segment_ids=None, state=None, *, activation: bool = True, implementation: str = "auto"):
    """Causal depthwise convolution, bias and SiLU as a function, for several convolutions side by side; returns (y,
    state)."""
    y, state = causal_conv1d(x, kernel.astype(x.dtype), state, segment_ids=segment_ids, implementation=implementation)
    y = y if bias is None else y + bias
    return (jax.nn.silu(y) if activation else y), state


def short_convs(
    xs: Sequence[Float[Array, "B T _"]],
    convs: Sequence[ShortConv],
    segment_ids: Int[Array, "B T"] | None = None,
    state: Float[Array, "B S C"] | None = None,
    *,
    implementation: str = "auto",
) -> tuple[list[Float[Array, "B T _"]], Float[Array, "B S C"]]:
    """Several convolutions, each of an input of its own; returns (outputs, state of all their channels side by side).

    They are one convolution of all channels, but where channels are cut over devices: side by side they would be cut
    elsewhere.
    """
    if own_size(TENSOR_AXIS) > 1:
        states = [None] * len(xs) if state is None else jnp.split(state, _cuts(xs), -1)
        each = [
            short_conv(x, *conv.flat(), segment_ids, before, implementation=implementation)
            for x, conv, before in zip(xs, convs, states, strict=True)
        ]
        return [y for y, _ in each], jnp.concatenate([after for _, after in each], -1)
    y, state = short_conv(
        jnp.concatenate(xs, -1), *_side_by_side(convs), segment_ids, state, implementation=implementation
    )
    return jnp.split(y, _cuts(xs), -1), state


def short_convs_step(xs: Sequence[Float[Array, "B _"]], convs: Sequence[ShortConv], state: Float[Array, "B S C"]):
    """One step of `short_convs`."""
    y, state = short_conv_step(jnp.concatenate(xs, -1), *_side_by_side(convs), state)
    return jnp.split(y, _cuts(xs), -1), state


def _cuts(xs: Sequence[Array]) -> list[int]:
    """Where the channels of one input end and those of the next begin."""
    return list(itertools.accumulate(x.shape[-1] for x in xs))[:-1]


def _side_by_side(convs: Sequence[ShortConv]) -> tuple[Float[Array, "K C"], Float[Array, " C"] | None]:
    """Kernel and bias of several convolutions as one; all have a bias or none has."""
    kernels, biases = zip(*(conv.flat() for conv in convs), strict=True)
    return jnp.concatenate(kernels, -1), None if biases[0] is None else jnp.concatenate(biases)


def short_conv_step(x, kernel, bias, state, *, activation: bool = True):
    """One step of `short_conv`."""
    y, state = causal_conv1d_step(x, kernel.astype(x.dtype), state)
    y = y if bias is None else y + bias
    return (jax.nn.silu(y) if activation else y), state


class SelectiveSSM(nnx.Module):
    """[B, T, E] -> [B, T, E]: convolution and SiLU, then y = scan(x, softplus(dt), -exp(A_log), B, C) + D x.

    Parameters: 5 E + E (R + 2 N) + R E + E + E N + E. State: `conv` [B, d_conv - 1, E] and `ssm` [B, E, N], float32.

    Args:
      d_inner, d_state, dt_rank: E, N and R.
      axis: name of the inner channels' axis.
      scope: scope of the names of state and rank.
      d_conv: kernel size of the convolution.
    """

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        dt_rank: int,
        axis: str,
        scope: str,
        init: Init,
        *,
        d_conv: int = 4,
        implementation: str = "auto",
    ):
        self.d_inner, self.d_state, self.implementation = d_inner, d_state, implementation
        states, ranks = f"{scope}/state", f"{scope}/rank"
        linear = torch_linear(d_inner)
        self.conv = ShortConv(
            (d_inner,), (axis,), init.child("conv"), kernel_size=d_conv, implementation=implementation
        )
        self.dt_down = init.param("dt_down", (d_inner, dt_rank), (axis, ranks), linear, Kind.MATRIX)
        self.b = init.param("b", (d_inner, d_state), (axis, states), linear, Kind.MATRIX)
        self.c = init.param("c", (d_inner, d_state), (axis, states), linear, Kind.MATRIX)
        self.dt_up = init.param("dt_up", (dt_rank, d_inner), (ranks, axis), torch_linear(dt_rank), Kind.MATRIX)
        self.dt_bias = init.param("dt_bias", (d_inner,), (axis,), dt_bias_init, Kind.BIAS, precise=True)
        self.a_log = init.param("a_log", (d_inner, d_state), (axis, states), a_log_init, Kind.CONSTANT, precise=True)
        self.skip = init.param("skip", (d_inner,), (axis,), ones, Kind.CONSTANT, precise=True)

    def _maps(self, x: Float[Array, "*B E"]) -> tuple[Array, Array, Array, Array]:
        """Returns (delta, A, B, C) of inputs after the convolution."""
        rank = self.dt_down.shape[-1]
        kernel = jnp.concatenate([self.dt_down[...], self.b[...], self.c[...]], -1)
        dt, b, c = jnp.split(x @ kernel, (rank, rank + self.d_state), -1)
        delta = jax.nn.softplus(wide(matmul(dt, self.dt_up[...])) + self.dt_bias[...])
        return delta, -jnp.exp(self.a_log[...]), b, c

    def __call__(
        self, x: Float[Array, "B T E"], segment_ids: Int[Array, "B T"] | None = None, state: State | None = None
    ) -> tuple[Float[Array, "B T E"], State]:
        state = state or {}
        x, conv = self.conv(x, segment_ids, state.get("conv"))
        y, ssm = selective_scan(
            x,
            *self._maps(x),
            self.skip[...],
            initial_state=state.get("ssm"),
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        return y, {"conv": conv, "ssm": ssm}

    def step(self, x: Float[Array, "B E"], state: State) -> tuple[Float[Array, "B E"], State]:
        x, conv = self.conv.step(x, state["conv"])
        y, ssm = selective_scan_step(x, *self._maps(x), self.skip[...], state=state["ssm"])
        return y.astype(x.dtype), {"conv": conv, "ssm": ssm}

    def init_state(self, batch: int, dtype: Any = jnp.float32) -> State:
        """Zeros: what is before the first token."""
        return {
            "conv": jnp.zeros((batch, self.conv.kernel_size - 1, self.d_inner), dtype),
            "ssm": jnp.zeros((batch, self.d_inner, self.d_state), jnp.float32),
        }
