"""The directions of optax that take each array by itself: gradients in, what the parameters are moved against out,
without rate and decay.

Whatever weight decay a published optimizer has is added once, by the chain (`build.py`), decoupled and by the kinds of
arrays.
"""

from typing import Annotated

import optax
import optax.contrib
from optax import GradientTransformation

from research.optim.registry import register
from research.values import WEIGHT


@register("acprop", source="Zhuang et al. 2021, arXiv 2110.05454")
def acprop(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-16) -> GradientTransformation:
    """AdaBelief whose denominator is that of the step before."""
    return optax.contrib.scale_by_acprop(b1=b1, b2=b2, eps=eps)


@register("adadelta", source="Zeiler 2012, arXiv 1212.5701", lr=1.0)
def adadelta(rho: float = 0.9, eps: float = 1e-6) -> GradientTransformation:
    """Gradients over their root mean square, times that of the updates."""
    return optax.scale_by_adadelta(rho=rho, eps=eps)


@register("adam", source="Kingma and Ba 2015, arXiv 1412.6980")
def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, nesterov: bool = False) -> GradientTransformation:
    """The average of gradients over the root of that of their squares."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, nesterov=nesterov)


@register("adamax", source="Kingma and Ba 2015, arXiv 1412.6980, section 7", lr=2e-3)
def adamax(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> GradientTransformation:
    """Adam with a decaying maximum in place of the second moment."""
    return optax.scale_by_adamax(b1=b1, b2=b2, eps=eps)


@register("adamw", source="Loshchilov and Hutter 2019, arXiv 1711.05101", weight_decay=0.05)
def adamw(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> GradientTransformation:
    """The direction of Adam; its decay is the chain's."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


@register("adan", source="Xie et al. 2022, arXiv 2208.06677", weight_decay=0.02)
def adan(b1: float = 0.98, b2: float = 0.92, eps: float = 1e-8, b3: float = 0.99) -> GradientTransformation:
    """Adam with an average of the gradients' differences."""
    return optax.scale_by_adan(b1=b1, b2=b2, eps=eps, b3=b3)


@register("ademamix", source="Pagliardini et al. 2024, arXiv 2409.03137", weight_decay=0.1)
def ademamix(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, b3: float = 0.9999, alpha: Annotated[float, WEIGHT] = 6.0
) -> GradientTransformation:
    """Adam whose average of gradients has `alpha` times a slow one added."""
    return optax.contrib.scale_by_ademamix(b1=b1, b2=b2, eps=eps, b3=b3, alpha=alpha)


@register("adopt", source="Taniguchi et al. 2024, arXiv 2411.02853")
def adopt(b1: float = 0.9, b2: float = 0.9999, eps: float = 1e-6, nesterov: bool = False) -> GradientTransformation:
    """Adam whose second moment leaves out the present gradient."""
    return optax.contrib.scale_by_adopt(b1=b1, b2=b2, eps=eps, nesterov=nesterov)


@register("amsgrad", source="Reddi et al. 2018, arXiv 1904.09237")
def amsgrad(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> GradientTransformation:
    """Adam whose second moment never falls."""
    return optax.scale_by_amsgrad(b1=b1, b2=b2, eps=eps)


@register("belief", source="Zhuang et al. 2020, arXiv 2010.07468")
def belief(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-16, nesterov: bool = False) -> GradientTransformation:
    """AdaBelief: the second moment is of the gradients' distances from their average."""
    return optax.scale_by_belief(b1=b1, b2=b2, eps=eps, nesterov=nesterov)


@register("factored_rms", source="Shazeer and Stern 2018, arXiv 1804.04235", lr=None)
def factored_rms() -> GradientTransformation:
    """The second moment of Adafactor: means over rows and over columns."""
    return optax.scale_by_factored_rms()


# A tenth of AdamW's rate and ten times its decay, within the 3 to 10 of the paper's section 5: their product stays.
@register("lion", source="Chen et al. 2023, arXiv 2302.06675", lr=1e-4, weight_decay=0.5)
def lion(b1: float = 0.9, b2: float = 0.99) -> GradientTransformation:
    """The sign of the momentum mixed with the gradient."""
    return optax.scale_by_lion(b1=b1, b2=b2)


@register("optimistic_gradient", source="Mokhtari et al. 2020, arXiv 1901.08511", lr=None)
def optimistic_gradient() -> GradientTransformation:
    """Twice the gradient less the one before."""
    return optax.scale_by_optimistic_gradient()


@register("radam", source="Liu et al. 2020, arXiv 1908.03265")
def radam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, nesterov: bool = False) -> GradientTransformation:
    """Adam with its early steps corrected for the variance of their second moment."""
    return optax.scale_by_radam(b1=b1, b2=b2, eps=eps, nesterov=nesterov)


@register("rms", source="Tieleman and Hinton 2012, RMSProp")
def rms(rho: float = 0.9, eps: float = 1e-8) -> GradientTransformation:
    """RMSProp: gradients over their root mean square."""
    return optax.scale_by_rms(decay=rho, eps=eps)


@register("rss", source="Duchi et al. 2011, AdaGrad", lr=1e-2)
def rss(eps: float = 1e-7) -> GradientTransformation:
    """AdaGrad: gradients over the root of the sum of their squares."""
    return optax.scale_by_rss(eps=eps)


@register("sgd", source="He et al. 2016, arXiv 1512.03385, section 3.4", lr=0.1, weight_decay=1e-4)
def sgd(momentum: float = 0.9, nesterov: bool = True) -> GradientTransformation:
    """A decaying sum of gradients."""
    return optax.trace(decay=momentum, nesterov=nesterov)


@register("sign", source="Bernstein et al. 2018, arXiv 1802.04434", lr=1e-4)
def sign() -> GradientTransformation:
    """The sign of the gradient."""
    return optax.scale_by_sign()


@register("stddev", source="Graves 2013, arXiv 1308.0850, section 4.2", lr=1e-4)
def stddev(rho: float = 0.9, eps: float = 1e-8) -> GradientTransformation:
    """Gradients over their standard deviation: centred RMSProp."""
    return optax.scale_by_stddev(decay=rho, eps=eps)


@register("yogi", source="Zaheer et al. 2018, NeurIPS", lr=1e-2)
def yogi(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-3) -> GradientTransformation:
    """Adam whose second moment changes by steps that do not depend on its size."""
    return optax.scale_by_yogi(b1=b1, b2=b2, eps=eps)
