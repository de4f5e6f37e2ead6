"""From a setup to what its programs are made of: mesh, optimizer, schedule; what does not divide over the devices is
refused."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.errors import UserError
from research.modules.axes import role
from research.modules.mesh import BATCH_AXES
from research.modules.state import Abstract, abstract
from research.nested.space import Space
from research.optim.build import alternating, make_optimizer
from research.optim.schedules import make_schedule
from research.optim.section import OptimSection
from research.train import parallel, sharding
from research.train.hooks import Brought, alternates
from research.train.methods import extended
from research.train.programs import Programs
from research.train.setup import Setup
from research.train.stages import Stage


def _check_divisible(setup: Setup, devices: int) -> None:
    """Raises UserError where a batch would be cut whose loss looks across its examples."""
    accumulate, networks, reason = setup.config.train.accumulate, len(setup.draw(0)), setup.task.indivisible
    if reason and accumulate > 1:
        raise UserError(f"train.accumulate={accumulate} would change the loss: {reason}; valid: 1")
    if reason and setup.parallel and devices != networks:
        raise UserError(
            f"nested.execution=parallel over {devices} devices with {networks} networks would change the loss: "
            f"{reason}; "
            "valid: as many networks as devices"
        )


def check_experts(space: Space, devices: int) -> None:
    """Raises UserError when the experts of a network of the space do not divide over the devices of the mesh axis of
    experts."""
    for network, model in space.configs.items():
        shapes = abstract(model)
        for name, axes in shapes.axes.items():
            sizes = {**shapes.params, **shapes.stats}[name].shape
            for axis, size in zip(axes, sizes, strict=True):
                if role(axis) == "experts" and size % devices:
                    raise UserError(
                        f"mesh.expert={devices}: the {size} experts of network {network} do not divide over so many "
                        "devices; "
                        f"valid: divisors of {size}, or a multiple of {devices} experts"
                    )


def make_programs(
    setup: Setup, waiting: Callable[[], None] = lambda: None, brought: Mapping[str, Brought] | None = None
) -> Programs:
    """Builds optimizer, mesh and programs (nothing is compiled yet); `waiting` as of `Programs`.

    Args:
      brought: networks that methods bring; by default they are loaded.

    Raises:
      UserError: a mesh that does not fit the devices, or batches, experts or networks that do not divide over it.
    """
    config = setup.config
    mesh = sharding.make_mesh(config.mesh.sizes, across=config.mesh.across)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    part = config.data.batch_size // setup.microbatches
    for field, size in (("data.batch_size", part), ("eval.batch_size", config.eval.batch_size)):
        if size % shards:
            raise UserError(
                f"{field}: {size} examples at a time do not divide over {' x '.join(BATCH_AXES)} = {shards} devices"
            )
    check_experts(setup.space, mesh.shape["expert"])
    _check_divisible(setup, mesh.size)
    if setup.parallel:
        parallel.check(config, setup.methods, setup.draw(0), mesh)
    return _programs(setup, mesh, setup.methods.brought(setup.about) if brought is None else brought, waiting)


def make_reading_programs(setup: Setup) -> Programs:
    """Builds what a trained run is evaluated by, wherever it was trained: on as many devices as its batches divide
    over."""
    devices = jax.devices()
    if jax.process_count() == 1:
        devices = devices[: math.gcd(len(devices), setup.config.data.batch_size, setup.config.eval.batch_size)]
    return _programs(setup, sharding.make_mesh({"data": -1}, devices), {})


def _programs(
    setup: Setup, mesh: Any, brought: Mapping[str, Brought], waiting: Callable[[], None] = lambda: None
) -> Programs:
    config, model = setup.config, abstract(setup.space.full)
    full = extended(model, model, setup.methods.extras(model))
    own = {phase.name: dataclasses.replace(config.optim, **phase.optim) for phase in setup.phases}
    schedules = {name: _schedule(setup, setup.stages.of(name), optim) for name, optim in own.items()}
    of_run = {name: _over_the_run(schedule, setup.stages.of(name)) for name, schedule in schedules.items()}
    largest = max(setup.examples("validation"), setup.examples("test"))
    return Programs(
        setup.task,
        setup.space,
        setup.methods,
        setup.methods.optimizer(_optimizer(setup, own, schedules, full), full.axes),
        of_run,
        mesh,
        config,
        (config.eval.calibrate_batches, -(-largest // config.eval.batch_size)),
        brought,
        waiting=waiting,
    )


def _over_the_run(schedule: optax.Schedule, stage: Stage) -> optax.Schedule:
    """A schedule of a phase's own updates, as a function of the run's in the phase's stage."""
    return lambda step: schedule(stage.own(jnp.asarray(step)))


def _schedule(setup: Setup, stage: Stage, optim: OptimSection) -> optax.Schedule:
    """The learning rate of a phase, as a function of its own updates."""
    share = stage.rounds / setup.total
    assert optim.lr is not None  # the config is resolved
    return make_schedule(
        optim.schedule,
        peak=optim.lr,
        total=stage.rounds,
        warmup=math.floor(setup.steps(optim.warmup, "optim.warmup") * share + 1e-9),
        final=optim.final_lr,
        order=optim.order,
    )


def _optimizer(
    setup: Setup, own: Mapping[str, OptimSection], schedules: Mapping[str, optax.Schedule], full: Abstract
) -> Any:
    """One optimizer, or one for the parameters of each phase."""
    axes = {k: full.axes[k] for k in full.params}
    if not alternates(setup.phases):
        ((name, optim),) = own.items()
        return make_optimizer(optim, schedules[name], axes, full.kinds)
    names = {phase.name: [name for name in axes if phase.trains(name)] for phase in setup.phases}
    return alternating(
        {p: (make_optimizer(own[p], schedules[p], axes, full.kinds, trained), trained) for p, trained in names.items()}
    )
