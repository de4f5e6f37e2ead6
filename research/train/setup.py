"""From a config to the things that a run is made of: model, space, data, task, schedule, programs."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from research.data import pipeline
from research.errors import UserError
from research.models import registry
from research.modules.axes import role
from research.modules.mesh import BATCH_AXES
from research.modules.state import Abstract, abstract
from research.nested.draws import Draw
from research.nested.space import Space, as_choices, make_space, shrink
from research.optim.build import alternating, make_optimizer
from research.optim.schedules import make_schedule
from research.tasks.base import Task
from research.tasks.classification import Classification
from research.tasks.contrastive import Contrastive
from research.tasks.density import DensityCounting
from research.tasks.in_context import InContextLearning
from research.tasks.language import LanguageModelling
from research.train import parallel, sharding, streams
from research.train.data import Data, Facts
from research.train.durations import to_steps
from research.train.examples import Checked, check_labelled, limits_of
from research.train.method import About, Brought, Phase
from research.train.methods import Methods, extended, make_methods
from research.train.programs import Programs


def model_fields(source: Any, sample: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the sizes of a model that the data decide: of images, of a vocabulary and its windows, of domains, or of
    vectors."""
    if "image" in sample:
        _, height, width, channels = sample["image"].shape
        if height != width:
            raise UserError(f"images of {height}x{width} are not square; set data.augment.pad_to")
        sizes = {"image_size": height, "in_channels": channels}
        return sizes if "density" in sample else {**sizes, "num_classes": int(source.num_classes)}
    if "pairs" in sample:
        return {
            "vocab_size": int(source.vocab_size),
            "length": sample["pairs"].shape[2],
            "domains": len(source.domains),
        }
    if "tokens" in sample:
        return {"vocab_size": int(source.vocab_size), "length": sample["tokens"].shape[1]}
    sizes = {"vocab_size": 0, "input_dim": sample["vectors"].shape[2], "length": sample["vectors"].shape[1]}
    return (
        {**sizes, "outputs": int(source.num_classes), "pool": "mean"} if "label" in sample else {**sizes, "outputs": 1}
    )


def make_model(config: dict[str, Any], source: Any, sample: Mapping[str, np.ndarray]) -> Any:
    """Returns the model's config, its input and output sizes taken from the data unless given.

    Raises:
      UserError: a model that does not take such data, or sizes that do not fit them.
    """
    fields = dict(config["model"])
    name, subnet = fields.pop("name"), fields.pop("subnet", "")
    given = model_fields(source, sample)
    kind = next(k for k in ("image", "tokens", "pairs", "vectors") if k in sample)
    counts = registry.entry(name).config.predicts == "density"
    if counts != ("density" in sample):
        wanted = "density maps" if "density" in sample else "labels, tokens or vectors"
        fits = "hmode" if "density" in sample else "another, or data set counting"
        raise UserError(
            f"model {name} does not predict {wanted}, which data set {config['data']['name']} asks for; choose {fits}"
        )
    known = {f.name for f in dataclasses.fields(registry.entry(name).config)}
    if not known.issuperset(given):
        raise UserError(
            f"model {name} does not take {kind}, which data set {config['data']['name']} gives; choose another of the two"
        )
    for field, value in given.items():
        fields.setdefault(field, value)
    if config["train"]["remat"] != "none":
        fields.setdefault("remat", config["train"]["remat"])
    model = registry.model_config(name, **fields)
    registry.check_buildable(model, name, config["model"])
    shape = sample[kind].shape[2 if kind == "pairs" else 1 :]
    if shape != model.input_shape():
        wrong = [f for f in given if f in config["model"]]
        raise UserError(
            f"model {name} takes {kind} of {model.input_shape()}, the data gives {shape}; remove model.{', model.'.join(wrong)}"
        )
    return shrink(model, as_choices(subnet)) if subnet else model


