"""Builds the optax chain: clip, direction (of the optimizer by its name, `registry.py`), decay, learning rate."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import optax
from jaxtyping import Array

from research.modules.axes import Axes, Kind
from research.modules.state import Arrays
from research.optim.registry import find
from research.optim.rules import by_kind, resolve
from research.optim.section import OptimSection, taken

_Updated = tuple[dict[str, Array], optax.EmptyState]


def _scale_by_tree(factors: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates: Arrays, state: optax.EmptyState, params: Arrays | None = None) -> _Updated:
        del params
        return {k: u * factors[k] for k, u in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _add_decay(weight_decay: float, factors: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates: Arrays, state: optax.EmptyState, params: Arrays | None = None) -> _Updated:
        assert params is not None  # optax leaves them out only where an optimizer reads none
        return {k: u + weight_decay * factors[k] * params[k] if factors[k] else u for k, u in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _direction(
    section: OptimSection, axes: Mapping[str, Axes], kinds: Mapping[str, Kind]
) -> optax.GradientTransformation:
    """Returns the direction of the section's optimizer, with its constants and options and what its factory asks of
    the model."""
    own, told = find(section.name), {"axes": axes, "kinds": kinds}
    direction: optax.GradientTransformation = own.make(**taken(section), **{name: told[name] for name in own.told})
    return direction


def make_optimizer(
    section: OptimSection,
    schedule: optax.Schedule,
    axes: Mapping[str, Axes],
    kinds: Mapping[str, Kind],
    names: Collection[str] | None = None,
) -> optax.GradientTransformation:
    """Returns the optimizer of the config's section `optim`.

    The chain is clip -> direction -> + weight_decay * rule * parameter -> * learning-rate rule -> * -schedule(step),
    so decay is multiplied by the learning rate, as `optax.adamw` and `optax.lion` do.

    Args:
      section: constants that it leaves open are the optimizer's own.
      schedule: learning rate as a function of the update's index.
      axes: axis names by parameter, of the whole model.
      kinds: what each parameter does; without `decay_rules`, these decide which decay.
      names: the parameters that are trained, by default all.

    Raises:
      UserError: unknown optimizer or option, a parameter that no rule covers, or a rule that no parameter meets.
    """
    decay = resolve(section.decay_rules, axes, "optim.decay_rules") if section.decay_rules else by_kind(axes, kinds)
    rates = resolve(section.lr_rules or ((".*", 1.0),), axes, "optim.lr_rules")
    parts = [optax.clip_by_global_norm(section.clip_norm)] if section.clip_norm else []
    own = {name: axes[name] for name in (axes if names is None else names)}
    parts.append(_direction(section, own, kinds))
    if section.weight_decay and any(decay[name] for name in own):
        parts.append(_add_decay(section.weight_decay, decay))
    if any(rates[name] != 1.0 for name in own):
        parts.append(_scale_by_tree(rates))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts)


def alternating(
    parts: Mapping[str, tuple[optax.GradientTransformation, Sequence[str]]],
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer of phases, each with an optimizer and parameters of its own.

    `update(grads, state, params, phase=NAME)` returns the updates of that phase's parameters alone; the state of the
    others stays as it is. Schedules count the updates of their own phase.

    Args:
      parts: phase -> (optimizer, names of its parameters).
    """

    def pick(arrays: Arrays, names: Sequence[str]) -> dict[str, Array]:
        return {name: arrays[name] for name in names}

    def init(params: Arrays) -> dict[str, Any]:
        return {phase: optimizer.init(pick(params, names)) for phase, (optimizer, names) in parts.items()}

    def update(
        grads: Arrays, state: Mapping[str, Any], params: Arrays | None = None, *, phase: str
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        assert params is not None  # of the phase, as of all
        optimizer, names = parts[phase]
        updates, own = optimizer.update(pick(grads, names), state[phase], pick(params, names))
        return updates, {**state, phase: own}

    return optax.GradientTransformationExtraArgs(init, update)


def state_bytes(opt_state: Any) -> int:
    """Returns the bytes of all arrays of an optimizer state (or of its abstract form)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(opt_state))
