"""A mixture of feed-forward experts in place of a feed-forward part: the options of the families, the router, the experts.

`Moe` says which experts, which router, which dispatch; `FAMILIES` holds the published combinations. A forward pass costs what the
active experts cost, not what all do. Statistics, of the last call in mode "train": `load` (share of the tokens that chose each
expert), `observed` (one number for each of `OBSERVED`), `aux_loss` (the balancing losses, weighted), and `bias` for balancing without one.
"""

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.errors import UserError
from research.modules import elastic
from research.modules.axes import Init, Kind
from research.modules.layers import normal_02, ones, zeros
from research.modules.mesh import on_own_tokens
from research.modules.mixers.base import Call
from research.modules.mlp import Glu, Mlp
from research.ops import expert_dispatch, expert_routing
from research.ops.precision import wide

ROUTERS = ("top_k", "expert_choice", "soft", "hash", "domain")
EXPERTS = {"glu": ("silu", True, False), "geglu": ("gelu", True, False), "mlp": ("gelu", False, True), "relu": ("relu", False, False)}
"""Kind of expert -> (activation, whether it is gated, whether it has biases)."""
SHARED = {"glu": Glu, "mlp": Mlp}
BALANCE_OVER = ("first", "all", "mean")
JITTER, NOISE, SECOND = 8, 9, 10
"""What the layer's key is folded with; its dropout folds smaller numbers."""
OBSERVED = ("entropy", "max_load", "dropped", "router_z", "confidence")
"""Entropy of the load in nats (ln E when even); largest load over the mean one; share of the choices that found no place (expert
choice: of the tokens that no expert took); mean squared log-sum-exp of the logits; mean score of the first choice."""


