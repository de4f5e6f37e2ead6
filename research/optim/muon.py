"""Muon: the momentum of each matrix is orthogonalised; which arrays hold matrices follows from kinds and axis names."""

from collections.abc import Mapping

import optax
import optax.contrib

from research.modules.axes import Axes, Kind, role
from research.optim.registry import register
from research.optim.stacks import STACKS

MUON_RMS = 0.2  # root mean square of an update of Muon's, about that of AdamW's: one learning rate serves both
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


@register("muon", source="Liu et al. 2025, arXiv 2502.16982", weight_decay=0.1)
def muon(
    axes: Mapping[str, Axes],
    kinds: Mapping[str, Kind],
    momentum: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.999,
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
