"""A mixture of feed-forward experts in place of an FFN: the router, the experts, what is told of both.

`research.modules.moe_options` says which experts, which router, which dispatch. A forward pass costs what the
active experts cost, not what all do. Tokens that are not real (`Call.real`: padding, the filler of an evaluation batch)
compete for nothing and count nowhere. Where tokens continue from a state (`Call.carried`: text is generated) nobody is
dropped, whatever the capacity: what becomes of a text depends neither on those beside it nor on how it is cut into
pieces. Statistics, of the last call in mode "train": `load` (share of the tokens that chose each expert), `observed`
(one number for each of `OBSERVED`), `aux_loss` (the balancing losses, weighted); for balancing without one `bias`,
which an update as a whole moves, and `chosen`, the tokens of each expert in that update so far.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from research.errors import UserError
from research.modules.axes import Init, Kind, Log, StatKind
from research.modules.layers import normal_02, ones, zeros
from research.modules.mesh import on_local_tokens
from research.modules.mixers.base import Call
from research.modules.moe_options import EXPERTS, SHARED, Moe
from research.modules.state import OncePerUpdate
from research.ops import expert_dispatch, expert_routing
from research.ops.precision import matmul, wide

JITTER, NOISE, SECOND = 8, 9, 10
"""What the layer's key is folded with; its dropout folds smaller numbers."""
HEADING = "experts"
"""Of what the log tells of mixtures, see `research.modules.axes.Log`."""
OBSERVED = ("entropy", "max_load", "dropped", "router_z", "confidence")
"""Entropy of the load in nats (ln E when even); largest load over the mean one; share of the choices that found no
place (expert
choice: of the tokens that no expert took); mean squared log-sum-exp of the logits; mean score of the first choice."""


def _search(scores: Float[Array, "B *T E"], k: int) -> Array:
    """`expert_routing.best`, a custom call on some platforms, on each device's own tokens."""
    return on_local_tokens(lambda tokens, experts, axis: expert_routing.best(tokens[0], k), (scores,), {})


def _places(
    rule: Callable[[int], int], tokens: int, real: Bool[Array, "G T"] | None
) -> tuple[int, tuple[Int[Array, " G"], ...]]:
    """Returns (an expert's places for a group of so many tokens, and where not all are real, how many of them each
    group may fill)."""
    if real is None:
        return rule(tokens), ()
    table = expert_routing.by_count(rule, tokens)
    return int(table.max()), (jnp.asarray(table)[real.sum(-1)],)


