"""Mamba-1 (Gu and Dao 2023, arXiv 2312.00752, section 3.4): gated selective state space without any MLP."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.modules import elastic
from research.modules.axes import Init, Kind
from research.modules.mixers.base import Call, Spec, State, fused, register
from research.modules.ssm import SelectiveSSM, torch_linear
from research.ops import depthwise_1d, selective_scan


@register
@dataclass(frozen=True)
class Mamba(Spec):
    """`d_inner` 0: expand * dim; `dt_rank` 0: ceil(dim / 16)."""

    d_state: int = 16
    expand: float = 2.0
    d_inner: int = 0
    dt_rank: int = 0
    d_conv: int = 4

    renamed: ClassVar[dict[str, str]] = {"state": "d_state", "inner": "d_inner", "rank": "dt_rank", "taps": "d_conv"}
    kind: ClassVar[str] = "mamba"
    paper: ClassVar[str] = "arXiv 2312.00752"
    alone: ClassVar[bool] = True
    tiny: ClassVar[dict[str, Any]] = {"d_state": 4}
    ops: ClassVar[dict[str, tuple[str, ...]]] = {
        depthwise_1d.OP: depthwise_1d.IMPLEMENTATIONS,
        selective_scan.OP: selective_scan.IMPLEMENTATIONS,
    }

    def resolve(self, dim: int) -> Self:
        return replace(
            self, d_inner=self.d_inner or round(self.expand * dim), dt_rank=self.dt_rank or math.ceil(dim / 16)
        )

    def shrink(self, width, heads, state) -> "Mamba":
        inner, rank = elastic.scaled(self.d_inner, width, 8, "width"), elastic.scaled(self.dt_rank, width, 1, "width")
        return replace(self, d_inner=inner, dt_rank=rank, d_state=elastic.count(state, self.d_state, "state"))

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "MambaMixer":
        return MambaMixer(self, dim, scope, init, implementation)


class MambaMixer(nnx.Module):
    """out(scan(conv(x W_x)) * silu(x W_z)); state as in `SelectiveSSM`."""

    def __init__(self, spec: Mamba, dim: int, scope: str, init: Init, implementation: str):
        self.implementation = implementation
        inner = f"{scope}/inner"
        self.x = init.param("x", (dim, spec.d_inner), ("embed", inner), torch_linear(dim), Kind.MATRIX)
        self.z = init.param("z", (dim, spec.d_inner), ("embed", inner), torch_linear(dim), Kind.MATRIX)
        self.ssm = SelectiveSSM(
            spec.d_inner,
            spec.d_state,
            spec.dt_rank,
            inner,
            scope,
            init.child("ssm"),
            d_conv=spec.d_conv,
            implementation=implementation,
        )
        self.out = init.param(
            "out", (spec.d_inner, dim), (inner, "embed"), torch_linear(spec.d_inner * init.branches), Kind.MATRIX
        )

    def __call__(
        self, x: Float[Array, "B T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        x, z = fused(x, self.x, self.z, implementation=self.implementation)
        y, state = self.ssm(x, call.segment_ids, state)
        return (y * jax.nn.silu(z)) @ self.out[...], state

    def step(self, x: Float[Array, "B D"], call: Call, state: State) -> tuple[Float[Array, "B D"], State]:
        x, z = fused(x, self.x, self.z, implementation=self.implementation)
        y, state = self.ssm.step(x, state)
        return (y * jax.nn.silu(z)) @ self.out[...], state

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> State:
        return self.ssm.init_state(batch, dtype)
