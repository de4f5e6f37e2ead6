"""Routing attention: every cluster of an online k-means attends within itself, in O(n^1.5) for about sqrt(n) clusters.

Source: Roy et al. 2021 (arXiv 2003.05997), section 4 and algorithm 1, as in the authors' code. Queries and keys are
scored against centroids; each centroid takes its `window` best tokens, whatever their number (clusters are balanced,
may overlap and may leave tokens out); a token's output is the mean over the clusters that took it.

Strictness: which tokens a cluster takes depends on the whole sequence, so with `causal` no token attends to later ones,
yet a later one can push an earlier one out of a cluster. Decode with tokens after the present one left out by `mask`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from research.ops import checks, dispatch, precision

OP = "routing_attention"
IMPLEMENTATIONS = ("naive", "gathered")
NORM_EPS = 1e-6
MEAN_EPS = 1e-2
COUNT_EPS = 1e-5


def spherical(x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """Layer normalisation over the last axis without scale or bias: a point on the sphere of radius sqrt(K), float32 at
    least."""
    x = precision.wide(x)
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + NORM_EPS)


def _scores(x, centroids):
    """[*B, H, C, T], from normalised tokens; exact to float32, since an order is read off them."""
    return jnp.einsum("...thk,hck->...hct", x, precision.wide(centroids), precision=lax.Precision.HIGHEST)


def routing_attention(
    query: Float[Array, "*B T H K"],
    key: Float[Array, "*B T H K"] | None,
    value: Float[Array, "*B T H V"],
    centroids: Float[Array, "H C K"],
    *,
    window: int,
    causal: bool = True,
    mask: Bool[Array, "*B T"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "*B T H V"]:
    """Returns for each token the mean, over the clusters that took it, of softmax attention to the cluster's tokens.

    Args:
      query: queries; normalised here by `spherical`, so that logits are plain products and need no scale.
      key: keys, normalised alike; None: the queries are the keys (shared QK).
      value: values.
      centroids: C means per head; no gradient.
      window: tokens that each cluster takes, at most T; T / C for about the same total as tokens.
      causal: a token sees none after it. Queries and keys of a cluster are sorted by position, and differ if not
        shared.
      mask: True for tokens; False for padding, which no cluster takes while it can take tokens, and which gives zeros.
      segment_ids: sequences packed on one axis see only themselves.
      implementation: see `dispatch.resolve`; the reference implementation builds [T, T] masks.

    Returns:
      Output in the dtype of the value: sum / (number of clusters + 0.01); zeros where no cluster took the token. A
      cluster in which a query sees no key does not count.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    implementation = dispatch.resolve(implementation, OP, IMPLEMENTATIONS)
    patterns = dict(
        query=(query, "*B T H K"), key=(key, "*B T H K"), value=(value, "*B T H V"), centroids=(centroids, "H C K")
    )
    sizes = checks.shapes(OP, **patterns, mask=(mask, "*B T"), segment_ids=(segment_ids, "*B T"))
    checks.require(1 <= window <= sizes["T"], OP, "window", window, f"1 to the number of tokens, {sizes['T']}")
    flat = lambda x: x.reshape(-1, *x.shape[len(sizes["*B"]) :])
    query, key, value = flat(query), None if key is None else flat(key), flat(value)
    mask, segment_ids = None if mask is None else flat(mask), None if segment_ids is None else flat(segment_ids)
    query = spherical(query)
    key = None if key is None else spherical(key)
    segments = _padding_segments(mask, segment_ids)
    query_at = _members(query, centroids, window, segments)
    key_at = query_at if key is None else _members(key, centroids, window, segments)
    attend = _naive if implementation == "naive" else _gathered
    out = attend(query, query if key is None else key, precision.wide(value), query_at, key_at, segments, causal)
    return out.astype(value.dtype).reshape(*sizes["*B"], *out.shape[1:])


def _padding_segments(mask, segment_ids):
    """One array [B, T] for both: -1 for padding."""
    if mask is None:
        return segment_ids
    return jnp.where(mask, 0 if segment_ids is None else segment_ids, -1)


def _members(x, centroids, window, segments):
    """Positions [B, H, C, W] of each cluster's best tokens, ascending."""
    scores = _scores(lax.stop_gradient(x), lax.stop_gradient(centroids))
    if segments is not None:
        scores = jnp.where((segments >= 0)[:, None, None], scores, jnp.finfo(scores.dtype).min)
    return jnp.sort(lax.top_k(scores, window)[1].astype(jnp.int32), -1)


