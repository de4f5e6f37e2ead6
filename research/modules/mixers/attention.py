"""Softmax attention to all tokens so far (Vaswani et al. 2017, section 3.2), grouped queries (Ainslie et al. 2023,
arXiv 2305.13245), RoPE.

Queries and keys may be normalised head by head (Henry et al. 2020, arXiv 2010.04245; Qwen3, arXiv 2505.09388, section
2). Its state is a cache: memory and the cost of a step grow with the capacity.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from research.modules import elastic
from research.modules.axes import Init, Kind
from research.modules.layers import normal_02
from research.modules.mixers.base import Call, Gathers, Spec, State, fused, register
from research.modules.mixers.rotary import THETA, rotary
from research.modules.norms import RMSNorm
from research.ops import attention
from research.ops.attention import softmax_attention

NOTHING = -1
"""Id of a place of a cache that holds no token; ids of documents are 0 or more."""


@register
@dataclass(frozen=True)
class Attention(Spec):
    """`num_kv_heads` 0: every head has keys and values of its own; else `num_kv_heads` groups of heads share them, and
    every sub-network keeps all groups with fewer heads each. `head_dim` 0: dim / num_heads; heads keep their size in
    every sub-network. `qk_norm`: queries and keys go through an RMSNorm over the features of a head, each with one
    scale for all heads, before RoPE. `causal`
    False: tokens see those after them too, as an encoder's do; such a layer has no state."""

    num_heads: int = 8
    num_kv_heads: int = 0
    head_dim: int = 0
    rotary: bool = True
    rope_theta: float = THETA
    qk_norm: bool = False
    qk_norm_eps: float = 1e-6
    causal: bool = True

    renamed: ClassVar[dict[str, str]] = {"heads": "num_heads", "kv_heads": "num_kv_heads", "theta": "rope_theta"}
    kind: ClassVar[str] = "attention"
    paper: ClassVar[str] = "arXiv 1706.03762"
    small: ClassVar[dict[str, Any]] = {"num_heads": 6}
    tiny: ClassVar[dict[str, Any]] = {"num_heads": 2, "head_dim": 8}
    bounded: ClassVar[bool] = True
    ops: ClassVar[dict[str, tuple[str, ...]]] = {attention.OP: attention.IMPLEMENTATIONS}

    def sees_later(self) -> bool:
        return not self.causal

    def resolve(self, dim: int) -> Self:
        self.require(self.num_heads >= 1, f"num_heads={self.num_heads}; valid: whole numbers from 1")
        self.require(
            not self.num_kv_heads or (self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0),
            f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
            f"valid: {_divisors(self.num_heads)}, or 0 for one each",
        )
        return replace(self, head_dim=head_size(self, dim))

    def shrink(self, width, heads, state) -> "Attention":
        follow = float(width) if heads is None else heads
        return replace(self, num_heads=elastic.depth_count(follow, self.num_heads, self.num_kv_heads or 1, "heads"))

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "AttentionMixer":
        return AttentionMixer(self, dim, scope, init, implementation)


def head_size(spec, dim: int) -> int:
    """The size of a head, from `head_dim` or dim / heads.

    Raises:
      UserError: the heads does not divide the width, or rotary position embedding finds an odd size.
    """
    spec.require(
        spec.head_dim > 0 or dim % spec.num_heads == 0,
        f"num_heads={spec.num_heads} does not divide the width {dim}; "
        f"valid: {_divisors(dim)}, or a head_dim of its own",
    )
    size = spec.head_dim or dim // spec.num_heads
    spec.require(not spec.rotary or size % 2 == 0, f"head_dim={size} is odd; valid: even numbers, or rotary=False")
    return size


