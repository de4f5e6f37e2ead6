"""What families with routed convolutions share: the fields `num_experts`, `router_dims`, `router_depths` and `form`,
and their sub-networks.

Layers, router and training are those of Robust MoE-CNN (Zhang et al. 2023, arXiv 2308.10110).
"""

import itertools
from typing import Any

from research.errors import UserError
from research.models.forms import check_form
from research.modules import elastic
from research.ops import routed_conv

ROUTER = "router/"
"""What the names of the router's parameters start with; all others are the backbone's."""

EXPERTS_SHRINK = "fraction of the pathways, or a whole number of them; 1 leaves the first and no router"


def check_routing(config: Any) -> None:
    """Raises UserError for a number of experts, a router or a form that cannot be built."""
    family = config.family
    check_form(family, config.form, {routed_conv.OP: tuple(routed_conv.FORMS)})
    if config.num_experts < 0:
        raise UserError(
            f"{family}: num_experts={config.num_experts}; valid: 0 (an ordinary network) or whole numbers from 1"
        )
    dims, depths = config.router_dims, config.router_depths
    if len(dims) != len(depths) or not dims or min(*dims, *depths) < 1:
        raise UserError(
            f"{family}: router_dims={dims} and router_depths={depths} need one whole number from 1 per stage"
        )
    if any(wide < narrow for narrow, wide in itertools.pairwise(dims)):
        raise UserError(f"{family}: router_dims={dims} must not fall: the router's shortcuts pad channels")


def shrunk_experts(experts: int, choice: float | int) -> int:
    """Returns how many of the experts stay; an ordinary network has none."""
    return elastic.depth_count(choice, experts, 1, "experts") if experts else 0


ADVMOE = ("arXiv 2308.10110", "github.com/OPTML-Group/Robust-MoE-CNN")
"""Paper and source of the networks with routed convolutions."""
ROUTER_COUNT = 269_202
"""Parameters of their router."""
TINY_ROUTER: dict[str, Any] = {"num_experts": 3, "router_dims": (4, 6), "router_depths": (1, 2), "form": "all"}
"""What shrinks it, for tests."""