def _naive(query, key, value, query_at, key_at, segments, causal):
    tokens = query.shape[1]
    logits = jnp.einsum("bthk,bshk->bhts", query, key)
    seen = jnp.tril(jnp.ones((tokens, tokens), bool)) if causal else jnp.ones((tokens, tokens), bool)
    if segments is not None:
        seen = seen & ((segments[:, :, None] == segments[:, None]) & (segments >= 0)[:, None])[:, None]
    total, count = jnp.zeros((), value.dtype), jnp.zeros((), jnp.int32)
    for cluster in range(query_at.shape[2]):
        took_query, took_key = (
            jnp.any(at[:, :, cluster, :, None] == jnp.arange(tokens), 2) for at in (query_at, key_at)
        )
        visible = seen & took_query[..., :, None] & took_key[..., None, :]
        weights = jax.nn.softmax(jnp.where(visible, logits, jnp.finfo(logits.dtype).min), axis=-1)
        total += jnp.einsum("bhts,bshv->bthv", jnp.where(visible, weights, 0), value)
        count += jnp.moveaxis(visible.any(-1), 1, 2)
    return total / (count + MEAN_EPS)[..., None]


def _gathered(query, key, value, query_at, key_at, segments, causal):
    tokens = query.shape[1]
    query, key, value = (jnp.moveaxis(x, 1, 2) for x in (query, key, value))
    visible = _cluster_mask(query_at, key_at, segments, causal)
    total = _cluster_attention(query, key, value, query_at, key_at, visible)
    seeing = jnp.ones(query_at.shape, value.dtype) if visible is None else visible.any(-1).astype(value.dtype)
    count = _scatter(seeing[..., None], query_at, tokens)
    return jnp.moveaxis(total / (count + MEAN_EPS), 1, 2)


def _cluster_mask(query_at, key_at, segments, causal):
    """[B, H, C, W, W], True where a query of a cluster sees a key of it; None: everywhere."""
    visible = None
    if causal:
        visible = query_at[..., :, None] >= key_at[..., None, :]
    if segments is not None:
        query_of, key_of = (jax.vmap(lambda s, i: s[i])(segments, at) for at in (query_at, key_at))
        same = (query_of[..., :, None] == key_of[..., None, :]) & (key_of >= 0)[..., None, :]
        visible = same if visible is None else visible & same
    return visible


def _rows(at, tokens):
    """The rows of an array [B * H * T, ..] that positions [B, H, C, W] mean: one flat index makes one loop of
    copies."""
    batch, heads = at.shape[:2]
    return (at + (jnp.arange(batch * heads, dtype=at.dtype) * tokens).reshape(batch, heads, 1, 1)).reshape(-1)


def _gather(x, at):
    """[B, H, T, K] to the rows [B, H, C, W, K]."""
    rows = x.reshape(-1, x.shape[-1]).at[_rows(at, x.shape[2])].get(mode="promise_in_bounds")
    return rows.reshape(*at.shape, x.shape[-1])


def _scatter(x, at, tokens):
    """[B, H, C, W, K] to sums over the rows of each token, [B, H, T, K]."""
    batch, heads = at.shape[:2]
    sums = jnp.zeros((batch * heads * tokens, x.shape[-1]), x.dtype)
    sums = sums.at[_rows(at, tokens)].add(x.reshape(-1, x.shape[-1]), mode="promise_in_bounds")
    return sums.reshape(batch, heads, tokens, x.shape[-1])


@jax.custom_vjp
def _cluster_attention(query, key, value, query_at, key_at, visible):
    """Attention within each cluster, summed over the clusters of a token: [B, H, T, V]."""
    return _cluster_forward(query, key, value, query_at, key_at, visible)[0]


def _logits(query, key, visible):
    logits = jnp.einsum("bhcik,bhcjk->bhcij", query, key)
    return logits if visible is None else jnp.where(visible, logits, 0.7 * float(jnp.finfo(logits.dtype).min))


def _cluster_forward(query, key, value, query_at, key_at, visible):
    logits = _logits(_gather(query, query_at), _gather(key, key_at), visible)
    peak = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - peak)
    sums = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bhcij,bhcjv->bhciv", weights, _gather(value, key_at)) / sums
    log_sum = peak + jnp.log(sums)
    if visible is not None:
        seeing = visible.any(-1, keepdims=True)
        out, log_sum = jnp.where(seeing, out, 0), jnp.where(seeing, log_sum, 0)
    return _scatter(out, query_at, query.shape[2]), (query, key, value, query_at, key_at, visible, out, log_sum)


def _cluster_backward(residuals, d_total):
    query, key, value, query_at, key_at, visible, out, log_sum = residuals
    query_rows, key_rows, value_rows = _gather(query, query_at), _gather(key, key_at), _gather(value, key_at)
    d_out = _gather(d_total, query_at)
    weights = jnp.exp(_logits(query_rows, key_rows, visible) - log_sum)
    d_weights = jnp.einsum("bhciv,bhcjv->bhcij", d_out, value_rows)
    d_logits = weights * (d_weights - (d_out * out).sum(-1, keepdims=True))
    d_query = jnp.einsum("bhcij,bhcjk->bhcik", d_logits, key_rows)
    d_key = jnp.einsum("bhcij,bhcik->bhcjk", d_logits, query_rows)
    d_value = jnp.einsum("bhcij,bhciv->bhcjv", weights, d_out)
    tokens = query.shape[2]
    return (
        _scatter(d_query, query_at, tokens),
        _scatter(d_key, key_at, tokens),
        _scatter(d_value, key_at, tokens),
        None,
        None,
        None,
    )


