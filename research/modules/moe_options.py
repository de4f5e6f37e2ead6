"""The options of a mixture of experts, and the published combinations of them."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from research.errors import UserError
from research.modules import elastic
from research.modules.mlp import Glu, Mlp
from research.modules.renamed import Renamed
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
class Moe(Renamed):
    """Options of a mixture of experts.

    Attributes:
      num_experts: E, of which each token is sent to some.
      num_experts_per_tok: k, experts of a token; of expert choice, the mean number; of the router soft, 1.
      ffn_dim: hidden units of each expert; 0: those of the dense FFN over (num_experts_per_tok + num_shared_experts),
        so that active FLOPs are the dense one's.
      expert: glu, geglu, mlp (GELU, with biases) or relu.
      num_shared_experts: experts that every token visits beside its own (DeepSeekMoE), as one of num_shared_experts *
        ffn_dim units.
      router: top_k; expert_choice and soft, which look at later tokens; hash of the token's id; domain, given with the
        example.
      scoring_func, renormalize, routed_scaling_factor, num_expert_groups, topk_groups, group_score: see
        `research.ops.expert_routing.top_k_choice`.
      noise_std: in training, normal noise of this many 1 / E is added to the logits (V-MoE: 1).
      learned_noise: its standard deviation is softplus(x W) instead (Shazeer et al. 2017, arXiv 1701.06538, equation
        4).
      jitter_noise: in training, the router's input is multiplied by uniform numbers within 1 +- jitter.
      bias_update_rate: step of the bias that balances without a loss; 0: there is none.
      slots_per_expert: soft slots of each expert.
      capacity: rule of the places per expert (`research.ops.expert_routing.CAPACITIES`), or "none": nobody is dropped.
      capacity_factor, eval_capacity_factor: factor in the rule; for evaluation 0 means the same.
      order, priority: who gets a place first, see `places`; `priority`: those with the best first choice.
      random_second: in training, second choices are kept with probability min(1, weight / 0.2) (GShard in Mesh, there
        also in evaluation).
      group_size: sequences whose tokens compete for places; 0: the whole batch. The last group of a batch that it does
        not divide has fewer.
      balance_loss_coef, balance_over: coefficient of the load-balance loss, counted over first choices, all, or all
        over k ("mean").
      balance_groups: the loss is of each group and averaged, instead of over all tokens.
      z_loss_coef, importance_loss_coef, load_loss_coef: coefficients of these losses.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    ffn_dim: int = 0
    expert: str = "glu"
    num_shared_experts: int = 0
    router: str = "top_k"
    scoring_func: str = "softmax"
    renormalize: bool = True
    routed_scaling_factor: float = 1.0
    num_expert_groups: int = 1
    topk_groups: int = 1
    group_score: str = "top2"
    noise_std: float = 0.0
    learned_noise: bool = False
    jitter_noise: float = 0.0
    bias_update_rate: float = 0.0
    slots_per_expert: int = 1
    capacity: str = "none"
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 0.0
    order: str = "choice"
    priority: bool = False
    random_second: bool = False
    group_size: int = 1
    balance_loss_coef: float = 0.01
    balance_over: str = "mean"
    balance_groups: bool = False
    z_loss_coef: float = 0.0
    importance_loss_coef: float = 0.0
    load_loss_coef: float = 0.0

    renamed: ClassVar[dict[str, str]] = {
        "experts": "num_experts",
        "active": "num_experts_per_tok",
        "hidden": "ffn_dim",
        "shared": "num_shared_experts",
        "score": "scoring_func",
        "scale": "routed_scaling_factor",
        "expert_groups": "num_expert_groups",
        "kept_groups": "topk_groups",
        "noise": "noise_std",
        "jitter": "jitter_noise",
        "bias_rate": "bias_update_rate",
        "slots": "slots_per_expert",
        "group": "group_size",
        "balance": "balance_loss_coef",
        "z": "z_loss_coef",
        "importance": "importance_loss_coef",
        "load": "load_loss_coef",
    }
    causal_routers: ClassVar[tuple[str, ...]] = ("top_k", "hash", "domain")

    @property
    def gated(self) -> bool:
        return EXPERTS.get(self.expert, ("", True, False))[1]

    @property
    def counted_batch(self) -> int:
        """Examples over which FLOPs are counted: those of a group, whose places are rounded together."""
        return max(1, self.group_size) if self.capacity != "none" or self.router == "expert_choice" else 1

    def resolve(self, ffn_dim: int) -> "Moe":
        """Returns the options with `ffn_dim` filled in, from the hidden units of the dense part.

        Raises:
          UserError: options that do not fit together.
        """
        for name, least in {
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "ffn_dim": 0,
            "num_shared_experts": 0,
            "group_size": 0,
            "slots_per_expert": 1,
        }.items():
            self._require(name, vars(self)[name] >= least, f"whole numbers from {least}")
        self._require("expert", self.expert in EXPERTS, ", ".join(EXPERTS))
        self._require(
            "expert", not self.num_shared_experts or self.expert in SHARED, f"{' or '.join(SHARED)} with shared experts"
        )
        self._require("router", self.router in ROUTERS, ", ".join(ROUTERS))
        self._require("balance_over", self.balance_over in BALANCE_OVER, ", ".join(BALANCE_OVER))
        self._require(
            "capacity",
            self.capacity in ("none", *expert_routing.CAPACITIES),
            ", ".join(("none", *expert_routing.CAPACITIES)),
        )
        self._require("order", self.order in expert_routing.ORDERS, ", ".join(expert_routing.ORDERS))
        self._require("scoring_func", self.scoring_func in expert_routing.SCORES, ", ".join(expert_routing.SCORES))
        whole = self.num_expert_groups >= 1 and self.num_experts % self.num_expert_groups == 0
        self._require("num_expert_groups", whole, f"divisors of num_experts={self.num_experts}")
        reach = self.num_experts
        if self.num_expert_groups > 1:
            self._require(
                "topk_groups",
                1 <= self.topk_groups <= self.num_expert_groups,
                f"1 to num_expert_groups={self.num_expert_groups}",
            )
            reach = self.num_experts // self.num_expert_groups * self.topk_groups
        if self.router in ("hash", "domain", "soft"):
            self._require("num_experts_per_tok", self.num_experts_per_tok == 1, f"1 with router={self.router}")
        if self.router == "top_k":
            self._require(
                "num_experts_per_tok",
                self.num_experts_per_tok <= reach,
                f"1 to the {reach} experts that a token can reach (num_experts={self.num_experts})",
            )
        hidden = self.ffn_dim or max(8, round(ffn_dim / (self.num_experts_per_tok + self.num_shared_experts) / 8) * 8)
        return replace(self, ffn_dim=hidden, topk_groups=min(self.topk_groups, self.num_expert_groups))

    def _require(self, name: str, condition: bool, valid: str) -> None:
        if not condition:
            raise UserError(f"moe: {name}={vars(self)[name]!r}; valid: {valid}")

    def shrink(self, width: float, ffn: float, experts, active) -> "Moe":
        """Returns the options of a sub-network: hidden units follow the width and `ffn`, the first experts stay."""
        groups = self.num_expert_groups
        count = elastic.depth_count(1.0 if experts is None else experts, self.num_experts, groups, "experts")
        active = (
            self.num_experts_per_tok
            if active is None
            else elastic.depth_count(active, self.num_experts_per_tok, 1, "active")
        )
        hidden = elastic.scaled(max(8, round(self.ffn_dim * width)), ffn, 8, "ffn")
        return replace(self, num_experts=count, num_experts_per_tok=min(active, count), ffn_dim=hidden)


