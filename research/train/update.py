"""The update program: gradients in, parameters, statistics, optimizer state and methods' arrays out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from research.modules.axes import Axes, StatKind, role
from research.modules.state import Arrays, abstract, after_update
from research.train.gradient import make_clock
from research.train.hooks import Made, alternates
from research.train.programs import Programs
from research.train.state import State, Updated, due


@dataclass(frozen=True)
class Update:
    """Moves the state: (state without statistics, grads, step, statistics before, moved ones) -> `Updated`.

    Under train.nan=skip an update whose gradient or statistics are not finite changes nothing at all.

    Attributes:
      phase: of the update.
    """

    phase: str = "all"

    @property
    def title(self) -> str:
        return "update"

    def rarely(self, programs: Programs) -> bool:
        del programs
        return False

    def lower(self, programs: Programs) -> jax.stages.Lowered:
        layout, shapes = programs.layout, programs.shapes
        bare, whole = State(layout.params, {}, programs.shardings.opt_state, layout.extras), layout.replicated
        program = jax.jit(
            self.program(programs),
            in_shardings=(bare, layout.params, whole, layout.stats, layout.stats),
            out_shardings=Updated(programs.shardings, layout.params, whole),
            donate_argnums=(0, 1),
        )
        state, step, before, moved = due(shapes, jax.ShapeDtypeStruct((), np.int32), shapes.stats)
        with jax.set_mesh(layout.mesh):
            return program.lower(state, dict(programs.full.params), step, before, moved)

    def program(self, programs: Programs) -> Any:
        train, config = programs.config.train, programs.space.full
        more, shapes = {"phase": self.phase} if alternates(programs.phases.values()) else {}, abstract(config)
        schedule = programs.schedules[self.phase]
        lasting = shapes.stats_of(StatKind.MOMENT, StatKind.SUM, StatKind.STATE)

        def program(state: State, grads: Arrays, step: Array, before: Arrays, moved: Arrays) -> Updated:
            updates, opt_state = programs.optimizer.update(grads, state.opt_state, state.params, **more)
            params = {**state.params, **optax.apply_updates({k: state.params[k] for k in updates}, updates)}
            clock = make_clock(programs.seed, jnp.stack([step, *[0 * step] * 3]).astype(jnp.uint32), self.phase)
            made = Made(state.params, grads, moved)
            params, methods = programs.methods.after_update(params, state.methods, made, clock)
            norm = optax.tree.norm(grads)
            stats = after_update(config, programs.layout.model_only(state.params), moved)
            new = State(params, stats, opt_state, methods)
            finite = jnp.isfinite(norm)
            if train.nan == "skip":
                for name in lasting:
                    finite &= jnp.isfinite(moved[name]).all()
                old = State(state.params, before, state.opt_state, state.methods)
                new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
            measured = {"grad_norm": norm, "lr": schedule(step), "finite": finite}
            if train.norms:
                measured["norms"] = {f"grad/{k}": v for k, v in _norms(grads, programs.full.axes).items()}
                measured["norms"] |= {f"param/{k}": v for k, v in _norms(new.params, programs.full.axes).items()}
            return Updated(new, jax.tree.map(jnp.zeros_like, grads), measured)

        return program


def _norms(arrays: Arrays, axes: Mapping[str, Axes]) -> dict[str, Array]:
    """Returns the norm of all arrays whose axes have the same roles, by these, e.g. "embed*mlp"."""
    groups: dict[str, list[Array]] = {}
    for name, array in arrays.items():
        groups.setdefault("*".join(role(axis) for axis in axes[name]) or "scalar", []).append(array)
    return {roles: optax.tree.norm(group) for roles, group in groups.items()}