_cluster_attention.defvjp(_cluster_forward, _cluster_backward)


class CentroidState(NamedTuple):
    """Means, and the exponential averages that they come from."""

    centroids: Float[Array, "H C K"]
    counts: Float[Array, "H C"]
    sums: Float[Array, "H C K"]


def init_centroids(key: Array, heads: int, clusters: int, head_dim: int) -> CentroidState:
    """Gaussian means on the sphere of radius sqrt(head_dim), counts of zero, sums that equal the means."""
    centroids = spherical(jax.random.normal(key, (heads, clusters, head_dim)))
    return CentroidState(centroids, jnp.zeros((heads, clusters), centroids.dtype), centroids)


def assign(x: Float[Array, "*B T H K"], centroids: Float[Array, "H C K"]) -> Int[Array, "*B T H"]:
    """The cluster of the largest product with the normalised token: what statistics and the loss are of."""
    return _assign(spherical(x), centroids)


def _assign(normal, centroids):
    return jnp.moveaxis(jnp.argmax(_scores(normal, centroids), -2), -1, -2)


def cluster_sums(
    x: Float[Array, "*B T H K"], centroids: Float[Array, "H C K"], mask: Bool[Array, "*B T"] | None = None
) -> tuple[Float[Array, "H C"], Float[Array, "H C K"]]:
    """Number and sum of the normalised tokens of each cluster: add them up over queries and keys, and over devices.

    Args:
      x: queries or keys.
      centroids: the means that tokens are assigned by.
      mask: False for padding, which does not count.

    Returns:
      Counts and sums, float32 at least, without gradient.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    checks.shapes("cluster_sums", x=(x, "*B T H K"), centroids=(centroids, "H C K"), mask=(mask, "*B T"))
    normal = spherical(lax.stop_gradient(x))
    centroids = lax.stop_gradient(centroids)
    member = jax.nn.one_hot(_assign(normal, centroids), centroids.shape[1], dtype=normal.dtype)
    member = member if mask is None else member * mask[..., None, None]
    member, normal = (a.reshape(-1, *a.shape[-2:]) for a in (member, normal))
    return member.sum(0), jnp.einsum("thc,thk->hck", member, normal, precision=lax.Precision.HIGHEST)


def update_centroids(
    state: CentroidState, counts: Float[Array, "H C"], sums: Float[Array, "H C K"], *, decay: float = 0.999
) -> CentroidState:
    """The next means: averages of sums over smoothed averages of counts; the means are not normalised again.

    Args:
      state: the state before.
      counts: tokens of each cluster in this step, from `cluster_sums`.
      sums: their sums.
      decay: weight of the averages before.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    checks.shapes(
        "update_centroids", centroids=(state.centroids, "H C K"), counts=(counts, "H C"), sums=(sums, "H C K")
    )
    new_counts = decay * state.counts + (1 - decay) * counts
    new_sums = decay * state.sums + (1 - decay) * sums
    total = new_counts.sum(-1, keepdims=True)
    smooth = (new_counts + COUNT_EPS) / (total + counts.shape[-1] * COUNT_EPS) * total
    return CentroidState((new_sums / smooth[..., None]).astype(state.centroids.dtype), new_counts, new_sums)


def commitment_loss(
    x: Float[Array, "*B T H K"], centroids: Float[Array, "H C K"], mask: Bool[Array, "*B T"] | None = None
) -> Float[Array, ""]:
    """Mean square of the distance of the normalised tokens to the means of their clusters; no gradient to the means.

    Args:
      x: queries or keys; for both, add the two losses (twice the one under shared QK), times 1e-4.
      centroids: the means.
      mask: False for padding, which does not count.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    checks.shapes("commitment_loss", x=(x, "*B T H K"), centroids=(centroids, "H C K"), mask=(mask, "*B T"))
    normal = spherical(x)
    centroids = precision.wide(lax.stop_gradient(centroids))
    member = jax.nn.one_hot(_assign(lax.stop_gradient(normal), centroids), centroids.shape[1], dtype=normal.dtype)
    assigned = jnp.einsum("...thc,hck->...thk", member, centroids, precision=lax.Precision.HIGHEST)
    square = jnp.square(normal - assigned)
    if mask is None:
        return square.mean()
    return (square * mask[..., None, None]).sum() / jnp.maximum(mask.sum() * square.shape[-1] * square.shape[-2], 1)
