"""What families with routed convolutions share: the fields `num_experts`, `router_dims`, `router_depths` and
`implementation`, the router, and their sub-networks.

Layers, router and training are those of Robust MoE-CNN (Zhang et al. 2023, arXiv 2308.10110).
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from research.errors import UserError
from research.models.base import ChoosesImplementations
from research.models.implementations import check_implementation
from research.modules import elastic
from research.modules.axes import Init, role
from research.modules.routed_conv import ImageRouter
from research.modules.state import abstract
from research.ops import routed_conv

EXPERTS_SHRINK = "fraction of the pathways, or a whole number of them; 1 leaves the first and no router"


@dataclass(frozen=True, kw_only=True)
class RoutedConfig(ChoosesImplementations):
    """Base of their configs; their modules derive from `research.modules.routed_conv.RoutedNetwork`.

    `num_experts` is the number of pathways (0: an ordinary network), `router_dims` and `router_depths` size the router
    that chooses among them, `implementation` is that of the routed convolutions (see `research.ops.routed_conv`).
    """

    num_experts: int = 0
    router_dims: tuple[int, ...] = (16, 32, 64)
    router_depths: tuple[int, ...] = (3, 3, 3)
    implementation: str = "auto"

    renamed: ClassVar[dict[str, str]] = {"experts": "num_experts"}
    router: ClassVar[str] = "router/"

    @property
    def pathways(self) -> int:
        return self.num_experts

    def check_routing(self) -> None:
        """Raises UserError for a number of experts, a router or an implementation that cannot be built."""
        check_implementation(self.family, self.implementation, {routed_conv.OP: tuple(routed_conv.IMPLEMENTATIONS)})
        if self.num_experts < 0:
            raise UserError(
                f"{self.family}: num_experts={self.num_experts}; valid: 0 (an ordinary network) or whole numbers from 1"
            )
        dims, depths = self.router_dims, self.router_depths
        if len(dims) != len(depths) or not dims or min(*dims, *depths) < 1:
            raise UserError(
                f"{self.family}: router_dims={dims} and router_depths={depths} need one whole number from 1 per stage"
            )
        if any(wide < narrow for narrow, wide in itertools.pairwise(dims)):
            raise UserError(f"{self.family}: router_dims={dims} must not fall: the router's shortcuts pad channels")

    def shrunk_experts(self, choice: float | int) -> int:
        """Returns how many of the experts stay; an ordinary network has none."""
        return elastic.depth_count(choice, self.num_experts, 1, "experts") if self.num_experts else 0

    def build_router(self, init: Init) -> ImageRouter | None:
        """Builds the router from the network's own `init`; None where there is no choice. The network calls it
        `router`, as the class attribute says."""
        if self.num_experts < 2:
            return None
        channels = self.input_shape()[-1]
        return ImageRouter(channels, self.router_dims, self.router_depths, self.num_experts, init.child("router"))

    def active_params(self) -> int:
        """One expert of every routed convolution, and all of the router."""
        full = abstract(self)
        if self.num_experts < 2:
            return full.num_params()
        routed = sum(
            math.prod(shape.shape)
            for name, shape in full.params.items()
            if not name.startswith(self.router) and "experts" in map(role, full.axes[name])
        )
        return full.num_params() - round((1 - 1 / self.num_experts) * routed)


ADVMOE = ("arXiv 2308.10110", "github.com/OPTML-Group/Robust-MoE-CNN")
"""Paper and source of the networks with routed convolutions."""
ROUTER_COUNT = 269_202
"""Parameters of their router."""
TINY_ROUTER: dict[str, Any] = {
    "num_experts": 3,
    "router_dims": (4, 6),
    "router_depths": (1, 2),
    "implementation": "all",
}
"""What shrinks it, for tests."""
