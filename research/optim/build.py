"""Builds the optax chain: clip, direction (Lion, AdamW, SGD, Muon or any optax optimizer), decay, learning rate."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
import optax.contrib

from research.errors import UserError
from research.modules.axes import Axes, Kind, role
from research.optim.rules import by_kind, resolve

NAMES = ("adamw", "lion", "muon", "sgd")
STACKS = ("layers", "directions", "experts")
"""Roles of axes along which matrices lie beside one another."""
ENDS = {"image", "input", "vocab", "domains", "classes", "actions", "slots"}
"""Roles of axes that no hidden feature lies on: where data come in, where predictions go out."""


def _scale_by_tree(factors: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        del params
        return {k: u * factors[k] for k, u in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _add_decay(weight_decay: float, factors: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        return {k: u + weight_decay * factors[k] * params[k] if factors[k] else u for k, u in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


MUON_RMS = 0.2  # root mean square of an update of Muon's, about that of AdamW's: one learning rate serves both


def matrix_axes(axes: Axes, kind: Kind) -> optax.contrib.MuonDimensionNumbers | None:
    """Returns which axes of a parameter are inputs and which outputs of a matrix between hidden features, for Muon; None where it is none.

    Stacked layers, walks over an image and experts have matrices of their own; the window of a dense convolution belongs to the inputs.
    Matrices that touch images, classes, domains or a vocabulary, and those to one number for each expert, are left to Adam.
    """
    roles = [role(name) for name in axes]
    places = [i for i, r in enumerate(roles) if r not in STACKS]
    if kind is not Kind.MATRIX or len(places) < 2 or ENDS & set(roles):
        return None
    inputs = sum(roles[i].startswith("window") for i in places) + 1
    if roles[places[0]] in ("heads", "groups"):
        inputs = len(places) - 1
    return optax.contrib.MuonDimensionNumbers(tuple(places[:inputs]), tuple(places[inputs:]))


def _muon(config: Mapping[str, Any], axes: Mapping[str, Axes], kinds: Mapping[str, Kind]) -> optax.GradientTransformation:
    """Muon for matrices, Adam with Nesterov momentum for the rest (Liu et al. 2025, arXiv 2502.16982), without decay and learning rate."""
    return optax.contrib.muon(
        learning_rate=-1.0,  # optax flips the sign: the direction itself remains
        beta=config["momentum"],
        adam_b1=config["b1"],
        adam_b2=config["b2"],
        muon_weight_dimension_numbers={name: matrix_axes(names, kinds[name]) for name, names in axes.items()},
        consistent_rms=MUON_RMS,
    )


def _direction(name: str, config: Mapping[str, Any], axes: Mapping[str, Axes], kinds: Mapping[str, Kind]) -> optax.GradientTransformation:
    if name == "muon":
        return _muon(config, axes, kinds)
    if name == "lion":
        return optax.scale_by_lion(b1=config["b1"], b2=config["b2"])
    if name == "adamw":
        return optax.scale_by_adam(b1=config["b1"], b2=config["b2"], eps=config["eps"])
    if name == "sgd":
        return optax.trace(decay=config["momentum"], nesterov=config["nesterov"])
    scale = getattr(optax, f"scale_by_{name}", None)
    if scale is None:
        valid = sorted({*NAMES, *(n[len("scale_by_") :] for n in dir(optax) if n.startswith("scale_by_"))})
        raise UserError(f"unknown optim.name {name!r}; valid: {', '.join(valid)}")
    accepted = inspect.signature(scale).parameters
    return scale(**{k: v for k, v in config.items() if k in accepted})


def make_optimizer(
    config: Mapping[str, Any], schedule: optax.Schedule, axes: Mapping[str, Axes], kinds: Mapping[str, Kind]
) -> optax.GradientTransformation:
    """Returns the optimizer of a config.

    The chain is clip -> direction -> + weight_decay * rule * parameter -> * learning-rate rule -> * -schedule(step),
    so decay is multiplied by the learning rate, as `optax.adamw` and `optax.lion` do.

    Args:
      config: `name` ("lion", "adamw", "sgd", "muon" or X of any `optax.scale_by_X`), `b1`, `b2`, `eps`, `momentum`, `nesterov`,
        `weight_decay`, `clip_norm` (0 = off), `decay_rules`, `lr_rules` (see `research.optim.rules`).
      schedule: learning rate as a function of the update's index.
      axes: axis names by parameter.
      kinds: what each parameter does; without `decay_rules`, these decide which decay.

    Raises:
      UserError: unknown name, or a parameter that no rule covers.
    """
    decay = resolve(config["decay_rules"], axes, "optim.decay_rules") if config["decay_rules"] else by_kind(axes, kinds)
    rates = resolve(config["lr_rules"] or ((".*", 1.0),), axes, "optim.lr_rules")
    parts = [optax.clip_by_global_norm(config["clip_norm"])] if config["clip_norm"] else []
    parts.append(_direction(config["name"], config, axes, kinds))
    if config["weight_decay"] and any(decay.values()):
        parts.append(_add_decay(config["weight_decay"], decay))
    if any(rate != 1.0 for rate in rates.values()):
        parts.append(_scale_by_tree(rates))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts)


def alternating(parts: Mapping[str, tuple[optax.GradientTransformation, Sequence[str]]]) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer of phases, each with an optimizer and parameters of its own.

    `update(grads, state, params, phase=NAME)` returns the updates of that phase's parameters alone; the state of the others stays as it
    is. Schedules count the updates of their own phase.

    Args:
      parts: phase -> (optimizer, names of its parameters).
    """

    def pick(arrays, names):
        return {name: arrays[name] for name in names}

    def init(params):
        return {phase: optimizer.init(pick(params, names)) for phase, (optimizer, names) in parts.items()}

    def update(grads, state, params=None, *, phase):
        optimizer, names = parts[phase]
        updates, own = optimizer.update(pick(grads, names), state[phase], pick(params, names))
        return updates, {**state, phase: own}

    return optax.GradientTransformationExtraArgs(init, update)


def state_bytes(opt_state: Any) -> int:
    """Returns the bytes of all arrays of an optimizer state (or of its abstract form)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(opt_state))