class MoeFfn(nnx.Module, OncePerUpdate):
    """y = sum over a token's experts of weight * expert(x), plus the shared experts.

    D E parameters of the router and (2 or 3) D F of each expert, D + F more with biases. Router and statistics are in
    float32 whatever the rest is in. `axes` as in `Mlp`; `scope` names the axis of the experts.
    """

    def __init__(
        self, spec: Moe, channels: int, axes: tuple[str, str], scope: str, init: Init, implementation: str = "auto"
    ):
        self.spec, self.implementation = spec, implementation
        count, experts = spec.num_experts, f"{scope}/experts"
        self.activation, gated, biased = EXPERTS[spec.expert]
        inward = (count, channels, spec.ffn_dim), (experts, *axes)
        self.up = init.param("up", *inward, normal_02, Kind.MATRIX)
        self.gate = init.param("gate", *inward, normal_02, Kind.MATRIX) if gated else None
        self.down = init.param("down", (count, spec.ffn_dim, channels), (experts, *axes[::-1]), normal_02, Kind.MATRIX)
        self.up_bias = (
            init.param("up_bias", (count, spec.ffn_dim), (experts, axes[1]), zeros, Kind.BIAS) if biased else None
        )
        self.down_bias = (
            init.param("down_bias", (count, channels), (experts, axes[0]), zeros, Kind.BIAS) if biased else None
        )
        around = channels, spec.num_shared_experts * spec.ffn_dim, (axes[0], f"{scope}/shared/mlp")
        self.shared = SHARED[spec.expert](*around, init.child("shared")) if spec.num_shared_experts else None
        routed = (channels, count), (axes[0], experts)
        learnt = spec.router in ("top_k", "expert_choice")
        self.router = init.param("router", *routed, normal_02, Kind.MATRIX, precise=True) if learnt else None
        self.noise = (
            init.param("noise", *routed, zeros, Kind.MATRIX, precise=True) if learnt and spec.learned_noise else None
        )
        soft = spec.router == "soft"
        slots = (channels, count, spec.slots_per_expert), (axes[0], experts, f"{scope}/slots")
        self.slots = init.param("slots", *slots, normal_02, Kind.MATRIX) if soft else None
        self.slot_scale = init.param("slot_scale", (), (), ones, Kind.GAIN) if soft else None
        self.bias = init.stat("bias", (count,), (experts,), zeros, StatKind.STATE) if spec.bias_update_rate else None
        self.chosen = init.stat("chosen", (count,), (experts,), zeros, StatKind.SUM) if spec.bias_update_rate else None
        told = lambda names: Log(HEADING, names)
        self.load = init.stat("load", (count,), (experts,), zeros, StatKind.LOG, log=told("load"))
        numbers = (len(OBSERVED),), (f"{scope}/observed",)
        self.observed = init.stat("observed", *numbers, zeros, StatKind.LOG, log=told(OBSERVED))
        self.aux_loss = init.stat("aux_loss", (), (), zeros, StatKind.LOSS)

    def __call__(self, x: Float[Array, "B *T D"], call: Call) -> Float[Array, "B *T D"]:
        rows, own = self._grouped(x, call)
        if self.spec.router == "soft":
            y = self._soft(rows, own)
        elif self.spec.router == "expert_choice":
            y = self._expert_choice(rows, own)
        else:
            y = self._token_choice(rows, own)
        y = y.astype(x.dtype).reshape(-1, *x.shape[1:])
        y = y if y.shape[0] == x.shape[0] else y[: x.shape[0]]
        return y if self.shared is None else y + self.shared(x)

    def _grouped(self, x: Float[Array, "B *T D"], call: Call) -> tuple[Float[Array, "G T D"], Call]:
        """Returns the tokens in groups that compete apart, and the call with `tokens`, `domain` and `real` laid out
        alike, [G, T].

        A group is of `group_size` sequences, or all of a smaller batch; 0: of all. The last one may have fewer, and is
        filled up with sequences that are not real.
        """
        batch, wanted = x.shape[0], self.spec.group_size
        wanted = min(wanted, 1) if x.ndim == 2 else wanted  # a step of generation has one token of each sequence
        size = (
            wanted if wanted == 1 else min(wanted, batch) or batch
        )  # an exported program's batch is open, and no number
        missing = 0 if wanted < 2 else -batch % size
        mask, router = call.mask(x.shape[:-1]), self.spec.router
        ids, domain = call.tokens if router == "hash" else None, call.domain if router == "domain" else None
        if missing:
            mask = jnp.ones(x.shape[:-1], bool) if mask is None else mask
            fill = lambda a: jnp.pad(a, ((0, missing), *[(0, 0)] * (a.ndim - 1)))
            x, mask = fill(x), fill(mask)
            ids, domain = None if ids is None else fill(ids), None if domain is None else fill(domain)
        x = x.reshape((batch + missing) // size if wanted else 1, -1, x.shape[-1])
        laid = lambda a: None if a is None else a.reshape(x.shape[:2])
        if domain is not None:
            domain = jnp.broadcast_to(domain[:, None], (domain.shape[0], x.shape[0] * x.shape[1] // domain.shape[0]))
        return x, replace(call, real=laid(mask), tokens=laid(ids), domain=laid(domain))

    @property
    def kernels(self) -> dict[str, Array]:
        """The experts' kernels and biases as the ops take them."""
        arrays = {
            "up": self.up,
            "gate": self.gate,
            "down": self.down,
            "up_bias": self.up_bias,
            "down_bias": self.down_bias,
        }
        return {name: array[...] for name, array in arrays.items() if array is not None}

    # --- the router ---------------------------------------------------------------------------------------------------

    def _logits(
        self, x: Float[Array, "G T D"], call: Call
    ) -> tuple[Float[Array, "G T E"], Float[Array, "G T E"], Array | float]:
        """Returns (logits, logits with noise, its standard deviation); noise and jitter in training only, and only
        under a key."""
        x, spec, key = wide(x), self.spec, call.key if call.mode == "train" else None
        assert self.router is not None  # of these routers
        if key is not None and spec.jitter_noise:
            x = expert_routing.jitter(x, jax.random.fold_in(key, JITTER), spec.jitter_noise)
        logits = matmul(x, self.router[...].astype(x.dtype))
        std: Array | float = spec.noise_std / spec.num_experts
        if self.noise is not None:
            std = jax.nn.softplus(matmul(x, self.noise[...].astype(x.dtype)))
        if key is None or not (spec.noise_std or spec.learned_noise):
            return logits, logits, std
        return (
            logits,
            logits + std * jax.random.normal(jax.random.fold_in(key, NOISE), logits.shape, logits.dtype),
            std,
        )

    def _enforced(self, call: Call) -> expert_routing.Choice:
        """The choice of routers that learn nothing: by a hash of the token's id, or by the domain that the example
        comes with."""
        spec = self.spec
        given = call.tokens if spec.router == "hash" else call.domain
        if given is None:
            needs = {"hash": "token ids", "domain": "the domain of each example"}[spec.router]
            raise UserError(f"moe: router={spec.router!r} needs {needs}, which this call does not have")
        experts = (expert_routing.hashed(given, spec.num_experts) if spec.router == "hash" else given)[
            ..., None
        ].astype(jnp.int32)
        return expert_routing.Choice(
            experts, jnp.ones(experts.shape), jax.nn.one_hot(experts[..., 0], spec.num_experts)
        )

    def _token_choice(self, x: Float[Array, "G T D"], call: Call) -> Float[Array, "G T D"]:
        spec = self.spec
        if self.router is None:
            choice = expert_routing.only_real(self._enforced(call), call.real)
            if call.mode == "train":
                self._observe(self._load(choice.experts, call.real), jnp.zeros(()), jnp.ones(()))
            return self._dispatch(x, choice, call)
        logits, noisy, std = self._logits(x, call)
        choice = expert_routing.top_k_choice(
            noisy,
            spec.num_experts_per_tok,
            scoring_func=spec.scoring_func,
            renormalize=spec.renormalize,
            scale=spec.routed_scaling_factor,
            bias=None if self.bias is None else self.bias[...],
            num_expert_groups=spec.num_expert_groups,
            topk_groups=spec.topk_groups,
            group_score=spec.group_score,
            search=_search,
        )
        if spec.random_second and call.mode == "train" and call.key is not None:
            choice = expert_routing.give_up_second(choice, jax.random.fold_in(call.key, SECOND))
        choice = expert_routing.only_real(choice, call.real)
        if call.mode == "train":
            self._balance(choice, logits, noisy, std, call.real)
        return self._dispatch(x, choice, call)

    def _load(self, experts: Int[Array, "G T k"], real: Bool[Array, "G T"] | None) -> Float[Array, " E"]:
        """The share of all real tokens that chose each expert."""
        count = self.spec.num_experts
        if real is None:
            return expert_routing.expert_fractions(experts, count).mean(0)
        return expert_routing.expert_fractions(experts.reshape(-1, experts.shape[-1]), count, real.reshape(-1))

    def _balance(
        self,
        choice: expert_routing.Choice,
        logits: Array,
        noisy: Array,
        std: Array | float,
        real: Bool[Array, "G T"] | None,
    ) -> None:
        """Stores the weighted losses, the load and the numbers of `OBSERVED`, and counts what the bias is moved by."""
        spec = self.spec
        scores, experts = choice.scores, choice.experts
        over = experts[..., :1] if spec.balance_over == "first" else experts
        if spec.scoring_func == "sigmoid":
            scores = scores / scores.sum(-1, keepdims=True)
        whole = lambda a: a if spec.balance_groups else a.reshape(1, -1, a.shape[-1])
        counted = real if real is None or spec.balance_groups else real.reshape(1, -1)
        share = 1 / spec.num_experts_per_tok if spec.balance_over == "mean" else 1.0
        losses = jnp.zeros(())
        if spec.balance_loss_coef:
            losses += (
                spec.balance_loss_coef
                * share
                * expert_routing.load_balance_loss(whole(scores), whole(over), mask=counted)
            )
        if spec.z_loss_coef:
            losses += spec.z_loss_coef * expert_routing.z_loss(logits, real)
        if spec.importance_loss_coef:
            losses += spec.importance_loss_coef * expert_routing.importance_loss(jax.nn.softmax(logits), real)
        if spec.load_loss_coef and (spec.noise_std or spec.learned_noise):
            losses += spec.load_loss_coef * expert_routing.load_loss(logits, noisy, spec.num_experts_per_tok, std, real)
        self.aux_loss[...] = losses
        load = self._load(experts, real)
        if self.chosen is not None:
            tokens = experts.size // spec.num_experts_per_tok if real is None else real.sum()
            self.chosen[...] += jnp.round(load * tokens)  # whole, so that an even load is no step in rounding
        self._observe(
            load, expert_routing.z_loss(logits, real), expert_routing.over_tokens(choice.scores.max(-1), real)
        )

    def after_update(self) -> None:
        if self.bias is not None and self.chosen is not None:
            self.bias[...] = expert_routing.balanced_bias(self.bias[...], self.chosen[...], self.spec.bias_update_rate)
            self.chosen[...] = jnp.zeros_like(self.chosen[...])

    def _observe(self, load, router_z, confidence):
        self.load[...] = jax.lax.stop_gradient(load)
        numbers = {
            "entropy": expert_routing.entropy(load),
            "max_load": load.max() / jnp.maximum(load.mean(), 1e-20),
            "router_z": router_z,
            "confidence": confidence,
        }
        for name, value in numbers.items():
            self._set_observed(name, value)

    # --- to the experts and back --------------------------------------------------------------------------------------

    def _dispatch(self, x: Float[Array, "G T D"], choice: expert_routing.Choice, call: Call) -> Float[Array, "G T D"]:
        spec = self.spec
        if spec.capacity == "none" or call.carried:
            pairs = (
                x.reshape(-1, x.shape[-1]),
                choice.experts.reshape(-1, spec.num_experts_per_tok),
                choice.weights.reshape(-1, spec.num_experts_per_tok),
            )
            return on_local_tokens(self._dropless, pairs, self.kernels).reshape(x.shape)
        train = call.mode == "train" or not spec.eval_capacity_factor
        factor = spec.capacity_factor if train else spec.eval_capacity_factor
        rule = lambda n: min(
            n, max(1, expert_routing.capacity(spec.capacity, n, spec.num_experts, spec.num_experts_per_tok, factor))
        )
        capacity, limit = _places(rule, x.shape[1], call.real)
        own = (x, choice.experts, choice.weights, *limit)
        y, found = on_local_tokens(functools.partial(self._with_places, capacity), own, self.kernels)
        if call.mode == "train":
            share = (
                found.mean(dtype=jnp.float32)
                if call.real is None
                else expert_routing.over_tokens(found.mean(-1), call.real)
            )
            self._set_observed("dropped", 1 - share)
        return y

    def _dropless(self, tokens: tuple[Array, ...], kernels: dict[str, Array], axis: str | None) -> Array:
        x, experts, weights = tokens
        return expert_dispatch.dropless(
            x, experts, weights, kernels, activation=self.activation, implementation=self.implementation, axis=axis
        )

    def _with_places(
        self, capacity: int, tokens: tuple[Array, ...], kernels: dict[str, Array], axis: str | None
    ) -> tuple[Array, Array]:
        """Returns the output and which pairs found a place."""
        spec = self.spec
        x, experts, weights, *limit = tokens
        groups = x.shape[0]
        find = lambda e, p: expert_routing.places(e, spec.num_experts, order=spec.order, priority=p)
        places = jax.vmap(find)(experts, weights[..., 0] if spec.priority else None)
        found = places < capacity
        if limit:
            found = (places < limit[0][:, None, None]) & (experts < spec.num_experts)
        # Places of all groups behind one another in each expert's rows.
        places = jnp.where(found, places + capacity * jnp.arange(groups)[:, None, None], groups * capacity)
        flat = lambda a: a.reshape(-1, a.shape[-1])
        rows, pairs = flat(x), (flat(experts), flat(weights), flat(places))
        y = expert_dispatch.with_places(rows, *pairs, groups * capacity, kernels, activation=self.activation, axis=axis)
        return y.reshape(x.shape), found

    def _set_observed(self, name: str, value: Array) -> None:
        self.observed[...] = self.observed[...].at[OBSERVED.index(name)].set(jax.lax.stop_gradient(value))

    def _expert_choice(self, x: Float[Array, "G T D"], call: Call) -> Float[Array, "G T D"]:
        spec, real = self.spec, call.real
        logits, noisy, _ = self._logits(x, call)
        capacity, limit = _places(
            lambda n: min(n, max(1, round(spec.num_experts_per_tok * n / spec.num_experts))), x.shape[1], real
        )
        own = (x, noisy) if real is None else (x, noisy, real, *limit)
        y, taken = on_local_tokens(functools.partial(self._taken, capacity), own, self.kernels)
        if call.mode == "train":
            self.aux_loss[...] = spec.z_loss_coef * expert_routing.z_loss(logits, real)
            confidence = expert_routing.over_tokens(jax.nn.softmax(noisy).max(-1), real)
            share = capacity / x.shape[1] if real is None else limit[0].sum() / jnp.maximum(real.sum(), 1)
            self._observe(jnp.full(spec.num_experts, share), expert_routing.z_loss(logits, real), confidence)
            self._set_observed("dropped", expert_routing.over_tokens((taken == 0).astype(jnp.float32), real))
        return y

    def _taken(
        self, capacity: int, tokens: tuple[Array, ...], kernels: dict[str, Array], axis: str | None
    ) -> tuple[Array, Array]:
        """Returns the output of expert choice, and how many experts took each token."""
        x, logits, *told = tokens
        slots = expert_routing.expert_choice(logits, capacity, **dict(zip(("mask", "limit"), told, strict=bool(told))))
        taken = jax.nn.one_hot(slots.tokens, x.shape[1]).sum((1, 2))
        y = expert_dispatch.chosen_by_experts(
            x, slots.tokens, slots.weights, kernels, activation=self.activation, axis=axis
        )
        return y, taken

    def _soft(self, x: Float[Array, "G T D"], call: Call) -> Float[Array, "G T D"]:
        assert self.slots is not None and self.slot_scale is not None  # of this router
        slots = self.slots[...].reshape(x.shape[-1], -1)
        dispatch, combine = expert_routing.soft_slots(x, slots, self.slot_scale[...], call.real)
        return on_local_tokens(self._mixed, (x, dispatch, combine), self.kernels)

    def _mixed(self, tokens: tuple[Array, ...], kernels: dict[str, Array], axis: str | None) -> Array:
        x, dispatch, combine = tokens
        count, slots, groups = self.spec.num_experts, self.spec.slots_per_expert, x.shape[0]
        rows = jnp.einsum("gts,gtd->sgd", dispatch.astype(x.dtype), x).reshape(count, slots * groups, -1)
        rows = expert_dispatch.in_slots(rows, kernels, activation=self.activation, axis=axis).reshape(
            count * slots, groups, -1
        )
        return jnp.einsum("gts,sgd->gtd", combine.astype(x.dtype), rows)
