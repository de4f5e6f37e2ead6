"""A network that changes its shape in mid-run: every array of the state follows by the names of its axes.

Methods return plans (`research.train.method.Reshape`); here they are carried out on all trees alike: parameters,
statistics, moments of the optimizer, arrays of methods. What stays keeps its bits.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from research import seeds
from research.errors import UserError
from research.modules.axes import Axes
from research.modules.state import Arrays
from research.train import processes
from research.train.hooks import Reindex, Reshape
from research.train.methods import Methods, axis_sizes
from research.train.programs import Programs
from research.train.state import State


def plan(methods: Methods, step: int, config: Any, state: State) -> Reshape | None:
    """Returns the plan of the method whose turn it is, None where none has one; equal in all processes.

    Raises:
      UserError: several methods have one.
    """
    due = [method for method in methods.items if method.reshape_due(step)]
    if not due:
        return None
    params = _on_host(state.params)
    found = {m.name: m.reshape(step, config, params, _on_host(state.methods.get(m.name, {}))) for m in due}
    plans = {name: plan for name, plan in found.items() if plan is not None and (plan.config != config or plan.axes)}
    if len(plans) > 1:
        raise UserError(f"methods {' and '.join(plans)} both reshape the network at step {step}; let them take turns")
    processes.same(repr(sorted(plans.items())), f"the plan for another shape at step {step}")
    return next(iter(plans.values()), None)


def _on_host(arrays: Arrays) -> dict[str, np.ndarray]:
    return {k: np.asarray(processes.gathered(v)) for k, v in arrays.items()}


def apply(plan: Reshape, step: int, state: State, before: Programs, after: Programs) -> State:
    """Returns a state in its new shape, each array where it belongs.

    Args:
      plan: to carry out.
      step: at which; keys what is drawn afresh.
      state: in the old shape.
      before, after: programs of the old and of the new network.
    """
    fresh = after.drawn(jax.random.fold_in(seeds.key(after.seed), step))
    move = Moves(plan, axis_sizes(before.full), axis_sizes(after.full))
    axes = {**before.full.axes}
    params = {k: move(state.params.get(k), axes.get(k, ()), v, k) for k, v in fresh.params.items()}
    stats = {k: move(state.stats.get(k), axes.get(k, ()), v, k) for k, v in fresh.stats.items()}
    methods = {
        method: {
            k: move((state.methods.get(method) or {}).get(k), before.layout.axes_of(method, k), v, k)
            for k, v in own.items()
        }
        for method, own in fresh.methods.items()
    }
    opt_state = _moments(state.opt_state, fresh.opt_state, state.params, fresh.params, axes, move)
    placed: State = jax.device_put(State(params, stats, opt_state, methods), after.shardings)
    return placed


class Moves:
    """Takes arrays from one shape to another by the names of their axes.

    Args:
      plan: to carry out.
      old, new: size of every axis before and after.
    """

    def __init__(self, plan: Reshape, old: Mapping[str, int], new: Mapping[str, int]):
        self._rules: dict[str, Reindex] = {}
        if unknown := sorted(set(plan.axes) - set(new)):
            raise UserError(f"reshape: the new network has no axis {unknown[0]!r}; valid: {', '.join(sorted(new))}")
        for axis, size in new.items():
            known = plan.axes.get(axis)
            if known is None and old.get(axis, size) != size:
                known = Reindex(tuple(i if i < old[axis] else -1 for i in range(size)))
            if known is not None:
                self._rules[axis] = self._checked(axis, known, old.get(axis, 0), size)

    def _checked(self, axis: str, rule: Reindex, old: int, new: int) -> Reindex:
        if rule.fill not in ("zero", "fresh"):
            raise UserError(f"reshape of axis {axis}: fill={rule.fill!r}; valid: zero, fresh")
        if len(rule.index) != new or not all(-1 <= i < old for i in rule.index):
            raise UserError(
                f"reshape of axis {axis}: {len(rule.index)} places from {old}; the new network has {new}, each from "
                f"0..{old - 1}, or -1 for what is new"
            )
        return rule

    def the_one(self, several: Sequence[Axes], name: str) -> Axes:
        """Returns one of the axes that an array of the optimizer may have.

        Raises:
          UserError: it matters which, since some of them change.
        """
        first, *others = several
        if any([self._rules.get(a) for a in first] != [self._rules.get(a) for a in other] for other in others):
            among = " or ".join(", ".join(axes) for axes in several)
            raise UserError(
                f"reshape: the optimizer keeps means over axes of {name}, and its sizes do not tell which ({among}); "
                "choose an optimizer whose moments are not factored"
            )
        return first

    def __call__(self, array: Array | None, axes: Axes | Sequence[str], fresh: Array, name: str) -> np.ndarray:
        """Returns an array in its new shape; `fresh` is the new network's initial one."""
        target = np.asarray(processes.gathered(fresh))
        if array is None:
            return target
        host = np.asarray(processes.gathered(array))
        new = {"zero": np.zeros((1,) * target.ndim, bool), "fresh": np.zeros((1,) * target.ndim, bool)}
        for place, axis in enumerate(axes):
            if (rule := self._rules.get(axis)) is not None:
                index = np.array(rule.index)
                host = np.take(host, np.maximum(index, 0), place)
                here = np.expand_dims(index < 0, tuple(i for i in range(host.ndim) if i != place))
                new[rule.fill] = new[rule.fill] | here
        if host.shape != target.shape:
            raise UserError(f"reshape: {name} would be {host.shape}, the new network has {target.shape}")
        return np.where(new["zero"], 0, np.where(new["fresh"], target, host)).astype(target.dtype)


def _fitting(was: Array, now: Array, param: Array, new_param: Array, axes: Axes) -> list[Axes]:
    """Returns the axes of a parameter that an array of the optimizer may have, by its sizes before and after; several
    where sizes are equal."""
    found = []
    for places in itertools.combinations(range(param.ndim), was.ndim):
        before, after = tuple(param.shape[i] for i in places), tuple(new_param.shape[i] for i in places)
        if (was.shape, now.shape) == (before, after):
            found.append(tuple(axes[i] for i in places))
    return found


def _moments(old: Any, fresh: Any, params: Arrays, new_params: Arrays, axes: Mapping[str, Axes], move: Moves) -> Any:
    """Returns the optimizer's state.

    What lies under a parameter's name and has its shape, or a number for each index of some of its axes (factored
    moments), moves with it; new entries of it are zero. What has another shape stays where it can, else it is as in a
    new state.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(fresh)
    before = dict(jax.tree_util.tree_flatten_with_path(old)[0])
    out = []
    for path, leaf in flat:
        was = before.get(path)
        name = next((entry.key for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey)), None)
        if was is None:
            out.append(leaf)
        elif name in params and (found := _fitting(was, leaf, params[name], new_params[name], axes[name])):
            out.append(move(was, move.the_one(found, name), jnp.zeros_like(leaf), name))
        else:
            out.append(was if was.shape == leaf.shape else leaf)
    return jax.tree_util.tree_unflatten(tree, out)
