"""From a setup to what its programs are made of: mesh, optimizer, schedule; what does not divide over the devices is
refused."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from research.errors import UserError
from research.modules.axes import role
from research.modules.mesh import BATCH_AXES
from research.modules.state import Abstract, abstract
from research.nested.space import Space
from research.optim.build import alternating, make_optimizer
from research.optim.schedules import make_schedule
from research.train import parallel, sharding
from research.train.hooks import Brought
from research.train.methods import extended
from research.train.programs import Programs
from research.train.setup import Setup


def _check_divisible(setup: Setup, devices: int) -> None:
    """Raises UserError where a batch would be cut whose loss looks across its examples."""
    accumulate, networks, reason = setup.config["train"]["accumulate"], len(setup.draw(0)), setup.task.indivisible
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


def make_programs(setup: Setup, waiting: Callable[[], None] = lambda: None) -> Programs:
    """Builds optimizer, mesh and programs (nothing is compiled yet); `waiting` as of `Programs`.

    Raises:
      UserError: a mesh that does not fit the devices, or batches, experts or networks that do not divide over it.
    """
    config = setup.config
    mesh_config = dict(config["mesh"])
    mesh_config.pop("min_size")
    across = mesh_config.pop("across")
    mesh = sharding.make_mesh(mesh_config, across=across)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    part = config["data"]["batch_size"] // setup.parts
    for field, size in (("data.batch_size", part), ("eval.batch_size", config["eval"]["batch_size"])):
        if size % shards:
            raise UserError(
                f"{field}: {size} examples at a time do not divide over {' x '.join(BATCH_AXES)} = {shards} devices"
            )
    check_experts(setup.space, mesh.shape["expert"])
    _check_divisible(setup, mesh.size)
    if setup.parallel:
        parallel.check(config, setup.methods, setup.draw(0), mesh)
    return _programs(setup, mesh, setup.methods.brought(), waiting)


def make_reading_programs(setup: Setup) -> Programs:
    """Builds what a trained run is evaluated by, wherever it was trained: on as many devices as its batches divide
    over."""
    devices = jax.devices()
    if jax.process_count() == 1:
        devices = devices[
            : math.gcd(len(devices), setup.config["data"]["batch_size"], setup.config["eval"]["batch_size"])
        ]
    return _programs(setup, sharding.make_mesh({"data": -1}, devices), {})


def _programs(
    setup: Setup, mesh: Any, brought: Mapping[str, Brought], waiting: Callable[[], None] = lambda: None
) -> Programs:
    config = setup.config
    optim = config["optim"]
    rounds = len(setup.phases)
    schedule = functools.partial(
        make_schedule,
        optim["schedule"],
        total=setup.total // rounds,
        warmup=setup.steps("optim", "warmup") // rounds,
        final=optim["final_lr"],
        order=optim["order"],
    )
    model = abstract(setup.space.full)
    full = extended(model, model, setup.methods.extras(model))
    optimizer = setup.methods.optimizer(_optimizer(setup, schedule, full), full.axes)
    largest = max(setup.examples("validation"), setup.examples("test"))
    calls = config["eval"]["calibrate_batches"], -(-largest // config["eval"]["batch_size"])
    return Programs(
        setup.task,
        setup.space,
        setup.methods,
        optimizer,
        schedule(peak=optim["lr"]),
        mesh,
        config,
        calls,
        brought,
        waiting=waiting,
    )


def _optimizer(setup: Setup, schedule: Callable[..., Any], full: Abstract) -> Any:
    """One optimizer, or one for the parameters of each phase."""
    axes, own = {k: full.axes[k] for k in full.params}, {}
    for phase in setup.phases:
        optim = {**setup.config["optim"], **phase.optim}
        names = [name for name in axes if phase.trains(name)]
        peak = schedule(peak=optim["lr"])
        if len(setup.phases) == 1:
            return make_optimizer(optim, peak, axes, full.kinds)
        own[phase.name] = (make_optimizer(optim, peak, axes, full.kinds, names), names)
    return alternating(own)
