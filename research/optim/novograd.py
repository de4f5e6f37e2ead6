"""NovoGrad: a second moment for each layer instead of one for each number."""

from collections.abc import Mapping

import optax

from research.modules.axes import Axes
from research.optim.registry import register
from research.optim.stacks import by_layer


@register("novograd", source="Ginsburg et al. 2019, arXiv 1905.11286", lr=1e-2, weight_decay=1e-3)
def novograd(
    axes: Mapping[str, Axes], b1: float = 0.9, b2: float = 0.25, eps: float = 1e-8
) -> optax.GradientTransformation:
    """NovoGrad, whose norms are those of single layers, also where layers are stacked in one array."""
    return by_layer(optax.scale_by_novograd(b1=b1, b2=b2, eps=eps), axes)
