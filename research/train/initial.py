"""Where a run starts that continues from another one's network: its arrays as they are, sorted by importance, or
upcycled into a mixture."""

import dataclasses
from collections.abc import Callable
from typing import Any

from research import seeds
from research.errors import UserError
from research.files import user_path
from research.modules.state import Arrays, abstract
from research.nested import importance, upcycle
from research.train.sections import RunConfig
from research.train.setup import Setup


def arrays(setup: Setup, config: RunConfig, say: Callable[[str], None]) -> tuple[Arrays, Arrays]:
    """Returns the (params, stats) that `train.init_from` asks for.

    Args:
      setup: of the run.
      config: its config.
      say: called with a line for humans.

    Raises:
      UserError: that network does not fit this one.
    """
    from research.train.extraction import load_model

    source = config.train.init_from
    given, params, stats = load_model(str(user_path(source)), "full", say)
    full = abstract(setup.space.full)
    equal = {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in full.params.items()}
    if setup.space.full.has_mixtures and not equal and given.layer_places():
        return _upcycled(setup, config, given, params, stats, say)
    for name, shape in full.params.items():
        if name not in params or params[name].shape != shape.shape:
            raise UserError(f"train.init_from={source} does not fit this model at {name}; its model is {given.family}")
    if config.nested.sort_importance:
        params, stats = importance.sort_by_importance(params, stats, full)
    return dict(params), dict(stats)


def _upcycled(
    setup: Setup, config: RunConfig, given: Any, params: Arrays, stats: Arrays, say: Callable[[str], None]
) -> tuple[Arrays, Arrays]:
    model, source, options = setup.space.full, config.train.init_from, dataclasses.asdict(config.train.upcycle)
    if given.family != model.family:
        raise UserError(
            f"train.init_from={source} does not fit this model: its model is {given.family}, not {model.family}"
        )
    made = upcycle.upcycle(given, params, stats, model, seeds.key(config.seed), **options)
    drawn = ", ".join(f"{name}={value}" for name, value in options.items() if value)
    change = drawn or upcycle.changes_function(model.mixture)
    told = f"which changes what it computes ({change})" if change else "which computes the same"
    say(f"every expert starts as the dense part of {source}, {told}")
    return made
