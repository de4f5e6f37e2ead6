"""Routers of sparse mixtures of experts: who goes where, with what weight, who finds no place, and the losses that
balance.

Tokens compete for places within a group: arrays are [*G, T, E] (groups, tokens of a group, experts) and [*G, T, k] (the
k choices of a token, best first). Everything is computed in float32 at least, whatever the activations are in; equal
scores are decided for the lower index. A choice of expert `num_experts` means none: padding, or a second choice that
was given up. A `mask` [*G, T] is False for tokens that are not real, which compete for nothing and count nowhere; None:
all are real.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from research.ops import checks
from research.ops.grouped_matmul import sort_by_group
from research.ops.precision import matmul, wide

SCORES: dict[str, Callable[[Array], Array]] = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
GROUP_SCORES = ("top2", "max")


Search = Callable[[Array, int], Array]


class Choice(NamedTuple):
    """What a router decides.

    Attributes:
      experts: [*G, T, k] int32, best first.
      weights: [*G, T, k], what the outputs of these experts are multiplied by.
      scores: [*G, T, E], what the weights are taken from: probabilities, or one sigmoid per expert.
    """

    experts: Int[Array, "*G T k"]
    weights: Float[Array, "*G T k"]
    scores: Float[Array, "*G T E"]


def top_k_choice(
    logits: Float[Array, "*G T E"],
    k: int,
    *,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
    bias: Float[Array, " E"] | None = None,
    num_expert_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2",
    search: Search | None = None,
) -> Choice:
    """Every token takes its k best experts.

    Args:
      logits: of the router.
      k: experts per token. With k = 1 and `renormalize` every weight is 1 and the router learns nothing from the task.
      scoring_func: "softmax" over all experts (Switch, Mixtral, Qwen3) or "sigmoid" of each (DeepSeek-V3).
      renormalize: weights sum to 1 over the k; with softmax this is the softmax over the chosen logits.
      scale: factor of the weights.
      bias: is added to the scores for the choice alone; the weights do not see it, and it has no gradient (DeepSeek-V3,
        section 2.1.2).
      num_expert_groups, topk_groups: experts are chosen from the best `topk_groups` of so many equal groups of
        consecutive experts.
      group_score: what ranks a group, the sum of its two best scores ("top2", DeepSeek-V3) or its best ("max",
        DeepSeek-V2).
      search: finds the indices of the k largest scores in `best`'s place: the same, on each device's own tokens.

    Raises:
      ValueError: k or the groups do not fit the experts, or an option is unknown.
    """
    op, search = "top_k_choice", search or best
    num_experts = logits.shape[-1]
    checks.require(scoring_func in SCORES, op, "scoring_func", repr(scoring_func), " or ".join(SCORES))
    checks.require(group_score in GROUP_SCORES, op, "group_score", repr(group_score), " or ".join(GROUP_SCORES))
    whole = num_expert_groups >= 1 and num_experts % num_expert_groups == 0
    checks.require(whole, op, "num_expert_groups", num_expert_groups, f"a divisor of the {num_experts} experts")
    checks.require(
        1 <= topk_groups <= num_expert_groups,
        op,
        "topk_groups",
        topk_groups,
        f"1 to num_expert_groups={num_expert_groups}",
    )
    reach = num_experts // num_expert_groups * topk_groups
    checks.require(1 <= k <= reach, op, "k", k, f"1 to the {reach} experts that a token can reach")
    scores = SCORES[scoring_func](wide(logits))
    ranked = lax.stop_gradient(scores if bias is None else scores + wide(bias))
    if topk_groups < num_expert_groups:
        ranked = jnp.where(
            _in_best_groups(ranked, num_expert_groups, topk_groups, group_score, search), ranked, -jnp.inf
        )
    experts = search(ranked, k)
    weights = pick(scores, experts)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdims=True) + (1e-20 if scoring_func == "sigmoid" else 0.0))
    return Choice(experts, weights * scale if scale != 1.0 else weights, scores)


def only_real(choice: Choice, mask: Bool[Array, "*G T"] | None) -> Choice:
    """Returns the choice with the tokens that are not real sent to no expert, with weights of zero."""
    if mask is None:
        return choice
    real = mask[..., None]
    experts = jnp.where(real, choice.experts, choice.scores.shape[-1])
    return choice._replace(experts=experts, weights=jnp.where(real, choice.weights, 0))


def _in_best_groups(
    scores: Float[Array, "*G T E"], groups: int, kept: int, group_score: str, search: Search
) -> Bool[Array, "*G T E"]:
    grouped = scores.reshape(*scores.shape[:-1], groups, -1)
    size = grouped.shape[-1]
    ranks = grouped.max(-1) if group_score == "max" else pick(grouped, search(grouped, min(2, size))).sum(-1)
    chosen = jax.nn.one_hot(search(ranks, kept), groups, dtype=jnp.bool_).any(-2)
    return jnp.repeat(chosen, size, -1)


def best(scores: Float[Array, "*B E"], k: int) -> Int[Array, "*B k"]:
    """Returns the indices of the k largest scores, largest first; of equal ones the lower index."""
    return lax.top_k(scores, k)[1].astype(jnp.int32)


def pick(scores: Float[Array, "*B E"], experts: Int[Array, "*B k"]) -> Float[Array, "*B k"]:
    """Returns scores[..., experts]: a product with one-hot rows, whose gradient is elementwise where a gather's is
    scattered."""
    return (scores[..., None, :] * jax.nn.one_hot(experts, scores.shape[-1], dtype=scores.dtype)).sum(-1)


def hashed(ids: Int[Array, "*B"], num_experts: int) -> Int[Array, "*B"]:
    """Returns an expert for each token id that looks random and is always the same (Roller et al. 2021, arXiv
    2106.04426, section 3.1)."""
    mixed = ids.astype(jnp.uint32) * jnp.uint32(2654435761)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
    return ((mixed ^ (mixed >> 13)) % num_experts).astype(jnp.int32)


class Slots(NamedTuple):
    """What experts that choose for themselves decide (expert choice).

    Attributes:
      tokens: [*G, E, C] int32, the tokens of each expert, best first; T for a place that is not filled.
      weights: [*G, E, C], zero there.
      scores: [*G, T, E].
    """

    tokens: Int[Array, "*G E C"]
    weights: Float[Array, "*G E C"]
    scores: Float[Array, "*G T E"]


def expert_choice(
    logits: Float[Array, "*G T E"],
    capacity: int,
    *,
    mask: Bool[Array, "*G T"] | None = None,
    limit: Int[Array, "*G"] | None = None,
) -> Slots:
    """Every expert takes its `capacity` best tokens by their softmax over experts; a token is taken by none to all of
    them.

    Perfectly balanced, and not causal: who takes a token depends on later tokens.

    Args:
      logits: of the router.
      capacity: places of each expert.
      mask: which tokens are real.
      limit: with `mask`, how many of the places each group fills, at most as many as it has real tokens; None: that
        many.

    Raises:
      ValueError: the capacity is not 1 to T.

    Source: Zhou et al. 2022 (arXiv 2202.09368), section 3.2.
    """
    num_tokens = logits.shape[-2]
    checks.require(
        1 <= capacity <= num_tokens, "expert_choice", "capacity", capacity, f"1 to the {num_tokens} tokens of a group"
    )
    scores = jax.nn.softmax(wide(logits))
    by_expert = jnp.swapaxes(scores, -1, -2)
    if mask is None:
        weights, tokens = lax.top_k(by_expert, capacity)
        return Slots(tokens.astype(jnp.int32), weights, scores)
    weights, tokens = lax.top_k(jnp.where(mask[..., None, :], by_expert, -1.0), capacity)
    limit = mask.sum(-1) if limit is None else limit
    filled = jnp.arange(capacity) < limit[..., None, None]
    return Slots(jnp.where(filled, tokens, num_tokens).astype(jnp.int32), jnp.where(filled, weights, 0), scores)


def soft_slots(
    x: Float[Array, "*G T D"],
    slots: Float[Array, "D S"],
    scale: Float[Array, ""] | float = 1.0,
    mask: Bool[Array, "*G T"] | None = None,
) -> tuple[Float[Array, "*G T S"], Float[Array, "*G T S"]]:
    """Returns (dispatch, combine) of Soft MoE: slot inputs are dispatch^T x, outputs combine times those of the slots.

    Columns of `dispatch` and rows of `combine` sum to 1. Tokens and slot vectors are brought to unit length before
    their product.

    Args:
      x: tokens.
      slots: one vector per slot.
      scale: factor of the slot vectors of unit length.
      mask: which tokens are real: the others enter no slot.

    Source: Puigcerver et al. 2023 (arXiv 2308.00951), section 2.1 and appendix E.
    """
    logits = matmul(unit(wide(x), -1), scale * unit(wide(slots), 0))
    if mask is None:
        return jax.nn.softmax(logits, -2), jax.nn.softmax(logits, -1)
    real = mask[..., None]
    dispatch = jax.nn.softmax(jnp.where(real, logits, jnp.finfo(logits.dtype).min), -2)
    return jnp.where(real, dispatch, 0), jax.nn.softmax(logits, -1)


def unit(x: Float[Array, "*B D"], axis: int, eps: float = 1e-6) -> Float[Array, "*B D"]:
    """x brought to unit length along `axis`, eps inside the root."""
    return x * lax.rsqrt(jnp.square(x).sum(axis, keepdims=True) + eps)


def jitter(x: Float[Array, "*B D"], key: Array, epsilon: float) -> Float[Array, "*B D"]:
    """x times uniform numbers from 1 - epsilon to 1 + epsilon, each entry its own (Switch, arXiv 2101.03961, section
    2.4)."""
    return x * jax.random.uniform(key, x.shape, x.dtype, 1 - epsilon, 1 + epsilon)


# --- capacity ---------------------------------------------------------------------------------------------------------


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


CAPACITIES: dict[str, Callable[[int, int, int, float], int]] = {
    "mesh": lambda tokens, experts, k, factor: max(4, min(tokens, int(factor * tokens / experts))),
    "flaxformer": lambda tokens, experts, k, factor: max(4, round(factor * tokens / experts)),
    "v_moe": lambda tokens, experts, k, factor: _up(math.ceil(factor * tokens * k / experts), 4),
    "soft_moe": lambda tokens, experts, k, factor: max(1, round(factor * tokens / experts)),
    "maxtext": lambda tokens, experts, k, factor: int(max(math.ceil(tokens * k / experts) * factor, factor)),
    "megablocks": lambda tokens, experts, k, factor: int(factor * k * tokens / experts),
    "tutel": lambda tokens, experts, k, factor: k * int(factor * math.ceil(tokens / experts)),
    "llm_random": lambda tokens, experts, k, factor: min(int(factor * k * tokens / experts), tokens),
    "fixed": lambda tokens, experts, k, factor: int(factor),
}
"""Rule -> places per expert and group as its library computes them; `mesh` and `flaxformer` do not count k, and `fixed`
is the factor itself, whatever the tokens: `expert_capacity` of transformers' Switch."""


