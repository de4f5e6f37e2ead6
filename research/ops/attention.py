"""Softmax attention with grouped queries (Vaswani et al. 2017, section 3.2; Ainslie et al. 2023, arXiv 2305.13245).

Three implementations: `fused`, JAX's own; `naive`, two products and a softmax, which also serves float64 (JAX's rounds
it to float32 inside); `chunked`, in memory linear in the length, which skips what a causal mask hides and is the
fastest on a CPU but for short sequences.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.ops import attention_blocks, checks, dispatch, precision

OP = "softmax_attention"
IMPLEMENTATIONS = ("naive", "fused", "chunked")


def softmax_attention(
    query: Float[Array, "*B T H K"],
    key: Float[Array, "*B S G K"],
    value: Float[Array, "*B S G V"],
    *,
    causal: bool = False,
    mask: Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Float[Array, "*B T H V"]:
    """Returns softmax(scale query key^T + bias) value for every head; a query that sees no key gives zeros.

    Args:
      query: H heads, a multiple of G; head h reads key head h // (H / G).
      key: keys.
      value: values.
      causal: query t sees keys up to t; T and S must be equal.
      mask: True where a query sees a key; broadcasts to [*B, H, T, S].
      bias: added to the logits; broadcasts to [*B, H, T, S]. Not with implementation "chunked".
      segment_ids: sequences packed on one axis see only themselves; T and S must be equal.
      scale: factor of the logits; K^-0.5 by default.
      implementation: see `dispatch.resolve`; "fused" is not for float64.

    Returns:
      Output in the dtype of the value; logits, softmax and sums are float32 at least.

    Raises:
      ValueError: naming the argument that does not fit.
    """
    implementation = dispatch.resolve(implementation, OP, IMPLEMENTATIONS)
    sizes = checks.shapes(
        OP,
        query=(query, "*B T H K"),
        key=(key, "*B S G K"),
        value=(value, "*B S G V"),
        segment_ids=(segment_ids, "*B T"),
    )
    batch, queries, heads, keys, groups = (sizes[letter] for letter in ("*B", "T", "H", "S", "G"))
    checks.require(
        heads % groups == 0, OP, "query", f"of {heads} heads", f"a multiple of the {groups} heads of key and value"
    )
    if causal or segment_ids is not None:
        name = "causal" if causal else "segment_ids"
        checks.require(
            queries == keys,
            OP,
            name,
            f"given with {queries} queries and {keys} keys",
            "as many queries as keys (or a mask)",
        )
    checks.require(
        bias is None or implementation != "chunked",
        OP,
        "bias",
        "given with implementation 'chunked'",
        "implementation 'fused' or 'naive'",
    )
    double = precision.wide(query).dtype == jnp.float64
    checks.require(
        not double or implementation != "fused",
        OP,
        "query",
        "float64 with implementation 'fused'",
        "implementation 'naive' or 'chunked'",
    )

    def flat(name, x):
        return None if x is None else _flat_logits_like(name, x, batch, (heads, queries, keys))

    query, key, value = (x.reshape(math.prod(batch), *x.shape[len(batch) :]) for x in (query, key, value))
    segment_ids = None if segment_ids is None else segment_ids.reshape(-1, queries)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    operands = query, key, value, flat("mask", mask), flat("bias", bias), segment_ids
    implementations = {
        name: functools.partial(function, causal=causal, scale=scale) for name, function in _IMPLEMENTATIONS.items()
    }
    if implementation in ("auto", "cpu"):
        dense = "naive" if double else "fused"
        chosen = _choose_cpu(query, key, causal) if bias is None else dense
        if chosen == "chunked":
            # The gradient of the other platforms' branch computes its weights again: what a branch keeps, all platforms
            # hold.
            out = dispatch.per_platform(
                implementation, implementations["chunked"], jax.checkpoint(implementations[dense]), *operands
            )
        else:
            out = implementations[dense](*operands)
    else:
        out = implementations[implementation](*operands)
    return out.reshape(*batch, *out.shape[1:])


def _choose_cpu(query, key, causal):
    return dispatch.choose(OP, queries=max(query.shape[1], 1), keys=max(key.shape[1], 1), causal=2 if causal else 1)


def _flat_logits_like(name, x, batch, rest):
    """Axes [B or 1, H or 1, T or 1, S or 1] of an array that broadcasts to [*B, H, T, S]."""
    wanted = (*batch, *rest)
    fits = x.ndim <= len(wanted) and all(a in (1, b) for a, b in zip(x.shape[::-1], wanted[::-1], strict=False))
    checks.require(fits, OP, name, f"of shape {x.shape}", f"one that broadcasts to [*B, H, T, S] = {wanted}")
    x = x.reshape((1,) * (len(wanted) - x.ndim) + x.shape)
    leading = x.shape[: len(batch)]
    if math.prod(leading) > 1:
        x = jnp.broadcast_to(x, (*batch, *x.shape[len(batch) :]))
    return x.reshape(-1, *x.shape[len(batch) :])


def _visible(query, key, mask, segment_ids, causal):
    """[B or 1, H or 1, T or 1, S], True where a query sees a key; None: everywhere."""
    if causal:
        triangle = attention_blocks.Pattern(after=0).visible(jnp.arange(query.shape[1]), jnp.arange(key.shape[1]))
        mask = triangle[None, None] if mask is None else mask & triangle
    if segment_ids is not None:
        same = (segment_ids[:, :, None] == segment_ids[:, None])[:, None]
        mask = same if mask is None else mask & same
    return mask


def _zero_unseeing(out, visible):
    """Zeros where a query sees no key, from a mask that need not be causal to have such rows."""
    return jnp.where(jnp.moveaxis(visible.any(-1, keepdims=True), 1, 2), out, 0)


def _naive(query, key, value, mask, bias, segment_ids, *, causal, scale):
    wide = precision.wide(query).dtype
    visible = _visible(query, key, mask, segment_ids, causal)
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])
    logits = jnp.einsum("btgrk,bsgk->bgrts", grouped, key, preferred_element_type=wide) * scale
    logits = logits.reshape(logits.shape[0], -1, *logits.shape[3:])
    logits = logits if bias is None else logits + bias
    logits = logits if visible is None else jnp.where(visible, logits, jnp.finfo(wide).min)
    weights = (
        jax.nn.softmax(logits, axis=-1)
        .astype(value.dtype)
        .reshape(logits.shape[0], *grouped.shape[2:4], *logits.shape[2:])
    )
    out = jnp.einsum("bgrts,bsgv->btgrv", weights, value, preferred_element_type=wide).astype(value.dtype)
    out = out.reshape(*query.shape[:3], value.shape[-1])
    return out if mask is None else _zero_unseeing(out, visible)


def _fused(query, key, value, mask, bias, segment_ids, *, causal, scale):
    # The triangle is left to JAX unless a mask may hide the rest of a row, which then must be known here.
    visible = _visible(query, key, mask, segment_ids, causal and mask is not None)
    # JAX wants one size of head: zeros change neither a product nor, cut off again, the output.
    size, value_size = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    query, key, value = (jnp.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[-1])]) for x in (query, key, value))
    out = jax.nn.dot_product_attention(query, key, value, bias, visible, scale=scale, is_causal=causal)[
        ..., :value_size
    ]
    return out if mask is None else _zero_unseeing(out, visible)


def _chunked(query, key, value, mask, bias, segment_ids, *, causal, scale):
    del bias
    (queries, heads), groups = query.shape[1:3], key.shape[2]
    grouped = query.reshape(*query.shape[:2], groups, -1, query.shape[-1])
    mask = None if mask is None else _split_heads(mask, groups, heads)
    pattern = attention_blocks.Pattern(after=0 if causal else None)
    blocks = attention_blocks.Blocks(block_size(queries), block_size(key.shape[1]), pattern, scale)
    operands = attention_blocks.Operands(
        jnp.moveaxis(grouped, 1, 3), jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2), segment_ids, segment_ids, mask
    )
    out = attention_blocks.attend(operands, blocks)
    return jnp.moveaxis(out, 3, 1).reshape(*query.shape[:3], value.shape[-1])


def _split_heads(mask, groups, heads):
    return (
        mask[:, :, None]
        if mask.shape[1] == 1
        else mask.reshape(mask.shape[0], groups, heads // groups, *mask.shape[2:])
    )


def block_size(length: int) -> int:
    """The size of a block on a CPU: about half the length, at most 512 (1 MB of logits a head), equal parts in whole
    vector registers."""
    parts = max(-(-length // 512), 1 if length <= 64 else 2)
    return max(-(-length // (parts * LANES)) * LANES, LANES)


LANES = 16
"""Numbers in a vector register of 512 bits."""


_IMPLEMENTATIONS = {"naive": _naive, "fused": _fused, "chunked": _chunked}
