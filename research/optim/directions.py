"""The direction of an update, by the optimizer's name: gradients in, what the parameters are moved against out, without
rate and decay.

Whatever weight decay a published optimizer has is added once, by the chain (`build.py`), decoupled and by the kinds of
arrays.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import optax
import optax.contrib
from jaxtyping import Array

from research.errors import UserError
from research.modules.axes import Axes, Kind, role
from research.modules.state import Arrays
from research.optim.section import CONSTANTS, OPTIMIZERS, Optimizer, OptimSection, constants

MUON_RMS = 0.2  # root mean square of an update of Muon's, about that of AdamW's: one learning rate serves both
STACKS = ("layers", "directions", "experts")
"""Roles of axes along which matrices lie beside one another."""
ENDS = {"image", "input", "vocab", "domains", "classes", "actions", "slots"}
"""Roles of axes that no hidden feature lies on: where data come in, where predictions go out."""


def matrix_axes(axes: Axes, kind: Kind) -> optax.contrib.MuonDimensionNumbers | None:
    """Returns which axes of a parameter are inputs and which outputs of a matrix between hidden features, for Muon;
    None where it is none.

    Stacked layers, walks over an image and experts have matrices of their own; the window of a dense convolution
    belongs to the inputs. Matrices that touch images, classes, domains or a vocabulary, and those to one number for
    each expert, are left to Adam.
    """
    roles = [role(name) for name in axes]
    places = [i for i, r in enumerate(roles) if r not in STACKS]
    if kind is not Kind.MATRIX or len(places) < 2 or ENDS & set(roles):
        return None
    inputs = sum(roles[i].startswith("window") for i in places) + 1
    if roles[places[0]] in ("heads", "groups"):
        inputs = len(places) - 1
    return optax.contrib.MuonDimensionNumbers(tuple(places[:inputs]), tuple(places[inputs:]))


def _muon(
    axes: Mapping[str, Axes], kinds: Mapping[str, Kind], *, momentum: float, b1: float, b2: float
) -> optax.GradientTransformation:
    """Muon for matrices, Adam with Nesterov momentum for the rest (Liu et al. 2025, arXiv 2502.16982), without decay
    and learning rate."""
    return optax.contrib.muon(
        learning_rate=-1.0,  # optax flips the sign: the direction itself remains
        beta=momentum,
        adam_b1=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers={name: matrix_axes(names, kinds[name]) for name, names in axes.items()},
        consistent_rms=MUON_RMS,
    )


def _by_layer(inner: optax.GradientTransformation, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
    """Returns `inner`, which takes norms of whole arrays, applied to each of the stacked layers by itself."""

    def over_stacks(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        for axis in axes[name]:
            if role(axis) in STACKS:
                call = jax.vmap(call)
            else:
                break  # a stack lies before the axes of its layers
        return call

    def init(params: Arrays) -> dict[str, Any]:
        return {name: over_stacks(inner.init, name)(param) for name, param in params.items()}

    def update(
        updates: Arrays, state: Mapping[str, Any], params: Arrays | None = None
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        own = params or updates
        out = {name: over_stacks(inner.update, name)(u, state[name], own[name]) for name, u in updates.items()}
        return {name: new for name, (new, _) in out.items()}, {name: kept for name, (_, kept) in out.items()}

    return optax.GradientTransformation(init, update)


_PLAIN: dict[str, Callable[..., optax.GradientTransformation]] = {
    "acprop": optax.contrib.scale_by_acprop,
    "adadelta": lambda rho, eps: optax.scale_by_adadelta(rho=rho, eps=eps),
    "adam": optax.scale_by_adam,
    "adamax": optax.scale_by_adamax,
    "adamw": optax.scale_by_adam,
    "adan": optax.scale_by_adan,
    "ademamix": optax.contrib.scale_by_ademamix,
    "adopt": optax.contrib.scale_by_adopt,
    "amsgrad": optax.scale_by_amsgrad,
    "belief": optax.scale_by_belief,
    "factored_rms": optax.scale_by_factored_rms,
    "lion": optax.scale_by_lion,
    "optimistic_gradient": optax.scale_by_optimistic_gradient,
    "radam": optax.scale_by_radam,
    "rms": lambda rho, eps: optax.scale_by_rms(decay=rho, eps=eps),
    "rss": optax.scale_by_rss,
    "sgd": lambda momentum, nesterov: optax.trace(decay=momentum, nesterov=nesterov),
    "sign": optax.scale_by_sign,
    "stddev": lambda rho, eps: optax.scale_by_stddev(decay=rho, eps=eps),
    "yogi": optax.scale_by_yogi,
}
"""Directions that take each array by itself, whatever it is: name -> factory of the optimizer's constants."""

DIRECTIONS: dict[str, Callable[..., optax.GradientTransformation]] = {
    **{name: lambda axes, kinds, make=make, **own: make(**own) for name, make in _PLAIN.items()},
    "muon": _muon,
    "novograd": lambda axes, kinds, **own: _by_layer(optax.scale_by_novograd(**own), axes),
}


Make = TypeVar("Make", bound=Callable[..., optax.GradientTransformation])


def register(name: str, takes: Optimizer) -> Callable[[Make], Make]:
    """Makes an optimizer of one's own known: decorates the factory of its direction, which is called with the constants
    of `takes`.

    The direction comes without learning rate and decay, which the chain adds (`build.py`).

    Raises:
      UserError: another optimizer has this name, or a constant that no config has.
    """

    def known(make: Make) -> Make:
        if name in OPTIMIZERS:
            raise UserError(f"optimizer {name} is there already; choose another name")
        if unknown := sorted(set(takes.constants) - set(CONSTANTS)):
            raise UserError(
                f"optimizer {name} has a constant {unknown[0]!r} that no config has; valid: {', '.join(CONSTANTS)}"
            )
        OPTIMIZERS[name] = takes
        DIRECTIONS[name] = lambda axes, kinds, **own: make(**own)
        return make

    return known


def direction(
    section: OptimSection, axes: Mapping[str, Axes], kinds: Mapping[str, Kind]
) -> optax.GradientTransformation:
    """Returns the direction of the section's optimizer, with its constants.

    Raises:
      UserError: unknown name.
    """
    own = constants(section)
    return DIRECTIONS[section.name](axes, kinds, **own)