def make_task(config: dict[str, Any], model: Any, source: Any, sample: Mapping[str, np.ndarray]) -> Task:
    """Returns the task that belongs to the data's kind of examples."""
    fields = dict(config["task"])
    metric, contrastive, local = fields.pop("metric"), fields.pop("contrastive"), fields.pop("local_counting")
    if "pairs" in sample:
        _check_pairs(model, source)
        return Contrastive(contrastive["loss"], contrastive["temperature"], contrastive["normalize"])
    if "density" in sample:
        return DensityCounting(source.mean_count, local)
    if "label" in sample:
        examples = "image" if "image" in sample else "vectors"
        return Classification(num_classes=_classes(model, source, sample), examples=examples, **fields)
    if "tokens" in sample:
        if model.vocab_size < source.vocab_size:
            raise UserError(
                f"model.vocab_size={model.vocab_size} is less than the {source.vocab_size} tokens of the data"
            )
        task = LanguageModelling(tuple(source.token_bytes or ()), metric or "loss")
        if task.metric not in task.metrics:
            raise UserError(f"task.metric={metric!r}; valid with {source.name}: {', '.join(task.metrics)}")
        return task
    return InContextLearning(source.points, source.binary, source.variance, source.scored_from)


def _classes(model: Any, source: Any, sample: Mapping[str, np.ndarray]) -> int:
    """The classes of a model, which may be more than those of the data."""
    field, classes = ("num_classes", model.num_classes) if "image" in sample else ("outputs", model.outputs)
    if classes < source.num_classes:
        raise UserError(
            f"model.{field}={classes} is less than the {source.num_classes} classes of {source.name}; leave it out"
        )
    return classes


def _check_pairs(model: Any, source: Any) -> None:
    if model.vocab_size < source.vocab_size:
        raise UserError(f"model.vocab_size={model.vocab_size} is less than the {source.vocab_size} tokens of the data")
    if model.domains < len(source.domains):
        raise UserError(
            f"{source.name} has texts of domain {model.domains} ({source.domains[model.domains]}) that no expert has; "
            f"valid with model.domains={model.domains}: 0..{model.domains - 1}"
        )