@dataclass(frozen=True)
class Moe:
    """Options of a mixture of experts.

    Attributes:
      experts: E, of which each token is sent to some.
      active: k, experts of a token; of expert choice, the mean number; of the router soft, 1.
      hidden: hidden units of each expert; 0: those of the dense part over (active + shared), so that active FLOPs are the dense one's.
      expert: glu, geglu, mlp (GELU, with biases) or relu.
      shared: experts that every token visits beside its own (DeepSeekMoE), as one of shared * hidden units.
      router: top_k; expert_choice and soft, which look at later tokens; hash of the token's id; domain, given with the example.
      score, renormalize, scale, expert_groups, kept_groups, group_score: see `research.ops.expert_routing.top_k_choice`.
      noise: in training, normal noise of this many 1 / E is added to the logits (V-MoE: 1).
      learned_noise: its standard deviation is softplus(x W) instead (Shazeer et al. 2017, arXiv 1701.06538, equation 4).
      jitter: in training, the router's input is multiplied by uniform numbers within 1 +- jitter.
      bias_rate: step of the bias that balances without a loss; 0: there is none.
      slots: soft slots of each expert.
      capacity: rule of the places per expert (`research.ops.expert_routing.CAPACITIES`), or "none": nobody is dropped.
      capacity_factor, eval_capacity_factor: factor in the rule; for evaluation 0 means the same.
      order, priority: who gets a place first, see `places`; `priority`: those with the best first choice.
      random_second: in training, second choices are kept with probability min(1, weight / 0.2) (GShard in Mesh, there also in evaluation).
      group: sequences whose tokens compete for places; 0: the whole batch.
      balance, balance_over: coefficient of the load-balance loss, counted over first choices, all, or all over k ("mean").
      balance_groups: the loss is of each group and averaged, instead of over all tokens.
      z, importance, load: coefficients of these losses.
    """

    experts: int = 8
    active: int = 2
    hidden: int = 0
    expert: str = "glu"
    shared: int = 0
    router: str = "top_k"
    score: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    expert_groups: int = 1
    kept_groups: int = 1
    group_score: str = "top2"
    noise: float = 0.0
    learned_noise: bool = False
    jitter: float = 0.0
    bias_rate: float = 0.0
    slots: int = 1
    capacity: str = "none"
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 0.0
    order: str = "choice"
    priority: bool = False
    random_second: bool = False
    group: int = 1
    balance: float = 0.01
    balance_over: str = "mean"
    balance_groups: bool = False
    z: float = 0.0
    importance: float = 0.0
    load: float = 0.0

    causal_routers: ClassVar[tuple[str, ...]] = ("top_k", "hash", "domain")

    @property
    def gated(self) -> bool:
        return EXPERTS.get(self.expert, ("", True, False))[1]

    @property
    def counted_batch(self) -> int:
        """Examples over which FLOPs are counted: those of a group, whose places are rounded together."""
        return max(1, self.group) if self.capacity != "none" or self.router == "expert_choice" else 1

    def resolve(self, ffn_dim: int) -> "Moe":
        """Returns the options with `hidden` filled in, from the hidden units of the dense part.

        Raises:
          UserError: options that do not fit together.
        """
        for name in ("experts", "active"):
            self._require(name, getattr(self, name) >= 1, "whole numbers from 1")
        for name in ("hidden", "shared", "group"):
            self._require(name, getattr(self, name) >= 0, "whole numbers from 0")
        self._require("slots", self.slots >= 1, "whole numbers from 1")
        self._require("expert", self.expert in EXPERTS, ", ".join(EXPERTS))
        self._require("expert", not self.shared or self.expert in SHARED, f"{' or '.join(SHARED)} with shared experts")
        self._require("router", self.router in ROUTERS, ", ".join(ROUTERS))
        self._require("balance_over", self.balance_over in BALANCE_OVER, ", ".join(BALANCE_OVER))
        self._require("capacity", self.capacity in ("none", *expert_routing.CAPACITIES), ", ".join(("none", *expert_routing.CAPACITIES)))
        self._require("order", self.order in expert_routing.ORDERS, ", ".join(expert_routing.ORDERS))
        self._require("score", self.score in expert_routing.SCORES, ", ".join(expert_routing.SCORES))
        whole = self.expert_groups >= 1 and self.experts % self.expert_groups == 0
        self._require("expert_groups", whole, f"divisors of experts={self.experts}")
        reach = self.experts
        if self.expert_groups > 1:
            self._require("kept_groups", 1 <= self.kept_groups <= self.expert_groups, f"1 to expert_groups={self.expert_groups}")
            reach = self.experts // self.expert_groups * self.kept_groups
        if self.router in ("hash", "domain", "soft"):
            self._require("active", self.active == 1, f"1 with router={self.router}")
        if self.router == "top_k":
            self._require("active", self.active <= reach, f"1 to the {reach} experts that a token can reach (experts={self.experts})")
        hidden = self.hidden or max(8, round(ffn_dim / (self.active + self.shared) / 8) * 8)
        return replace(self, hidden=hidden, kept_groups=min(self.kept_groups, self.expert_groups))

    def _require(self, name: str, condition: bool, valid: str) -> None:
        if not condition:
            raise UserError(f"moe: {name}={getattr(self, name)!r}; valid: {valid}")

    def shrink(self, width: float, ffn: float, experts, active) -> "Moe":
        """Returns the options of a smaller self: hidden units follow the width and `ffn`, the first experts stay."""
        groups = self.expert_groups
        count = elastic.depth_count(1.0 if experts is None else experts, self.experts, groups, "experts")
        active = self.active if active is None else elastic.depth_count(active, self.active, 1, "active")
        hidden = elastic.scaled(max(8, round(self.hidden * width)), ffn, 8, "ffn")
        return replace(self, experts=count, active=min(active, count), hidden=hidden)


def _search(scores: Float[Array, "B *T E"], k: int) -> Array:
    """`expert_routing.best`, a custom call on some platforms, on each device's own tokens."""
    return on_own_tokens(lambda tokens, experts, axis: expert_routing.best(tokens[0], k), (scores,), {})


FAMILIES: dict[str, Moe] = {
    "switch": Moe(active=1, expert="relu", renormalize=False, jitter=0.01, capacity="mesh", eval_capacity_factor=2.0, balance_over="first"),
    "gshard": Moe(expert="relu", capacity="mesh", eval_capacity_factor=2.0, random_second=True, balance_over="first"),
    "st_moe": Moe(expert="geglu", capacity="flaxformer", eval_capacity_factor=2.0, balance_over="first", z=1e-3),
    "v_moe": Moe(expert="mlp", renormalize=False, noise=1.0, capacity="v_moe", capacity_factor=1.05, eval_capacity_factor=4.0,
                 group=8, balance=0.0, importance=0.005, load=0.005),
    "expert_choice": Moe(expert="geglu", router="expert_choice", balance=0.0),
    "soft": Moe(expert="mlp", active=1, router="soft", balance=0.0),
    "mixtral": Moe(balance=1e-3, balance_over="all"),
    "qwen3": Moe(experts=128, active=8, balance=1e-3, balance_over="all"),
    "jamba": Moe(experts=16, renormalize=False, balance=1e-3, balance_over="all"),
    "deepseek": Moe(experts=64, active=6, shared=2, renormalize=False, balance=1e-3),
    "deepseek_v3": Moe(experts=256, active=8, shared=1, score="sigmoid", scale=2.5, expert_groups=8, kept_groups=4, bias_rate=1e-3,
                       balance=1e-4, balance_groups=True),
    "hash": Moe(active=1, router="hash", balance=0.0),
    "domain": Moe(active=1, router="domain", balance=0.0),
}  # fmt: skip
"""Name -> the published combination (facts of routers, capacities, noise and losses; sizes are examples)."""