def capacity(rule: str, tokens: int, experts: int, k: int, factor: float) -> int:
    """Returns how many tokens of a group of `tokens` an expert has places for, by the rule of a family (`CAPACITIES`).

    Raises:
      ValueError: unknown rule, or sizes or a factor not above zero.
    """
    checks.require(rule in CAPACITIES, "capacity", "rule", repr(rule), ", ".join(CAPACITIES))
    for name, value in {"tokens": tokens, "experts": experts, "k": k, "factor": factor}.items():
        checks.require(value > 0, "capacity", name, value, "a number above 0")
    return CAPACITIES[rule](tokens, experts, k, factor)


def by_count(places: Callable[[int], int], tokens: int) -> np.ndarray:
    """Returns [tokens + 1] int32: `places(n)` of a group of n real tokens, 0 where there is none.

    Rules count tokens, so where some are not real the number of places is known only when the program runs, and is
    looked up here.
    """
    return np.array([0, *map(places, range(1, tokens + 1))], np.int32)


ORDERS = ("choice", "token")


def places(
    experts: Int[Array, "T k"], num_experts: int, *, order: str = "choice", priority: Float[Array, " T"] | None = None
) -> Int[Array, "T k"]:
    """Returns the place of every (token, choice) pair in the queue of its expert: 0 for the first one. Those at or
    beyond the capacity find none.

    Args:
      experts: of each token, best first; `num_experts` for pairs that queue nowhere (their places mean nothing).
      num_experts: E.
      order: who comes first: "choice" - all first choices, then all second ones (Mesh, GShard, Flaxformer, V-MoE,
        Tutel) - or "token" - token by token with all of its choices (MaxText).
      priority: tokens queue by falling priority instead of position, equal ones by position: batch priority routing
        with the first choice's score (V-MoE, arXiv 2106.05974, section 4).

    Raises:
      ValueError: unknown order.
    """
    checks.require(order in ORDERS, "places", "order", repr(order), " or ".join(ORDERS))
    num_tokens, k = experts.shape
    queue = experts
    if priority is not None:
        turn = jnp.argsort(-priority, stable=True)
        queue = queue[turn]
    pairs = queue.T.reshape(-1) if order == "choice" else queue.reshape(-1)
    _, inverse, sizes = sort_by_group(pairs, num_experts + 1)
    found = inverse - jnp.take(jnp.cumsum(sizes) - sizes, pairs)
    found = found.reshape(k, num_tokens).T if order == "choice" else found.reshape(num_tokens, k)
    return found if priority is None else jnp.zeros_like(found).at[turn].set(found, unique_indices=True)


