"""Activator: a gated linear unit in the place of attention (Abdullah and Aydin 2024, arXiv 2405.15953), as in the
released code.

Nothing moves between tokens: as released, what mixes them is the mean pooling before the classifier.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.modules import elastic
from research.modules.axes import Init, Kind
from research.modules.mixers.base import Call, Spec, State, fused, register
from research.modules.norms import LayerNorm
from research.modules.ssm import torch_linear


@register
@dataclass(frozen=True)
class Activator(Spec):
    """`d_inner` 0: expand * dim (the paper's CIFAR model: 512 at width 256)."""

    expand: float = 2.0
    d_inner: int = 0

    renamed: ClassVar[dict[str, str]] = {"inner": "d_inner"}
    kind: ClassVar[str] = "activator"
    paper: ClassVar[str] = "arXiv 2405.15953"
    alone: ClassVar[bool] = True

    def resolve(self, dim: int) -> Self:
        return replace(self, d_inner=self.d_inner or round(self.expand * dim))

    def shrink(self, width, heads, state) -> "Activator":
        return replace(self, d_inner=elastic.scaled(self.d_inner, width, 8, "width"))

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "ActivatorMixer":
        return ActivatorMixer(self, dim, scope, init, implementation)


class ActivatorMixer(nnx.Module):
    """out(norm(gelu(gate(x))) * norm(up(x))) with one norm for both: 3 D I + 4 I + D parameters. State: nothing."""

    def __init__(self, spec: Activator, dim: int, scope: str, init: Init, implementation: str):
        self.implementation = implementation
        inner, linear = f"{scope}/inner", torch_linear(dim)
        self.gate = init.param("gate", (dim, spec.d_inner), ("embed", inner), linear, Kind.MATRIX)
        self.gate_bias = init.param("gate_bias", (spec.d_inner,), (inner,), linear, Kind.BIAS)
        self.up = init.param("up", (dim, spec.d_inner), ("embed", inner), linear, Kind.MATRIX)
        self.up_bias = init.param("up_bias", (spec.d_inner,), (inner,), linear, Kind.BIAS)
        self.norm = LayerNorm(spec.d_inner, inner, init.child("norm"), eps=1e-5)
        self.out = init.param("out", (spec.d_inner, dim), (inner, "embed"), torch_linear(spec.d_inner), Kind.MATRIX)
        self.out_bias = init.param("out_bias", (dim,), ("embed",), torch_linear(spec.d_inner), Kind.BIAS)

    def __call__(
        self, x: Float[Array, "B *T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B *T D"], State]:
        gate, up = fused(x, self.gate, self.up, implementation=self.implementation)
        gate = jax.nn.gelu(gate + self.gate_bias[...], approximate=False)
        y = self.norm(gate) * self.norm(up + self.up_bias[...])
        return y @ self.out[...] + self.out_bias[...], {}

    def step(self, x: Float[Array, "B D"], call: Call, state: State) -> tuple[Float[Array, "B D"], State]:
        return self(x, call, state)

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> State:
        return {}
