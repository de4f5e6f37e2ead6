"""Attention by feature maps, normalised as softmax is: cosFormer, Performer and simplified linear attention, all causal
here.

A weight exp(q.k) becomes phi(q).phi(k) >= 0, so that sums over the past are a memory of the keys' features: one matrix
a head, whose last column is the normaliser.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.errors import UserError
from research.modules import elastic
from research.modules.axes import Init, StatKind
from research.modules.mixers.base import Call, State, register
from research.modules.mixers.linear import HeadSpec, attend, empty, head_kernel, join, out_kernel, project
from research.modules.ssm import ShortConv, short_conv, short_conv_step
from research.ops import depthwise_1d, feature_maps, linear_attention
from research.ops.precision import wide

MAPS = ("positive", "relu")
EPS = 1e-6


@register
@dataclass(frozen=True)
class CosFormer(HeadSpec):
    """The model's length is part of every weight: the mixer holds that many tokens, prompt and new ones together, and
    not one more."""

    kind: ClassVar[str] = "cosformer"
    paper: ClassVar[str] = "arXiv 2202.08791"
    tiny: ClassVar[dict[str, Any]] = {"num_heads": 2}
    bounded: ClassVar[bool] = True
    ops: ClassVar[dict[str, tuple[str, ...]]] = {linear_attention.OP: linear_attention.IMPLEMENTATIONS}

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "CosFormerMixer":
        return CosFormerMixer(self, dim, length, scope, init, implementation)


@register
@dataclass(frozen=True)
class Performer(HeadSpec):
    """Keys are whole; `num_features` 0: floor(d_state ln d_state) random features, of which a sub-network keeps the
    first (choice `state`).

    `feature_map`: "positive" estimates softmax attention, "relu" is the generalised attention of the paper.
    """

    num_features: int = 0
    feature_map: str = "positive"

    renamed: ClassVar[dict[str, str]] = {"features": "num_features", "map": "feature_map"}
    kind: ClassVar[str] = "performer"
    paper: ClassVar[str] = "arXiv 2009.14794"
    tiny: ClassVar[dict[str, Any]] = {"num_heads": 2}
    ops: ClassVar[dict[str, tuple[str, ...]]] = {linear_attention.OP: linear_attention.IMPLEMENTATIONS}

    def resolve(self, dim: int) -> Self:
        self.require(self.feature_map in MAPS, f"feature_map={self.feature_map!r}; valid: {', '.join(MAPS)}")
        spec = super().resolve(dim)
        return replace(spec, num_features=self.num_features or max(1, int(spec.d_state * math.log(spec.d_state))))

    def shrink(self, width, heads, state) -> "Performer":
        features = elastic.count(state, self.num_features, "state")
        return replace(super().shrink(width, heads, None), num_features=features)

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "PerformerMixer":
        return PerformerMixer(self, dim, scope, init, implementation)


@register
@dataclass(frozen=True)
class SimplifiedLinearAttention(HeadSpec):
    """`kernel_size`: of the convolution of the values."""

    kernel_size: int = 5

    renamed: ClassVar[dict[str, str]] = {"taps": "kernel_size"}
    kind: ClassVar[str] = "sla"
    paper: ClassVar[str] = "arXiv 2405.11582"
    tiny: ClassVar[dict[str, Any]] = {"num_heads": 2}
    ops: ClassVar[dict[str, tuple[str, ...]]] = {
        depthwise_1d.OP: depthwise_1d.IMPLEMENTATIONS,
        linear_attention.OP: linear_attention.IMPLEMENTATIONS,
    }

    def build(
        self, dim: int, length: int, scope: str, init: Init, implementation: str
    ) -> "SimplifiedLinearAttentionMixer":
        return SimplifiedLinearAttentionMixer(self, dim, scope, init, implementation)


class KernelMixer(nnx.Module):
    """out(sum_j w_ij v_j / sum_j w_ij), w_ij = phi(q_i).phi(k_j); 2DK + 2DV parameters with K and V those of all heads.

    State: `memory` [B, num_heads, features, head_dim + 1], float32.

    Args:
      key_axis: role of a key's features.
      features: numbers that the map makes of a key.
    """

    def __init__(
        self, spec: HeadSpec, dim: int, key_axis: str, features: int, scope: str, init: Init, implementation: str
    ):
        self.spec, self.features, self.implementation = spec, features, implementation
        keys, values = (f"{scope}/heads", f"{scope}/{key_axis}"), (f"{scope}/heads", f"{scope}/v/head_dim")
        self.q = head_kernel("q", dim, spec.num_heads, spec.d_state, keys, init)
        self.k = head_kernel("k", dim, spec.num_heads, spec.d_state, keys, init)
        self.v = head_kernel("v", dim, spec.num_heads, spec.head_dim, values, init)
        self.out = out_kernel(dim, spec.num_heads, spec.head_dim, values, init)

    def maps(self, q: Array, k: Array, call: Call) -> tuple[Array, Array]:
        """Returns the features of queries and keys."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "B *T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B *T D"], State]:
        q, k, v = project(x, self.q, self.k, self.v, implementation=self.implementation)
        q, k = self.maps(q, k, call)
        memory = None if state is None else state["memory"]
        y, memory = attend(q, k, v, memory, call, self.implementation, scale=1.0, normalize=True, eps=EPS)
        return join(y, self.out), {"memory": memory}

    def step(self, x: Float[Array, "B D"], call: Call, state: State) -> tuple[Float[Array, "B D"], State]:
        return self(x, call, state)

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> State:
        return empty(batch, self.spec.num_heads, self.features, self.spec.head_dim + 1)