def give_up_second(choice: Choice, key: Array, threshold: float = 0.2) -> Choice:
    """Keeps second and later choices with probability min(1, weight / threshold) only: the random policy of GShard's
    top-2 in Mesh."""
    num_experts = choice.scores.shape[-1]
    kept = jax.random.uniform(key, choice.weights.shape) < choice.weights / threshold
    kept = kept | (jnp.arange(choice.experts.shape[-1]) == 0)
    return choice._replace(
        experts=jnp.where(kept, choice.experts, num_experts), weights=jnp.where(kept, choice.weights, 0)
    )


# --- losses -----------------------------------------------------------------------------------------------------------


def expert_fractions(
    experts: Int[Array, "*G T k"], num_experts: int, mask: Bool[Array, "*G T"] | None = None
) -> Float[Array, "*G E"]:
    """Returns, for every expert, the share of the (unmasked) tokens that choose it; shares sum to k."""
    chosen = (experts[..., None] == jnp.arange(num_experts)).sum(-2, dtype=jnp.float32)
    return _mean(chosen, mask)


def _mean(x: Float[Array, "*G T E"], mask: Bool[Array, "*G T"] | None) -> Float[Array, "*G E"]:
    if mask is None:
        return x.mean(-2)
    weight = mask[..., None].astype(x.dtype)
    return (x * weight).sum(-2) / jnp.maximum(weight.sum(-2), 1)