@dataclass
class Setup:
    """What a run is made of; built by `make_setup`, without touching a device."""

    config: dict[str, Any]
    data: Data
    task: Task
    space: Space
    methods: Methods
    total: int

    @property
    def splits(self) -> dict[str, Any]:
        """The sources of the splits; they are loaded where they are not yet."""
        return self.data.splits

    def examples(self, split: str) -> int:
        """Returns how many examples a split has."""
        return self.data.facts.examples.get(split, 0)

    @functools.cached_property
    def transform(self) -> pipeline.Transform:
        """What makes batches of blocks; a batch that the model has no place for is an error."""
        return Checked(self.data.transform, limits_of(self.data.name, self.space.full, self.sample))

    @property
    def sample(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """The shapes of a prepared batch of one example."""
        return self.data.facts.shapes

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of a round of updates."""
        return self.methods.phases(self.space.full)

    def phase(self, step: int) -> Phase:
        """Returns the phase of an update."""
        return self.phases[step % len(self.phases)]

    @property
    def parallel(self) -> bool:
        """Whether the networks of an update are trained at the same time, on different devices."""
        return self.config["nested"]["execution"] == "parallel"

    @property
    def mean(self) -> bool:
        """Whether the losses of an update's networks are averaged, else summed."""
        return self.config["nested"]["reduce"] == "mean"

    @property
    def units(self) -> int:
        """How many of the task's units an example holds."""
        return (
            1
            if self.task.unit != "tokens"
            else self.sample["tokens" if "tokens" in self.sample else "vectors"].shape[1]
        )

    def batch_shapes(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch of `size` examples."""
        return {k: jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype) for k, v in self.sample.items()}

    @functools.cached_property
    def order(self) -> list[str]:
        """Names of the sub-networks, largest number of parameters first ("full" leads)."""
        size = lambda n: abstract(self.space.configs[n]).num_params()  # noqa: E731
        rest = sorted((n for n in self.space.names() if n != "full"), key=size, reverse=True)
        return ["full", *rest]

    def steps(self, section: str, field: str) -> int:
        """Returns a duration of the config in updates."""
        return to_steps(
            self.config[section][field],
            batch_size=self.config["data"]["batch_size"],
            num_examples=self.examples("train"),
            total=self.total,
            field=f"{section}.{field}",
            phases=len(self.phases),
        )

    def draw(self, step: int) -> tuple[Draw, ...]:
        """Returns the sub-networks of an update."""
        return self.methods.draws(self.order, self.config["seed"], step // len(self.phases))

    @functools.cached_property
    def parts(self) -> int:
        """Parts of a batch that are trained on one after the other: of sub-networks with parts of their own, and
        accumulated ones."""
        return 1 if self.parallel else max(d.parts for d in self.draw(0)) * self.config["train"]["accumulate"]

    def reshaped(self, model: Any) -> "Setup":
        """Returns the setup with another full network, of the same kind.

        Raises:
          UserError: a named sub-network that is no part of it.
        """
        return dataclasses.replace(self, space=make_space(model, self.config["nested"]["points"]))

    def batches(self, start: int, share: tuple[int, int] = (0, 1)) -> Any:
        """Returns the iterator of training batches (stream -> batch) from update `start` on; the phases of a round
        share theirs.

        Args:
          start: the first update.
          share: (index, count): the index-th of count shares of each batch.
        """
        count = len(self.phases)
        return streams.rounds(
            self.splits["train"],
            self.methods.streams(),
            count,
            start,
            batch_size=self.config["data"]["batch_size"],
            seed=self.config["seed"],
            augment=self.transform,
            num_steps=-(-self.total // count),
            shard_index=share[0],
            shard_count=share[1],
            parts=self.parts,
        )


def make_setup(
    config: dict[str, Any], known: Facts | None = None, say: Callable[[str], None] = lambda _: None
) -> Setup:
    """Loads the data, unless what is `known` of them suffices, and builds model config and space.

    Args:
      config: of a run.
      known, say: as of `Data`.

    Raises:
      UserError: whatever in the config does not fit together.
    """
    options = config["data"]["options"]
    if own := {"name", "data_dir", "validation_fraction"} & set(options):
        raise UserError(f"data.options.{min(own)} is no option; set data.{min(own).removeprefix('data_')}")
    data = Data(config, known, say)
    source, sample = data.facts.source, data.facts.shapes
    model = make_model(config, source, sample)
    space = make_space(model, config["nested"]["points"])
    task, methods = make_task(config, model, source, sample), make_methods(config)
    methods.check(About(config, task, space, sample, methods.items))
    task = methods.wrapped(task, model)
    if known is None:
        check_labelled(data.splits)
    duration, count = config["train"]["duration"], len(methods.phases(model))
    size, examples = config["data"]["batch_size"], data.facts.examples["train"]
    total = to_steps(duration, batch_size=size, num_examples=examples, total=None, field="train.duration", phases=count)
    if total < 1:
        raise UserError(f"train.duration={duration!r} is no update at all")
    total = -(-total // count) * count  # whole rounds
    setup = Setup(config, data, task, space, methods, total)
    _check_batch(config, setup)
    return setup


def _check_batch(config: dict[str, Any], setup: Setup) -> None:
    size = config["data"]["batch_size"]
    if size % setup.parts:
        raise UserError(
            f"data.batch_size={size} does not divide into {setup.parts} parts (of an update's networks x "
            "train.accumulate)"
        )


def _check_divisible(setup: Setup, devices: int) -> None:
    """Raises UserError where a batch would be cut whose loss looks across its examples."""
    accumulate, networks, reason = setup.config["train"]["accumulate"], len(setup.draw(0)), setup.task.indivisible
    if reason and accumulate > 1:
        raise UserError(f"train.accumulate={accumulate} would change the loss: {reason}; valid: 1")
    if reason and setup.parallel and devices != networks:
        raise UserError(
            f"nested.execution=parallel over {devices} devices with {networks} networks would change the loss: {reason}; "
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
                        f"mesh.expert={devices}: the {size} experts of network {network} do not divide over so many devices; "
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