class CosFormerMixer(KernelMixer):
    """w_ij = relu(q_i).relu(k_j) cos(pi (i - j) / (2 length)) (Qin et al. 2022, arXiv 2202.08791, section 3.2).

    The sum of weights is at least 1e-6, as in the released code: rounding makes products of far tokens slightly
    negative.
    """

    def __init__(self, spec: CosFormer, dim: int, length: int, scope: str, init: Init, implementation: str):
        super().__init__(spec, dim, "state", 2 * spec.d_state, scope, init, implementation)
        self.length = length

    def maps(self, q: Array, k: Array, call: Call) -> tuple[Array, Array]:
        in_time = q.ndim == 4
        positions = call.position + jnp.arange(q.shape[1] if in_time else 1)
        whole = lambda x: wide(x if in_time else x[:, None])
        q, k = (feature_maps.cos_reweighted(whole(x), positions, self.length) for x in (q, k))
        return (q, k) if in_time else (q[:, 0], k[:, 0])

    def __call__(
        self, x: Float[Array, "B *T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B *T D"], State]:
        if x.ndim == 3 and isinstance(call.position, int):
            self._check(call.position + x.shape[1])
        q, k, v = project(x, self.q, self.k, self.v, implementation=self.implementation)
        q, k = self.maps(q, k, call)
        columns = jnp.concatenate([wide(v), jnp.ones_like(v[..., :1], wide(v).dtype)], -1)
        y, memory = attend(
            q, k, columns, None if state is None else state["memory"], call, self.implementation, scale=1.0
        )
        y = y[..., :-1] / jnp.maximum(y[..., -1:], EPS)
        return join(y.astype(x.dtype), self.out), {"memory": memory}

    def _check(self, tokens: int) -> None:
        if tokens > self.length:
            raise UserError(
                f"mixer cosformer: {tokens} tokens; valid: up to length={self.length}, which is part of every weight"
            )


class PerformerMixer(KernelMixer):
    """phi of orthogonal random features (FAVOR+, Choromanski et al. 2021, arXiv 2009.14794, sections 2.3, 2.4 and 4).

    The directions are a statistic, drawn once and shared by all heads, so that training, prefill and decoding use the
    same. A query's exponents are stabilised by their largest, those of keys by a constant (0, for all heads): a maximum
    over the sequence, as in the released code, tells a causal attention about the future.
    """

    def __init__(self, spec: Performer, dim: int, scope: str, init: Init, implementation: str):
        super().__init__(spec, dim, "qk/head_dim", spec.num_features, scope, init, implementation)
        self.map = spec.feature_map
        draw = lambda key, shape, dtype: feature_maps.orthogonal_projection(key, *shape).astype(dtype)
        axes = (f"{scope}/features", f"{scope}/qk/head_dim")
        self.projection = init.stat("projection", (spec.num_features, spec.d_state), axes, draw, StatKind.CONSTANT)

    def maps(self, q: Array, k: Array, call: Call) -> tuple[Array, Array]:
        q, k, projection = wide(q), wide(k), self.projection[...]
        if self.map == "relu":
            return feature_maps.relu_random_features(q, projection), feature_maps.relu_random_features(k, projection)
        q = feature_maps.positive_random_features(q, projection, stabiliser="token")
        return q, feature_maps.positive_random_features(k, projection, stabiliser=0.0)


class SimplifiedLinearAttentionMixer(KernelMixer):
    """phi = relu, plus a depthwise convolution of the values (SLAB, Guo et al. 2024, arXiv 2405.11582, section 3.3).

    The convolution, with bias, has one filter for each feature of a value, shared by all heads: causal over time in
    place of 5x5 over an image; the paper's table of positions on the keys is left out. State: also `conv` [B,
    kernel_size - 1, num_heads * head_dim].
    """

    def __init__(self, spec: SimplifiedLinearAttention, dim: int, scope: str, init: Init, implementation: str):
        super().__init__(spec, dim, "state", spec.d_state, scope, init, implementation)
        self.conv = ShortConv(
            (spec.head_dim,),
            (f"{scope}/v/head_dim",),
            init.child("conv"),
            kernel_size=spec.kernel_size,
            implementation=implementation,
        )

    def maps(self, q: Array, k: Array, call: Call) -> tuple[Array, Array]:
        return feature_maps.relu(q), feature_maps.relu(k)

    def __call__(
        self, x: Float[Array, "B *T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B *T D"], State]:
        state = state or {}
        q, k, v = project(x, self.q, self.k, self.v, implementation=self.implementation)
        q, k = self.maps(q, k, call)
        y, memory = attend(q, k, v, state.get("memory"), call, self.implementation, scale=1.0, normalize=True, eps=EPS)
        kernel, bias = self.conv.flat()
        kernel, bias = (
            jnp.tile(kernel, self.spec.num_heads),
            None if bias is None else jnp.tile(bias, self.spec.num_heads),
        )
        flat = v.reshape(*x.shape[:-1], -1)
        if x.ndim == 2:
            local, conv = short_conv_step(flat, kernel, bias, state["conv"], activation=False)
        else:
            local, conv = short_conv(
                flat,
                kernel,
                bias,
                call.segment_ids,
                state.get("conv"),
                activation=False,
                implementation=self.implementation,
            )
        return join(y + local.reshape(v.shape), self.out), {"conv": conv, "memory": memory}

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> State:
        conv = jnp.zeros((batch, self.conv.kernel_size - 1, self.spec.num_heads * self.spec.head_dim), dtype)
        return {"conv": conv, **super().init_state(batch, capacity, dtype)}
