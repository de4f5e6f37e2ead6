"""HGRN (Qin et al. 2023, arXiv 2311.04823, section 3, in the real form of the fla layer): a gated recurrence of a
vector.

The paper bounds the forget gates of layer l from below by a cumulative softmax over all layers, which grows with l and
is zero in the first one. A layer in a scanned stack does not see its neighbours: here each has a learnt bound of its
own, the sigmoid of a parameter with equally many entries, and only training makes deeper layers remember longer.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.modules import elastic
from research.modules.axes import Init, Kind
from research.modules.layers import normal_02
from research.modules.mixers.base import Call, Spec, State, fused, register
from research.modules.norms import RMSNorm
from research.modules.ssm import ShortConv
from research.ops import depthwise_1d, linear_recurrence
from research.ops.precision import wide


@register
@dataclass(frozen=True)
class HGRN(Spec):
    """`d_inner` 0: expand * dim channels; `lower_bound`: lower bound of the forget gates before training, between 0 and
    1.

    `d_conv` > 0 adds a short causal convolution of so many steps to the input, which is not in the paper: the
    mixer reads x + conv(x).
    """

    expand: float = 1.0
    d_inner: int = 0
    lower_bound: float = 0.5
    d_conv: int = 0

    renamed: ClassVar[dict[str, str]] = {"inner": "d_inner", "bound": "lower_bound", "taps": "d_conv"}
    kind: ClassVar[str] = "hgrn"
    paper: ClassVar[str] = "arXiv 2311.04823"
    ops: ClassVar[dict[str, tuple[str, ...]]] = {
        linear_recurrence.OP: linear_recurrence.IMPLEMENTATIONS,
        depthwise_1d.OP: depthwise_1d.IMPLEMENTATIONS,
    }

    def resolve(self, dim: int) -> Self:
        self.require(0 < self.lower_bound < 1, f"lower_bound={self.lower_bound}; valid: numbers between 0 and 1")
        return replace(self, d_inner=self.d_inner or round(self.expand * dim))

    def shrink(self, width, heads, state) -> "HGRN":
        return replace(self, d_inner=elastic.scaled(self.d_inner, width, 8, "width"))

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "HGRNMixer":
        return HGRNMixer(self, dim, scope, init, implementation)


class HGRNMixer(nnx.Module):
    """h_t = f h_{t-1} + (1 - f) silu(x W_i), f = lower + (1 - lower) sigmoid(x W_f); out(rms(h) * silu(x W_g)); 4DE +
    2E parameters.

    State: `hidden` [B, E], float32; with `d_conv` also `conv` [B, d_conv - 1, D], and (d_conv + 1) D parameters more.
    """

    def __init__(self, spec: HGRN, dim: int, scope: str, init: Init, implementation: str):
        self.inner, self.implementation, self.dim = spec.d_inner, implementation, dim
        inner = f"{scope}/inner"
        self.input = init.param("input", (dim, spec.d_inner), ("embed", inner), normal_02, Kind.MATRIX)
        self.forget = init.param("forget", (dim, spec.d_inner), ("embed", inner), normal_02, Kind.MATRIX)
        self.gate = init.param("gate", (dim, spec.d_inner), ("embed", inner), normal_02, Kind.MATRIX)
        logit = jax.nn.initializers.constant(math.log(spec.lower_bound / (1 - spec.lower_bound)))
        self.bound = init.param("bound", (spec.d_inner,), (inner,), logit, Kind.CONSTANT, precise=True)
        conv = lambda: ShortConv(
            (dim,),
            ("embed",),
            init.child("conv"),
            kernel_size=spec.d_conv,
            activation=False,
            implementation=implementation,
        )
        self.conv = conv() if spec.d_conv else None
        self.norm = RMSNorm(spec.d_inner, inner, init.child("norm"))
        self.out = init.param("out", (spec.d_inner, dim), (inner, "embed"), normal_02, Kind.MATRIX)

    def _gates(self, x: Float[Array, "*B D"]) -> tuple[Array, Array, Array]:
        """Returns (f, (1 - f) silu(i), output gate); the first two wide, the complement of f from its parts, so that it
        stays positive."""
        i, f, gate = fused(x, self.input, self.forget, self.gate, implementation=self.implementation)
        rest = jax.nn.sigmoid(-self.bound[...]) * jax.nn.sigmoid(-wide(f))
        return 1 - rest, rest * jax.nn.silu(wide(i)), gate

    def _read(self, hidden: Array, gate: Array) -> Array:
        return (self.norm(hidden).astype(gate.dtype) * jax.nn.silu(gate)) @ self.out[...]

    def __call__(
        self, x: Float[Array, "B *T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B *T D"], State]:
        carried = {}
        if self.conv is not None:
            y, carried["conv"] = self.conv(x, call.segment_ids, None if state is None else state["conv"])
            x = x + y
        forget, written, gate = self._gates(x)
        if call.segment_ids is not None:
            ids = call.segment_ids
            starts = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
            forget = jnp.where(starts[..., None], 0, forget)
        hidden, last = linear_recurrence.linear_recurrence(
            forget, written, None if state is None else state["hidden"], implementation=self.implementation
        )
        return self._read(hidden, gate), {"hidden": last, **carried}

    def step(self, x: Float[Array, "B D"], call: Call, state: State) -> tuple[Float[Array, "B D"], State]:
        carried = {}
        if self.conv is not None:
            y, carried["conv"] = self.conv.step(x, state["conv"])
            x = x + y
        forget, written, gate = self._gates(x)
        hidden = forget * state["hidden"] + written
        return self._read(hidden, gate), {"hidden": hidden, **carried}

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> State:
        state = {"hidden": jnp.zeros((batch, self.inner), jnp.float32)}
        return (
            state
            if self.conv is None
            else {**state, "conv": jnp.zeros((batch, self.conv.kernel_size - 1, self.dim), dtype)}
        )
