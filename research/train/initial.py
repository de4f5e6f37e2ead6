"""Where a run starts that continues from another one's network: `train.init_from` takes its arrays as they are, or
sorted by importance; methods may make others of it."""

from collections.abc import Callable

from research import seeds
from research.errors import UserError
from research.files import user_path
from research.modules.state import Arrays, abstract
from research.nested import importance
from research.train.method import Method
from research.train.method_registry import known
from research.train.sections import RunConfig
from research.train.setup import Setup


def arrays(setup: Setup, config: RunConfig, say: Callable[[str], None]) -> tuple[Arrays, Arrays]:
    """Returns the (params, stats) that `train.init_from` and the methods give a run to start from, all or some of the
    model's.

    Args:
      setup: of the run.
      config: its config.
      say: called with a line for humans.

    Raises:
      UserError: another network does not fit this one.
    """
    params, stats = _whole(setup, config, say) if config.train.init_from else ({}, {})
    own = setup.methods.start(setup.space.full, seeds.key(config.seed), say)
    return {**params, **own[0]}, {**stats, **own[1]}


def _whole(setup: Setup, config: RunConfig, say: Callable[[str], None]) -> tuple[Arrays, Arrays]:
    from research.train.extraction import load_model

    source = config.train.init_from
    try:
        given, params, stats = load_model(str(user_path(source)), "full", say)
    except UserError as error:
        raise UserError(f"train.init_from={source}: {error}") from None
    full = abstract(setup.space.full)
    for name, shape in full.params.items():
        if name not in params or params[name].shape != shape.shape:
            others = ", ".join(method for method, kind in known().items() if kind.start is not Method.start)
            raise UserError(
                f"train.init_from={source} does not fit this model at {name}; its model is {given.family} (methods "
                f"that make another network fit: {others})"
            )
    if config.nested.sort_importance:
        params, stats = importance.sort_by_importance(params, stats, full)
    return dict(params), dict(stats)