def _divisors(n: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(max(n, 0)) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


class AttentionMixer(nnx.Module, Gathers):
    """out(attention(q, k, v)) without biases: 2 D H K + 2 D G K parameters, G = H unless grouped, and 2 K scales with
    `qk_norm`.

    State: `k` and `v` [B, S, G, K], keys after RoPE, and `ids` [B, S], the documents of the tokens. A call writes its
      tokens
    from `call.position` on; what lies behind the last token written is not read, so a caller may go back by a smaller
    position. Without `call.segment_ids` tokens continue in the document of the last token.
    """

    def __init__(self, spec: Attention, dim: int, scope: str, init: Init, implementation: str):
        self.spec, self.implementation = spec, implementation
        heads, groups, per_group = f"{scope}/heads", f"{scope}/groups", spec.num_heads // max(spec.num_kv_heads, 1)
        matched, carried = f"{scope}/qk/head_dim", f"{scope}/v/head_dim"
        kv_axis, kv = (groups, spec.num_kv_heads) if spec.num_kv_heads else (heads, spec.num_heads)
        many_axes, many = (
            ((groups, heads), (spec.num_kv_heads, per_group)) if spec.num_kv_heads else ((heads,), (spec.num_heads,))
        )
        size = spec.head_dim
        self.query = init.param("query", (dim, *many, size), ("embed", *many_axes, matched), normal_02, Kind.MATRIX)
        self.key = init.param("key", (dim, kv, size), ("embed", kv_axis, matched), normal_02, Kind.MATRIX)
        self.value = init.param("value", (dim, kv, size), ("embed", kv_axis, carried), normal_02, Kind.MATRIX)
        self.out = init.param("out", (*many, size, dim), (*many_axes, carried, "embed"), normal_02, Kind.MATRIX)
        norm = lambda tag: RMSNorm(size, matched, init.child(tag), eps=spec.qk_norm_eps) if spec.qk_norm else None
        self.query_norm, self.key_norm = norm("query_norm"), norm("key_norm")

    def __call__(
        self, x: Float[Array, "B T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        if state is not None:
            self._require_state()
        query, key, value = self.project(x, call.position + jnp.arange(x.shape[1]))
        cached = None if state is None else state["ids"]
        new = {"k": key, "v": value, "ids": documents(call.segment_ids, cached, call.position, x.shape[:2])}
        if state is None or (isinstance(call.position, int) and call.position == 0):
            y = softmax_attention(
                query,
                key,
                value,
                causal=self.spec.causal,
                segment_ids=call.segment_ids,
                implementation=self.implementation,
            )
            return self.merge(y), new if state is None else write(state, new, 0)
        state = write(state, new, call.position)
        return self.merge(self._read(query, new["ids"], state, call.position)), state

    def gathered(self, x: Float[Array, "B T D"], call: Call, axis: str) -> Float[Array, "B T D"]:
        """Attention of a sequence shard that starts at `call.position` to the keys and values of all sequence shards,
        gathered over a mesh axis."""
        query, key, value = self.project(x, call.position + jnp.arange(x.shape[1]))
        key, value = (lax.all_gather(y, axis, axis=1, tiled=True) for y in (key, value))
        places = jnp.arange(key.shape[1])
        mask = places <= call.position + jnp.arange(x.shape[1])[:, None] if self.spec.causal else None
        if call.segment_ids is not None:
            ids = lax.all_gather(call.segment_ids, axis, axis=1, tiled=True)
            same = call.segment_ids[:, :, None] == ids[:, None]
            mask = same if mask is None else mask & same
        mask = mask if mask is None or mask.ndim == 2 else mask[:, None]
        return self.merge(softmax_attention(query, key, value, mask=mask, implementation=self.implementation))

    def step(self, x: Float[Array, "B D"], call: Call, state: State) -> tuple[Float[Array, "B D"], State]:
        return one_token(self, x, call, state)

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> State:
        self._require_state()
        shape = (batch, capacity, self.key.shape[-2], self.spec.head_dim)
        return {
            "k": jnp.zeros(shape, dtype),
            "v": jnp.zeros(shape, dtype),
            "ids": jnp.full((batch, capacity), NOTHING, jnp.int32),
        }

    def _require_state(self) -> None:
        self.spec.require(
            self.spec.causal,
            "causal=False sees later tokens, so it cannot continue from a state, token by token; set causal=True",
        )

    def project(self, x: Float[Array, "B T D"], positions: Int[Array, " T"]) -> tuple[Array, Array, Array]:
        """Returns queries [B, T, H, K], keys and values [B, T, G, K], normalised where asked for and with positions
        turned in."""
        size = self.spec.head_dim
        kernels = fused(x, self.query, self.key, self.value, implementation=self.implementation)
        query, key, value = (y.reshape(*x.shape[:-1], -1, size) for y in kernels)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.spec.rotary:
            query, key = (rotary(y, positions, self.spec.rope_theta) for y in (query, key))
        return query, key, value

    def merge(self, y: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
        """The product of all heads with the output kernel."""
        return y.reshape(*y.shape[:-2], -1) @ self.out[...].reshape(-1, self.out.shape[-1])

    def _read(self, query, ids, state, position):
        """Attention of queries [B, T, H, K] of documents `ids` to the cache, in which they have been written from
        `position` on."""
        earlier = jnp.arange(state["ids"].shape[1]) <= position + jnp.arange(query.shape[1])[:, None]
        mask = earlier & (ids[:, :, None] == state["ids"][:, None])
        # One row of logits: there is nothing to leave out.
        implementation = (
            "naive" if query.shape[1] == 1 and self.implementation in ("auto", "cpu") else self.implementation
        )
        key, value = (state[name].astype(query.dtype) for name in ("k", "v"))
        return softmax_attention(query, key, value, mask=mask[:, None], implementation=implementation)


def write(state: State, new: State, position) -> State:
    """Returns the caches `state` [B, S, ...] with `new` [B, T, ...] in the places from `position` on."""
    places = {name: (0, position) + (0,) * (value.ndim - 2) for name, value in new.items()}
    return {
        name: lax.dynamic_update_slice(state[name], new[name].astype(state[name].dtype), at)
        for name, at in places.items()
    }


def documents(segment_ids: Array | None, cached: Int[Array, "B S"] | None, position, shape) -> Int[Array, "B T"]:
    """Returns the ids of the documents of new tokens, of `shape` (B, T): without `segment_ids`, that of the token
    before `position` in the cache, or 0."""
    if segment_ids is not None:
        return segment_ids.astype(jnp.int32)
    if cached is None:
        return jnp.zeros(shape, jnp.int32)
    before = lax.dynamic_slice_in_dim(cached, jnp.maximum(position - 1, 0), 1, 1)
    return jnp.broadcast_to(jnp.where(position > 0, jnp.maximum(before, 0), 0), shape)


def one_token(mixer, x: Float[Array, "B D"], call: Call, state: State) -> tuple[Float[Array, "B D"], State]:
    """A step as a piece of one token."""
    ids = None if call.segment_ids is None else call.segment_ids[:, None]
    y, state = mixer(x[:, None], replace(call, segment_ids=ids), state)
    return y[:, 0], state