def load_balance_loss(
    scores: Float[Array, "*G T E"], experts: Int[Array, "*G T k"], *, mask: Bool[Array, "*G T"] | None = None
) -> Float[Array, ""]:
    """Mean over groups of E sum_e f_e P_e: f_e the share of tokens that choose e, without gradient, P_e the mean score.

    Give the first choice alone (`experts[..., :1]`) for Switch, GShard and V-MoE: 1 at uniform scores, E at collapse.
    All k choices (Mixtral, Qwen3, Flaxformer) give k at uniform scores; divided by k it is MegaBlocks' and DeepSeek's.
    Values below 1 are possible.

    Source: Switch Transformer (Fedus et al. 2021, arXiv 2101.03961), equations 4 to 6.
    """
    num_experts = scores.shape[-1]
    fractions = lax.stop_gradient(expert_fractions(experts, num_experts, mask))
    return num_experts * _over_groups((fractions * _mean(wide(scores), mask)).sum(-1), mask)


def _over_groups(x: Float[Array, "*G"], mask: Bool[Array, "*G T"] | None) -> Float[Array, ""]:
    """Mean over the groups that have a real token."""
    if mask is None:
        return x.mean()
    some = mask.any(-1)
    return jnp.where(some, x, 0).sum() / jnp.maximum(some.sum(), 1)


