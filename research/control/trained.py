"""The policies of a run of soft actor-critic, for use in Python."""

import os
from collections.abc import Callable
from pathlib import Path

import jax

from research.control.learner import SoftActorCritic
from research.control.networks import ActorConfig
from research.modules.state import Arrays
from research.train import learner_registry
from research.train.restore import restore_newest
from research.train.rundir import read_config
from research.train.sections import RunConfig


def actors(
    workdir: str | os.PathLike[str], say: Callable[[str], None] = lambda _: None
) -> dict[int, tuple[ActorConfig, Arrays]]:
    """Returns seed -> (config, parameters) of every policy of a run, at its newest whole checkpoint.

    `apply(config, params, {}, observations)[0]` (research/modules/state.py) is the mixture of Gaussians over actions
    before squashing, of observations [B, O].

    Args:
      say: called with a line for each newer checkpoint that is damaged.

    Raises:
      UserError: no run of soft actor-critic, or no whole checkpoint.
    """
    config = RunConfig.of(read_config(workdir))
    learner_registry.check_is(config, "soft_actor_critic")
    learner = SoftActorCritic(config)
    learner.close()
    _, found, _ = restore_newest(Path(workdir) / "checkpoints", lambda run: learner.wanted(), say)
    trained, actor = learner.whole(found).learner.trained, learner.options.actor(learner.setting.environment)
    return {seed: (actor, jax.tree.map(lambda v, i=i: v[i], trained.actor)) for i, seed in enumerate(learner.seeds)}