class MoeFfn(nnx.Module):
    """y = sum over a token's experts of weight * expert(x), plus the shared experts.

    D E parameters of the router and (2 or 3) D F of each expert, D + F more with biases. Router and statistics are in float32 whatever the rest is in.
    `axes` as in `Mlp`; `scope` names the axis of the experts.
    """

    def __init__(self, spec: Moe, channels: int, axes: tuple[str, str], scope: str, init: Init, form: str = "auto"):
        self.spec, self.form = spec, form
        count, experts = spec.experts, f"{scope}/experts"
        self.activation, gated, biased = EXPERTS[spec.expert]
        inward = (count, channels, spec.hidden), (experts, *axes)
        self.up = init.param("up", *inward, normal_02, Kind.MATRIX)
        self.gate = init.param("gate", *inward, normal_02, Kind.MATRIX) if gated else None
        self.down = init.param("down", (count, spec.hidden, channels), (experts, *axes[::-1]), normal_02, Kind.MATRIX)
        self.up_bias = init.param("up_bias", (count, spec.hidden), (experts, axes[1]), zeros, Kind.BIAS) if biased else None
        self.down_bias = init.param("down_bias", (count, channels), (experts, axes[0]), zeros, Kind.BIAS) if biased else None
        around = channels, spec.shared * spec.hidden, (axes[0], f"{scope}/shared/mlp")
        self.shared = SHARED[spec.expert](*around, init.child("shared")) if spec.shared else None
        routed = (channels, count), (axes[0], experts)
        learnt = spec.router in ("top_k", "expert_choice")
        self.router = init.param("router", *routed, normal_02, Kind.MATRIX, precise=True) if learnt else None
        self.noise = init.param("noise", *routed, zeros, Kind.MATRIX, precise=True) if learnt and spec.learned_noise else None
        soft = spec.router == "soft"
        slots = (channels, count, spec.slots), (axes[0], experts, f"{scope}/slots")
        self.slots = init.param("slots", *slots, normal_02, Kind.MATRIX) if soft else None
        self.slot_scale = init.param("slot_scale", (), (), ones, Kind.GAIN) if soft else None
        self.bias = init.stat("bias", (count,), (experts,), zeros) if spec.bias_rate else None
        self.load = init.stat("load", (count,), (experts,), zeros)
        self.observed = init.stat("observed", (len(OBSERVED),), (f"{scope}/observed",), zeros)
        self.aux_loss = init.stat("aux_loss", (), (), zeros)

    def __call__(self, x: Float[Array, "B *T D"], call: Call) -> Float[Array, "B *T D"]:
        rows = x.reshape(self._groups(x.shape), -1, x.shape[-1])
        if self.spec.router == "soft":
            y = self._soft(rows)
        elif self.spec.router == "expert_choice":
            y = self._expert_choice(rows, call)
        else:
            y = self._token_choice(rows, call)
        y = y.astype(x.dtype).reshape(x.shape)
        return y if self.shared is None else y + self.shared(x)

    def _groups(self, shape: tuple[int, ...]) -> int:
        """How many groups compete apart: of `group` sequences, or the largest number below that divides the batch; 0: of all."""
        batch, wanted = shape[0], self.spec.group
        if not wanted or len(shape) == 2:  # a step of generation has one token of each sequence
            return 1 if not wanted else batch
        return batch // max(n for n in range(1, min(wanted, batch) + 1) if batch % n == 0)

    @property
    def kernels(self) -> dict[str, Array]:
        """The experts' kernels and biases as the ops take them."""
        arrays = {name: getattr(self, name) for name in ("up", "gate", "down", "up_bias", "down_bias")}
        return {name: array[...] for name, array in arrays.items() if array is not None}

    # --- the router ------------------------------------------------------------------------------------------------------

    def _logits(self, x: Float[Array, "G T D"], call: Call) -> tuple[Float[Array, "G T E"], Float[Array, "G T E"], Array | float]:
        """Returns (logits, logits with noise, its standard deviation); noise and jitter in training only, and only under a key."""
        x, spec = wide(x), self.spec
        noisy = call.mode == "train" and call.key is not None
        if noisy and spec.jitter:
            x = expert_routing.jitter(x, jax.random.fold_in(call.key, JITTER), spec.jitter)
        logits = x @ self.router[...].astype(x.dtype)
        std = spec.noise / spec.experts
        if self.noise is not None:
            std = jax.nn.softplus(x @ self.noise[...].astype(x.dtype))
        if not noisy or not (spec.noise or spec.learned_noise):
            return logits, logits, std
        return logits, logits + std * jax.random.normal(jax.random.fold_in(call.key, NOISE), logits.shape, logits.dtype), std

    def _enforced(self, x: Float[Array, "G T D"], call: Call) -> expert_routing.Choice:
        """The choice of routers that learn nothing: by a hash of the token's id, or by the domain that the example comes with."""
        spec = self.spec
        given = call.tokens if spec.router == "hash" else call.domain
        if given is None:
            needs = {"hash": "token ids", "domain": "the domain of each example"}[spec.router]
            raise UserError(f"moe: router={spec.router!r} needs {needs}, which this call does not have")
        if spec.router == "hash":
            experts = expert_routing.hashed(given, spec.experts).reshape(x.shape[:2])
        else:
            experts = jnp.broadcast_to(given[:, None], (given.shape[0], x.shape[0] * x.shape[1] // given.shape[0])).reshape(x.shape[:2])
        experts = experts[..., None].astype(jnp.int32)
        return expert_routing.Choice(experts, jnp.ones(experts.shape), jax.nn.one_hot(experts[..., 0], spec.experts))

    def _token_choice(self, x: Float[Array, "G T D"], call: Call) -> Float[Array, "G T D"]:
        spec = self.spec
        if self.router is None:
            choice = self._enforced(x, call)
            if call.mode == "train":
                load = expert_routing.expert_fractions(choice.experts, spec.experts).mean(0)
                self._observe(load, jnp.zeros(()), jnp.ones(()))
            return self._dispatch(x, choice, call)
        logits, noisy, std = self._logits(x, call)
        choice = expert_routing.top_k_choice(
            noisy,
            spec.active,
            score=spec.score,
            renormalize=spec.renormalize,
            scale=spec.scale,
            bias=None if self.bias is None else self.bias[...],
            expert_groups=spec.expert_groups,
            kept_groups=spec.kept_groups,
            group_score=spec.group_score,
            search=_search,
        )
        if spec.random_second and call.mode == "train" and call.key is not None:
            choice = expert_routing.give_up_second(choice, jax.random.fold_in(call.key, SECOND))
        if call.mode == "train":
            self._balance(choice, logits, noisy, std)
        return self._dispatch(x, choice, call)

    def _balance(self, choice: expert_routing.Choice, logits: Array, noisy: Array, std: Array | float) -> None:
        """Stores the weighted losses, the load and the numbers of `OBSERVED`, and moves the bias."""
        spec = self.spec
        scores, experts = choice.scores, choice.experts
        over = experts[..., :1] if spec.balance_over == "first" else experts
        if spec.score == "sigmoid":
            scores = scores / scores.sum(-1, keepdims=True)
        whole = lambda a: a if spec.balance_groups else a.reshape(1, -1, a.shape[-1])  # noqa: E731
        share = 1 / spec.active if spec.balance_over == "mean" else 1.0
        losses = jnp.zeros(())
        if spec.balance:
            losses += spec.balance * share * expert_routing.load_balance_loss(whole(scores), whole(over))
        if spec.z:
            losses += spec.z * expert_routing.z_loss(logits)
        if spec.importance:
            losses += spec.importance * expert_routing.importance_loss(jax.nn.softmax(logits))
        if spec.load and (spec.noise or spec.learned_noise):
            losses += spec.load * expert_routing.load_loss(logits, noisy, spec.active, std)
        self.aux_loss[...] = losses
        load = expert_routing.expert_fractions(experts, spec.experts).mean(0)
        if self.bias is not None:
            counts = jnp.round(load * (experts.size // spec.active))  # whole, so that an even load is no step in rounding
            self.bias[...] = expert_routing.balanced_bias(self.bias[...], counts, spec.bias_rate)
        self._observe(load, expert_routing.z_loss(logits), choice.scores.max(-1).mean())

    def _observe(self, load, router_z, confidence):
        self.load[...] = jax.lax.stop_gradient(load)
        numbers = {
            "entropy": expert_routing.entropy(load),
            "max_load": load.max() / load.mean(),
            "router_z": router_z,
            "confidence": confidence,
        }
        for name, value in numbers.items():
            self._set_observed(name, value)

    # --- to the experts and back -------------------------------------------------------------------------------------------

    def _dispatch(self, x: Float[Array, "G T D"], choice: expert_routing.Choice, call: Call) -> Float[Array, "G T D"]:
        spec = self.spec
        if spec.capacity == "none":
            pairs = x.reshape(-1, x.shape[-1]), choice.experts.reshape(-1, spec.active), choice.weights.reshape(-1, spec.active)
            return on_own_tokens(self._dropless, pairs, self.kernels).reshape(x.shape)
        train = call.mode == "train" or not spec.eval_capacity_factor
        factor = spec.capacity_factor if train else spec.eval_capacity_factor
        y, found = on_own_tokens(functools.partial(self._with_places, factor), (x, choice.experts, choice.weights), self.kernels)
        if call.mode == "train":
            self._set_observed("dropped", 1 - found.mean(dtype=jnp.float32))
        return y

    def _dropless(self, tokens: tuple[Array, ...], kernels: dict[str, Array], axis: str | None) -> Array:
        return expert_dispatch.dropless(*tokens, kernels, activation=self.activation, form=self.form, axis=axis)

    def _with_places(self, factor: float, tokens: tuple[Array, ...], kernels: dict[str, Array], axis: str | None) -> tuple[Array, Array]:
        """Returns the output and which pairs found a place."""
        spec = self.spec
        x, experts, weights = tokens
        groups, num_tokens, width = x.shape
        capacity = min(num_tokens, max(1, expert_routing.capacity(spec.capacity, num_tokens, spec.experts, spec.active, factor)))
        find = lambda e, p: expert_routing.places(e, spec.experts, order=spec.order, priority=p)  # noqa: E731
        places = jax.vmap(find)(experts, weights[..., 0] if spec.priority else None)
        found = places < capacity
        # Places of all groups behind one another in each expert's rows.
        places = jnp.where(found, places + capacity * jnp.arange(groups)[:, None, None], groups * capacity)
        flat = (a.reshape(-1, a.shape[-1]) for a in (x, experts, weights, places))
        y = expert_dispatch.with_places(*flat, groups * capacity, kernels, activation=self.activation, axis=axis)
        return y.reshape(x.shape), found

    def _set_observed(self, name: str, value: Array) -> None:
        self.observed[...] = self.observed[...].at[OBSERVED.index(name)].set(jax.lax.stop_gradient(value))

    def _expert_choice(self, x: Float[Array, "G T D"], call: Call) -> Float[Array, "G T D"]:
        spec, num_tokens = self.spec, x.shape[1]
        logits, noisy, _ = self._logits(x, call)
        capacity = min(num_tokens, max(1, round(spec.active * num_tokens / spec.experts)))
        y, taken = on_own_tokens(functools.partial(self._taken, capacity), (x, noisy), self.kernels)
        if call.mode == "train":
            self.aux_loss[...] = spec.z * expert_routing.z_loss(logits)
            confidence = jax.nn.softmax(noisy).max(-1).mean()
            self._observe(jnp.full(spec.experts, capacity / num_tokens), expert_routing.z_loss(logits), confidence)
            self._set_observed("dropped", (taken == 0).mean(dtype=jnp.float32))
        return y

    def _taken(self, capacity: int, tokens: tuple[Array, ...], kernels: dict[str, Array], axis: str | None) -> tuple[Array, Array]:
        """Returns the output of expert choice, and how many experts took each token."""
        x, logits = tokens
        slots = expert_routing.expert_choice(logits, capacity)
        taken = jax.nn.one_hot(slots.tokens, x.shape[1]).sum((1, 2))
        y = expert_dispatch.chosen_by_experts(x, slots.tokens, slots.weights, kernels, activation=self.activation, axis=axis)
        return y, taken

    def _soft(self, x: Float[Array, "G T D"]) -> Float[Array, "G T D"]:
        slots = self.slots[...].reshape(x.shape[-1], -1)
        dispatch, combine = expert_routing.soft_slots(x, slots, self.slot_scale[...])
        return on_own_tokens(self._mixed, (x, dispatch, combine), self.kernels)

    def _mixed(self, tokens: tuple[Array, ...], kernels: dict[str, Array], axis: str | None) -> Array:
        x, dispatch, combine = tokens
        count, slots, groups = self.spec.experts, self.spec.slots, x.shape[0]
        rows = jnp.einsum("gts,gtd->sgd", dispatch.astype(x.dtype), x).reshape(count, slots * groups, -1)
        rows = expert_dispatch.in_slots(rows, kernels, activation=self.activation, axis=axis).reshape(count * slots, groups, -1)
        return jnp.einsum("gts,sgd->gtd", combine.astype(x.dtype), rows)