def over_tokens(x: Float[Array, "*G T"], mask: Bool[Array, "*G T"] | None) -> Float[Array, ""]:
    """Mean over all real tokens, whatever their groups."""
    if mask is None:
        return x.mean()
    return jnp.where(mask, x, 0).sum() / jnp.maximum(mask.sum(), 1)


def z_loss(logits: Float[Array, "*G T E"], mask: Bool[Array, "*G T"] | None = None) -> Float[Array, ""]:
    """Mean over tokens of the squared log-sum-exp of the logits (ST-MoE, Zoph et al. 2022, arXiv 2202.08906, equation
    5)."""
    square = jnp.square(jax.nn.logsumexp(wide(logits), -1))
    return square[..., None].mean(-2).mean() if mask is None else over_tokens(square, mask)


def squared_variation(x: Float[Array, "*G E"]) -> Float[Array, " *G"]:
    """(standard deviation / mean)^2 along the last axis, of the population."""
    return x.var(-1) / jnp.square(x.mean(-1))


def importance_loss(scores: Float[Array, "*G T E"], mask: Bool[Array, "*G T"] | None = None) -> Float[Array, ""]:
    """Squared variation over experts of their scores summed over tokens, mean over groups (V-MoE, arXiv 2106.05974,
    equation 8)."""
    if mask is None:
        return squared_variation(wide(scores).sum(-2)).mean()
    return _variation_over_groups(jnp.where(mask[..., None], wide(scores), 0).sum(-2), mask)


def _variation_over_groups(x: Float[Array, "*G E"], mask: Bool[Array, "*G T"]) -> Float[Array, ""]:
    some = mask.any(-1, keepdims=True)
    return _over_groups(squared_variation(jnp.where(some, x, 1)), mask)  # a group of nothing would divide by zero


def load_loss(
    logits: Float[Array, "*G T E"],
    noisy: Float[Array, "*G T E"],
    k: int,
    std: Float[Array, "*G T E"] | float,
    mask: Bool[Array, "*G T"] | None = None,
) -> Float[Array, ""]:
    """Squared variation over experts of the chance, over new noise, to be among the k best, mean over groups.

    Args:
      logits: without noise.
      noisy: with the noise that the choice was made with.
      k: experts per token.
      std: standard deviation of the noise.
      mask: which tokens are real.

    Source: V-MoE (Riquelme et al. 2021, arXiv 2106.05974), equations 9 to 11.
    """
    threshold = lax.top_k(wide(noisy), k)[0][..., -1:]
    chance = 1 - jax.scipy.stats.norm.cdf((threshold - wide(logits)) / std)
    if mask is None:
        return squared_variation(chance.mean(-2)).mean()
    return _variation_over_groups(_mean(chance, mask), mask)


def balanced_bias(bias: Float[Array, "*L E"], load: Float[Array, "*L E"], rate: float) -> Float[Array, "*L E"]:
    """Returns b + rate * sign(mean load - load): balancing without a loss (DeepSeek-V3, arXiv 2412.19437, section
    2.1.2)."""
    return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)


def entropy(load: Float[Array, "*G E"]) -> Float[Array, " *G"]:
    """Entropy in nats of the load over experts: ln E when even, 0 when one expert has it all."""
    share = load / jnp.maximum(load.sum(-1, keepdims=True), 1e-20)
    return -jax.scipy.special.xlogy(share, share).sum(-1)
