"""The model of a run: its config, with the sizes that the data decide."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from research.errors import UserError
from research.models import registry
from research.nested.space import as_choices, shrink
from research.tasks.base import Task
from research.train.sections import RunConfig

_FEW = 4
"""So many names of models fit into a message."""


def check_fields(config: RunConfig) -> None:
    """Judges the model of a config without its data: whether there is such a model, and its fields by name, type and
    range. Whether the sizes fit together, some of which the data decide, is judged by `make_model`.

    Raises:
      UserError: an unknown model or field, or a value that the field does not take.
    """
    fields = {k: v for k, v in config.model.items() if k not in ("name", "subnet")}
    registry.check_fields(config.model["name"], fields)


def make_model(config: RunConfig, task: type[Task], source: Any, shapes: Mapping[str, Any]) -> Any:
    """Returns the model's config, its input and output sizes taken from the data unless given.

    Args:
      config: of the run.
      task: its class.
      source: of the training examples.
      shapes: of a prepared batch of one example.

    Raises:
      UserError: a model that does not take such data, or sizes that do not fit them.
    """
    fields = dict(config.model)
    name, subnet, data = fields.pop("name"), fields.pop("subnet", ""), config.data.name
    given, entry = task.sizes(source, shapes), task.entry(shapes)
    if registry.entry(name).config.predicts != task.predicts:
        fitting = [other for other in registry.list_models() if registry.entry(other).config.predicts == task.predicts]
        choice = ", ".join(fitting) if len(fitting) <= _FEW else "another"
        raise UserError(
            f"model {name} does not predict {task.wanted}, which data set {data} asks for; choose {choice}, or data of "
            "another kind"
        )
    known = {f.name for f in dataclasses.fields(registry.entry(name).config)}
    if not known.issuperset(given):
        raise UserError(f"model {name} does not take {entry}, which data set {data} gives; choose another of the two")
    for field, value in given.items():
        fields.setdefault(field, value)
    if config.train.remat != "none":
        fields.setdefault("remat", config.train.remat)
    model = registry.model_config(name, **fields)
    registry.check_buildable(model, name, config.model)
    shape = task.example_shape(shapes)
    if shape != model.input_shape():
        wrong = [f for f in given if f in config.model]
        raise UserError(
            f"model {name} takes {entry} of {model.input_shape()}, the data gives {shape}; remove "
            f"model.{', model.'.join(wrong)}"
        )
    return shrink(model, as_choices(subnet)) if subnet else model
