"""From a config to the things that a run is made of: model, space, data, task, schedule, programs."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from research.data import pipeline
from research.data.augment import Augment, make_augment
from research.data.sources import load_splits
from research.errors import UserError
from research.models import registry
from research.modules.state import abstract
from research.nested import schemes
from research.nested.space import Space, make_space, parse_choices, shrink
from research.optim.build import make_optimizer
from research.optim.schedules import make_schedule
from research.tasks.classification import Classification
from research.train import sharding
from research.train.durations import to_steps
from research.train.programs import Programs


def make_model(config: dict[str, Any], source: Any, augment: Augment) -> Any:
    """Returns the model's config, its input and output sizes taken from the data unless given."""
    fields = dict(config["model"])
    name, subnet = fields.pop("name"), fields.pop("subnet", "")
    sample = augment.preprocess(source.gather(np.arange(1))["image"])
    fields.setdefault("image_size", int(sample.shape[1]))
    fields.setdefault("in_channels", int(sample.shape[3]))
    fields.setdefault("num_classes", int(source.num_classes))
    if config["train"]["remat"] != "none":
        fields.setdefault("remat", config["train"]["remat"])
    model = registry.model_config(name, **fields)
    if sample.shape[1] != sample.shape[2]:
        raise UserError(f"images of {sample.shape[1]}x{sample.shape[2]} are not square; set data.augment.pad_to")
    if sample.shape[1:] != model.input_shape():
        raise UserError(f"model {name} takes images of {model.input_shape()}, the data gives {sample.shape[1:]}; remove model.image_size")
    return shrink(model, parse_choices(subnet)) if subnet else model


@dataclass
class Setup:
    """What a run is made of; built by `make_setup`, without touching a device."""

    config: dict[str, Any]
    splits: dict[str, Any]
    augment: Augment
    task: Classification
    space: Space
    total: int

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
            num_examples=len(self.splits["train"]),
            total=self.total,
            field=f"{section}.{field}",
        )

    def draw(self, step: int) -> tuple[schemes.Draw, ...]:
        """Returns the sub-networks of an update."""
        nested = self.config["nested"]
        return schemes.draw(nested["scheme"], self.order, nested["count"], self.config["seed"], step)

    def batches(self, start: int) -> Any:
        """Returns the iterator of this process's training batches from update `start` on."""
        return pipeline.train_batches(
            self.splits["train"],
            batch_size=self.config["data"]["batch_size"],
            seed=self.config["seed"],
            augment=self.augment,
            start_step=start,
            num_steps=self.total,
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )


def make_setup(config: dict[str, Any]) -> Setup:
    """Loads the data and builds model config and space.

    Raises:
      UserError: whatever in the config does not fit together.
    """
    data = config["data"]
    augment = make_augment(data["augment"])
    splits = load_splits(
        data["name"],
        data_dir=data["dir"] or None,
        validation_fraction=data["validation_fraction"],
        seed=0,
        **data["options"],
    )
    source = splits["train"]
    model = make_model(config, source, augment)
    space = make_space(model, config["nested"]["points"])
    total = to_steps(
        config["train"]["duration"], batch_size=data["batch_size"], num_examples=len(source), total=None, field="train.duration"
    )
    if total < 1:
        raise UserError(f"train.duration={config['train']['duration']!r} is no update at all")
    task = Classification(num_classes=model.num_classes, **config["task"])
    setup = Setup(config, splits, augment, task, space, total)
    _check_batch(config, setup)
    return setup


def _check_batch(config: dict[str, Any], setup: Setup) -> None:
    size, accumulate = config["data"]["batch_size"], config["train"]["accumulate"]
    parts = max(d.parts for d in setup.draw(0)) * accumulate
    if size % parts:
        raise UserError(f"data.batch_size={size} does not divide into {parts} parts (nested.count x train.accumulate)")


def make_programs(setup: Setup) -> Programs:
    """Builds optimizer, mesh and programs (nothing is compiled yet)."""
    config = setup.config
    mesh_config = dict(config["mesh"])
    mesh_config.pop("min_size")
    mesh = sharding.make_mesh(mesh_config)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = max(d.parts for d in setup.draw(0)) * config["train"]["accumulate"]
    for field, size in (("data.batch_size", config["data"]["batch_size"] // parts), ("eval.batch_size", config["eval"]["batch_size"])):
        if size % shards:
            raise UserError(f"{field}: {size} examples at a time do not divide over data x fsdp = {shards} devices")
    optim = config["optim"]
    schedule = make_schedule(
        optim["schedule"],
        peak=optim["lr"],
        total=setup.total,
        warmup=setup.steps("optim", "warmup"),
        final=optim["final_lr"],
        order=optim["order"],
    )
    full = abstract(setup.space.full)
    optimizer = make_optimizer(optim, schedule, {k: full.axes[k] for k in full.params})
    largest = max(len(setup.splits["validation"]), len(setup.splits["test"]))
    calls = {"calibrate": config["eval"]["calibrate_batches"], "evaluate": -(-largest // config["eval"]["batch_size"])}
    return Programs(setup.task, setup.space, optimizer, schedule, mesh, config["seed"], config, calls)