FAMILIES: dict[str, Moe] = {
    "switch": Moe(num_experts_per_tok=1, expert="relu", renormalize=False, jitter_noise=0.01, capacity="mesh",
                  eval_capacity_factor=2.0, balance_over="first"),
    "gshard": Moe(expert="relu", capacity="mesh", eval_capacity_factor=2.0, random_second=True, balance_over="first"),
    "st_moe": Moe(expert="geglu", capacity="flaxformer", eval_capacity_factor=2.0, balance_over="first",
                  z_loss_coef=1e-3),
    "v_moe": Moe(expert="mlp", renormalize=False, noise_std=1.0, capacity="v_moe", capacity_factor=1.05,
                 eval_capacity_factor=4.0, group_size=8, balance_loss_coef=0.0,
                 importance_loss_coef=0.005, load_loss_coef=0.005),
    "expert_choice": Moe(expert="geglu", router="expert_choice", balance_loss_coef=0.0),
    "soft": Moe(expert="mlp", num_experts_per_tok=1, router="soft", balance_loss_coef=0.0),
    "mixtral": Moe(balance_loss_coef=1e-3, balance_over="all"),
    "qwen3": Moe(num_experts=128, num_experts_per_tok=8, balance_loss_coef=1e-3, balance_over="all"),
    "jamba": Moe(num_experts=16, renormalize=False, balance_loss_coef=1e-3, balance_over="all"),
    "deepseek": Moe(num_experts=64, num_experts_per_tok=6, num_shared_experts=2, renormalize=False,
                    balance_loss_coef=1e-3),
    "deepseek_v3": Moe(num_experts=256, num_experts_per_tok=8, num_shared_experts=1, scoring_func="sigmoid",
                       routed_scaling_factor=2.5, num_expert_groups=8, topk_groups=4, bias_update_rate=1e-3,
                       balance_loss_coef=1e-4, balance_groups=True),
    "hash": Moe(num_experts_per_tok=1, router="hash", balance_loss_coef=0.0),
    "domain": Moe(num_experts_per_tok=1, router="domain", balance_loss_coef=0.0),
}  # fmt: skip
"""Name -> the published combination (facts of routers, capacities, noise and losses; sizes are examples)."""
