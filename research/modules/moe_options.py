"""The options of a mixture of experts, and the published combinations of them."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from research.errors import UserError
from research.modules import elastic
from research.modules.mlp import Glu, Mlp
from research.ops import expert_routing

ROUTERS = ("top_k", "expert_choice", "soft", "hash", "domain")
EXPERTS = {
    "glu": ("silu", True, False),
    "geglu": ("gelu", True, False),
    "mlp": ("gelu", False, True),
    "relu": ("relu", False, False),
}
"""Kind of expert -> (activation, whether it is gated, whether it has biases)."""
SHARED = {"glu": Glu, "mlp": Mlp}
BALANCE_OVER = ("first", "all", "mean")


class HasMixtures:
    """What the config of a model derives from some of whose layers may be mixtures of experts."""

    @property
    def has_mixtures(self) -> bool:
        """Whether some are."""
        raise NotImplementedError

    @property
    def mixture(self) -> "Moe":
        """The options of the mixtures, every size filled in."""
        raise NotImplementedError


def mixture_of(config: Any) -> "Moe | None":
    """Returns the options of a model's mixtures of experts, every size filled in; None of one without."""
    return config.mixture if isinstance(config, HasMixtures) and config.has_mixtures else None


@dataclass(frozen=True)
class Moe:
    """Options of a mixture of experts.

    Attributes:
      experts: E, of which each token is sent to some.
      active: k, experts of a token; of expert choice, the mean number; of the router soft, 1.
      hidden: hidden units of each expert; 0: those of the dense part over (active + shared), so that active FLOPs are
        the dense one's.
      expert: glu, geglu, mlp (GELU, with biases) or relu.
      shared: experts that every token visits beside its own (DeepSeekMoE), as one of shared * hidden units.
      router: top_k; expert_choice and soft, which look at later tokens; hash of the token's id; domain, given with the
        example.
      score, renormalize, scale, expert_groups, kept_groups, group_score: see
        `research.ops.expert_routing.top_k_choice`.
      noise: in training, normal noise of this many 1 / E is added to the logits (V-MoE: 1).
      learned_noise: its standard deviation is softplus(x W) instead (Shazeer et al. 2017, arXiv 1701.06538, equation
        4).
      jitter: in training, the router's input is multiplied by uniform numbers within 1 +- jitter.
      bias_rate: step of the bias that balances without a loss; 0: there is none.
      slots: soft slots of each expert.
      capacity: rule of the places per expert (`research.ops.expert_routing.CAPACITIES`), or "none": nobody is dropped.
      capacity_factor, eval_capacity_factor: factor in the rule; for evaluation 0 means the same.
      order, priority: who gets a place first, see `places`; `priority`: those with the best first choice.
      random_second: in training, second choices are kept with probability min(1, weight / 0.2) (GShard in Mesh, there
        also in evaluation).
      group: sequences whose tokens compete for places; 0: the whole batch. The last group of a batch that it does not
        divide has fewer.
      balance, balance_over: coefficient of the load-balance loss, counted over first choices, all, or all over k
        ("mean").
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
        for name, least in {"experts": 1, "active": 1, "hidden": 0, "shared": 0, "group": 0, "slots": 1}.items():
            self._require(name, vars(self)[name] >= least, f"whole numbers from {least}")
        self._require("expert", self.expert in EXPERTS, ", ".join(EXPERTS))
        self._require("expert", not self.shared or self.expert in SHARED, f"{' or '.join(SHARED)} with shared experts")
        self._require("router", self.router in ROUTERS, ", ".join(ROUTERS))
        self._require("balance_over", self.balance_over in BALANCE_OVER, ", ".join(BALANCE_OVER))
        self._require(
            "capacity",
            self.capacity in ("none", *expert_routing.CAPACITIES),
            ", ".join(("none", *expert_routing.CAPACITIES)),
        )
        self._require("order", self.order in expert_routing.ORDERS, ", ".join(expert_routing.ORDERS))
        self._require("score", self.score in expert_routing.SCORES, ", ".join(expert_routing.SCORES))
        whole = self.expert_groups >= 1 and self.experts % self.expert_groups == 0
        self._require("expert_groups", whole, f"divisors of experts={self.experts}")
        reach = self.experts
        if self.expert_groups > 1:
            self._require(
                "kept_groups", 1 <= self.kept_groups <= self.expert_groups, f"1 to expert_groups={self.expert_groups}"
            )
            reach = self.experts // self.expert_groups * self.kept_groups
        if self.router in ("hash", "domain", "soft"):
            self._require("active", self.active == 1, f"1 with router={self.router}")
        if self.router == "top_k":
            self._require(
                "active",
                self.active <= reach,
                f"1 to the {reach} experts that a token can reach (experts={self.experts})",
            )
        hidden = self.hidden or max(8, round(ffn_dim / (self.active + self.shared) / 8) * 8)
        return replace(self, hidden=hidden, kept_groups=min(self.kept_groups, self.expert_groups))

    def _require(self, name: str, condition: bool, valid: str) -> None:
        if not condition:
            raise UserError(f"moe: {name}={vars(self)[name]!r}; valid: {valid}")

    def shrink(self, width: float, ffn: float, experts, active) -> "Moe":
        """Returns the options of a sub-network: hidden units follow the width and `ffn`, the first experts stay."""
        groups = self.expert_groups
        count = elastic.depth_count(1.0 if experts is None else experts, self.experts, groups, "experts")
        active = self.active if active is None else elastic.depth_count(active, self.active, 1, "active")
        hidden = elastic.scaled(max(8, round(self.hidden * width)), ffn, 8, "ffn")
        return replace(self, experts=count, active=min(active, count), hidden=hidden)


FAMILIES: dict[str, Moe] = {
    "switch": Moe(active=1, expert="relu", renormalize=False, jitter=0.01, capacity="mesh", eval_capacity_factor=2.0,
                  balance_over="first"),
    "gshard": Moe(expert="relu", capacity="mesh", eval_capacity_factor=2.0, random_second=True, balance_over="first"),
    "st_moe": Moe(expert="geglu", capacity="flaxformer", eval_capacity_factor=2.0, balance_over="first", z=1e-3),
    "v_moe": Moe(expert="mlp", renormalize=False, noise=1.0, capacity="v_moe", capacity_factor=1.05,
                 eval_capacity_factor=4.0, group=8, balance=0.0, importance=0.005, load=0.005),
    "expert_choice": Moe(expert="geglu", router="expert_choice", balance=0.0),
    "soft": Moe(expert="mlp", active=1, router="soft", balance=0.0),
    "mixtral": Moe(balance=1e-3, balance_over="all"),
    "qwen3": Moe(experts=128, active=8, balance=1e-3, balance_over="all"),
    "jamba": Moe(experts=16, renormalize=False, balance=1e-3, balance_over="all"),
    "deepseek": Moe(experts=64, active=6, shared=2, renormalize=False, balance=1e-3),
    "deepseek_v3": Moe(experts=256, active=8, shared=1, score="sigmoid", scale=2.5, expert_groups=8, kept_groups=4,
                       bias_rate=1e-3, balance=1e-4, balance_groups=True),
    "hash": Moe(active=1, router="hash", balance=0.0),
    "domain": Moe(active=1, router="domain", balance=0.0),
}  # fmt: skip
"""Name -> the published combination (facts of routers, capacities, noise and losses; sizes are examples)."""
