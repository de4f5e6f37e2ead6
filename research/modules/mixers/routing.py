"""Routing Transformer (Roy et al. 2021, arXiv 2003.05997, section 4): local heads and routing heads side by side in one
layer.

As in the authors' code, but for two things: local heads see a sliding window with RoPE, where the paper's see blocks
with learnt relative positions (so packed documents come out as they do alone), and routing heads know no positions.
Published settings, as (length: local + routing heads, clusters, window): Wikitext-103 (4096: 8+8, 8, 512; 1024: 8+8, 2,
512), enwik8 (8192: 4+4, 16, 512; 12288: 4+4, 48, 256), PG-19 (8192: 6+2 in the last of 22 layers, 16, 512; the others
have local heads alone, kind "window"), ImageNet-64 (12288: 12+4, 8, 2048), CIFAR-10 (3072: 4+4, 6, 512); local blocks
of 256 (128 for 12288 tokens of enwik8) see 1.5 blocks on average.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from research.modules import elastic
from research.modules.axes import Init, Kind, StatKind
from research.modules.layers import normal_02, zeros
from research.modules.mixers.attention import NOTHING, documents, head_size, one_token, write
from research.modules.mixers.base import Call, Spec, State, fused, register
from research.modules.mixers.rotary import THETA, rotary
from research.modules.mixers.window import init_window, window_attention
from research.modules.state import OncePerUpdate
from research.ops import routing_attention, sliding_window
from research.ops.precision import wide
from research.ops.routing_attention import (
    MEAN_EPS,
    CentroidState,
    cluster_sums,
    commitment_loss,
    spherical,
    update_centroids,
)

COMMITMENT = 1e-4
"""Weight of the commitment loss (section 4.1)."""


@register
@dataclass(frozen=True)
class Routing(Spec):
    """`num_heads` in all, of which `num_local_heads` are local and the rest route; `head_dim` 0: dim / num_heads.

    `num_clusters`: centroids of each routing head. `window`: tokens that each takes, about length / num_clusters.
      `local_window`: tokens that a
    local head sees. A sub-network keeps the share of local heads, the clusters and the size of heads.
    """

    num_heads: int = 8
    num_local_heads: int = 4
    head_dim: int = 0
    num_clusters: int = 8
    window: int = 512
    local_window: int = 384
    ema_decay: float = 0.999
    rotary: bool = True
    rope_theta: float = THETA

    renamed: ClassVar[dict[str, str]] = {
        "heads": "num_heads",
        "local_heads": "num_local_heads",
        "clusters": "num_clusters",
        "decay": "ema_decay",
        "theta": "rope_theta",
    }
    carries: ClassVar[bool] = False
    kind: ClassVar[str] = "routing"
    paper: ClassVar[str] = "arXiv 2003.05997"
    small: ClassVar[dict[str, Any]] = {
        "num_heads": 6,
        "num_local_heads": 3,
        "num_clusters": 8,
        "window": 64,
        "local_window": 64,
    }
    tiny: ClassVar[dict[str, Any]] = {
        "num_heads": 2,
        "num_local_heads": 1,
        "head_dim": 8,
        "num_clusters": 2,
        "window": 5,
        "local_window": 4,
    }
    bounded: ClassVar[bool] = True
    ops: ClassVar[dict[str, tuple[str, ...]]] = {
        routing_attention.OP: routing_attention.IMPLEMENTATIONS,
        sliding_window.OP: sliding_window.IMPLEMENTATIONS,
    }

    def resolve(self, dim: int) -> Self:
        for name in ("num_heads", "num_clusters", "window", "local_window"):
            self.require(vars(self)[name] >= 1, f"{name}={vars(self)[name]}; valid: whole numbers from 1")
        valid = f"0 to {self.num_heads - 1}, so that of num_heads={self.num_heads} one routes at least"
        self.require(
            0 <= self.num_local_heads < self.num_heads, f"num_local_heads={self.num_local_heads}; valid: {valid}"
        )
        return replace(self, head_dim=head_size(self, dim))

    def shrink(self, width, heads, state) -> "Routing":
        least = 1 + (self.num_local_heads > 0)
        self.require(
            not isinstance(heads, int) or heads >= least,
            f"heads={heads}; valid: {least} (one of each kind) to {self.num_heads}",
        )
        total = max(elastic.count(heads, self.num_heads, "heads", width), least)
        local = min(max(int(self.num_local_heads * total / self.num_heads + 0.5), least - 1), total - 1)
        return replace(self, num_heads=total, num_local_heads=min(local, self.num_local_heads))

    def build(self, dim: int, length: int, scope: str, init: Init, implementation: str) -> "RoutingMixer":
        return RoutingMixer(self, dim, scope, init, implementation)


class RoutingMixer(nnx.Module, OncePerUpdate):
    """local_out(window(q, k, v)) + out(routing(q, v)), queries being keys in routing heads: 4 D L K + 3 D R K
    parameters.

    In the parallel form (`state` None) a cluster takes the best tokens of the whole sequence, packed documents
    together: no token sees a later one, yet later ones and other documents can push a token out of a cluster. With a
    state every token is routed among the tokens of its document up to itself: what the parallel form gives for the last
    token of that prefix. Both are the same where `window` is at least the length.

    Statistics: `centroids`, `counts` and `sums` of the online k-means, which an update as a whole moves by `new_counts`
      and `new_sums` of its
    calls in mode "train", and `aux_loss`, the commitment loss of queries and keys times 1e-4, of the last call in mode
    "train".

    State: `q` and `v` [B, S, R, K] and `ids` [B, S] of the routing heads as in `AttentionMixer`; `local_k`, `local_v`,
      `local_ids` of the
    local ones as in `WindowMixer`.
    """

    def __init__(self, spec: Routing, dim: int, scope: str, init: Init, implementation: str):
        self.spec, self.implementation = spec, implementation
        local, routing, size = spec.num_local_heads, spec.num_heads - spec.num_local_heads, spec.head_dim

        def heads(kind, tag, count, features):
            return init.param(
                tag,
                (dim, count, size),
                ("embed", f"{scope}/{kind}/heads", f"{scope}/{kind}/{features}/head_dim"),
                normal_02,
                Kind.MATRIX,
            )

        def merge(kind, tag, count):
            return init.param(
                tag,
                (count, size, dim),
                (f"{scope}/{kind}/heads", f"{scope}/{kind}/v/head_dim", "embed"),
                normal_02,
                Kind.MATRIX,
            )

        self.query, self.value = heads("routing", "query", routing, "qk"), heads("routing", "value", routing, "v")
        self.out = merge("routing", "out", routing)
        if local:
            self.local_query, self.local_key = (
                heads("local", "local_query", local, "qk"),
                heads("local", "local_key", local, "qk"),
            )
            self.local_value = heads("local", "local_value", local, "v")
            self.local_out = merge("local", "local_out", local)
        axes = f"{scope}/routing/heads", f"{scope}/clusters", f"{scope}/routing/qk/head_dim"
        means = (routing, spec.num_clusters, size), axes, _on_sphere
        # One tag gives one draw: the sums start as the means.
        self.centroids, self.sums = (
            init.stat("centroids", *means, StatKind.STATE),
            init.stat("centroids", *means, StatKind.STATE),
        )
        self.counts = init.stat("counts", means[0][:2], axes[:2], zeros, StatKind.STATE)
        self.new_sums = init.stat("new_sums", *means[:2], zeros, StatKind.SUM)
        self.new_counts = init.stat("new_counts", means[0][:2], axes[:2], zeros, StatKind.SUM)
        self.aux_loss = init.stat("aux_loss", (), (), zeros, StatKind.LOSS)

    def __call__(
        self, x: Float[Array, "B T D"], call: Call, state: State | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        query, value, *local = self._project(x)
        y, after = self._route(query, value, call, state)
        y = y.reshape(*x.shape[:2], -1) @ self.out[...].reshape(-1, x.shape[-1])
        if local:
            z, local_state = self._local(local, call, state)
            y = y + z.reshape(*x.shape[:2], -1) @ self.local_out[...].reshape(-1, x.shape[-1])
            after |= local_state
        if call.mode == "train":
            self._learn(query, call.mask(x.shape[:2]))
        return y, after

    def step(self, x: Float[Array, "B D"], call: Call, state: State) -> tuple[Float[Array, "B D"], State]:
        return one_token(self, x, call, state)

    def init_state(self, batch: int, capacity: int, dtype: Any = jnp.float32) -> State:
        spec = self.spec
        shape = (batch, capacity, spec.num_heads - spec.num_local_heads, spec.head_dim)
        state = {
            "q": jnp.zeros(shape, dtype),
            "v": jnp.zeros(shape, dtype),
            "ids": jnp.full(shape[:2], NOTHING, jnp.int32),
        }
        if spec.num_local_heads:
            state |= _prefixed(init_window(batch, spec.local_window, spec.num_local_heads, spec.head_dim, dtype))
        return state

    def _project(self, x):
        kernels = [self.query, self.value]
        if self.spec.num_local_heads:
            kernels += [self.local_query, self.local_key, self.local_value]
        return (
            y.reshape(*x.shape[:2], -1, self.spec.head_dim)
            for y in fused(x, *kernels, implementation=self.implementation)
        )

    def _local(self, heads, call, state):
        query, key, value = heads
        if self.spec.rotary:
            positions = call.position + jnp.arange(query.shape[1])
            query, key = (rotary(y, positions, self.spec.rope_theta) for y in (query, key))
        before = None if state is None else {name: state[f"local_{name}"] for name in ("k", "v", "ids")}
        y, after = window_attention(
            query, key, value, call.segment_ids, before, self.spec.local_window, self.implementation
        )
        return y, _prefixed(after)

    def _route(self, query, value, call, state):
        centroids, window, tokens = self.centroids[...], self.spec.window, query.shape[1]
        cached = None if state is None else state["ids"]
        new = {"q": query, "v": value, "ids": documents(call.segment_ids, cached, call.position, query.shape[:2])}
        if state is None:
            mask = call.mask(query.shape[:2])
            options = dict(
                window=min(window, tokens), mask=mask, segment_ids=call.segment_ids, implementation=self.implementation
            )
            return routing_attention.routing_attention(query, None, value, centroids, **options), new
        after = write(state, new, call.position)
        places = call.position + jnp.arange(tokens)
        return route_prefixes(after["q"], after["v"], after["ids"], centroids, places, window=window).astype(
            query.dtype
        ), after

    def _learn(self, query, mask):
        """Computes the loss and adds up what the means are moved by; queries count twice, being keys too."""
        centroids = self.centroids[...]
        self.aux_loss[...] = 2 * COMMITMENT * commitment_loss(query, centroids, mask)
        counts, sums = cluster_sums(query, centroids, mask)
        self.new_counts[...] += 2 * counts
        self.new_sums[...] += 2 * sums

    def after_update(self) -> None:
        """Moves the means towards the tokens of the update, if it had any."""
        before = CentroidState(self.centroids[...], self.counts[...], self.sums[...])
        counts, sums = self.new_counts[...], self.new_sums[...]
        move = functools.partial(update_centroids, decay=self.spec.ema_decay)
        for _ in range(counts.ndim - 2):  # stacked layers
            move = jax.vmap(move)
        after = move(before, counts, sums)
        self.centroids[...], self.counts[...], self.sums[...] = jax.tree.map(
            lambda a, b: jnp.where(counts.sum() > 0, a, b), after, before
        )
        self.new_counts[...], self.new_sums[...] = jnp.zeros_like(counts), jnp.zeros_like(sums)


def route_prefixes(
    query: Float[Array, "B S H K"],
    value: Float[Array, "B S H V"],
    ids: Int[Array, "B S"],
    centroids: Float[Array, "H C K"],
    at: Int[Array, " T"],
    *,
    window: int,
) -> Float[Array, "B T H V"]:
    """What causal routing attention with shared queries and keys gives for each of the tokens `at` as the last one of
    its document.

    Args:
      query, value: of all tokens; for a token none after it is read.
      ids: documents of the tokens; only tokens of a token's own document are routed with it.
      centroids: C means per head.
      at: places of the tokens that want an output.
      window: tokens that a cluster takes, or all where there are fewer.

    Returns:
      Outputs in float32 at least, in O(S C) operations a head and token, one token after another.
    """
    normal, value = spherical(query), wide(value)
    scores = jnp.einsum("bshk,hck->bhcs", normal, wide(centroids), precision=lax.Precision.HIGHEST)
    route = functools.partial(_route_last, normal, value, ids, scores, min(window, ids.shape[1]))
    return route(at[0])[:, None] if len(at) == 1 else jnp.moveaxis(lax.map(route, at), 0, 1)


def _route_last(normal, value, ids, scores, window, at):
    """[B, H, V]; `scores` [B, H, C, S] of normalised tokens with the means."""
    own = lax.dynamic_index_in_dim(normal, at, 1, keepdims=False)
    seen = (ids == lax.dynamic_slice_in_dim(ids, at, 1, 1)) & (jnp.arange(ids.shape[1]) <= at)
    members = lax.top_k(jnp.where(seen[:, None, None], scores, jnp.finfo(scores.dtype).min), window)[1]
    took = (members == at).any(-1, keepdims=True)
    logits = jnp.einsum("bhk,bshk->bhs", own, normal)
    logits = jnp.where(seen[:, None], logits, jnp.finfo(logits.dtype).min)
    weights = jax.nn.softmax(_at(logits, members), -1)
    # What fills up a window wider than the document weighs nothing: a cluster that took the token sees the token at
    # least.
    weights = _add_up(jnp.where(took, weights, 0), members, logits)
    return jnp.einsum("bhs,bshv->bhv", weights, value) / (took.sum(2) + MEAN_EPS)


def _at(x, members):
    """Numbers [B, H, S] at the places [B, H, C, W]."""
    return jax.vmap(jax.vmap(lambda x, at: x[at]))(x, members)


def _add_up(weights, members, like):
    """Sums [B, H, S] over the clusters [B, H, C, W] that a place is in."""
    return jax.vmap(jax.vmap(lambda x, at, w: x.at[at].add(w)))(jnp.zeros_like(like), members, weights)


def _on_sphere(key, shape, dtype):
    return spherical(jax.random.normal(key, shape)).astype(dtype)


def _prefixed(state: State) -> State:
    return {f"local_{name}": value for name, value in state.items()}
