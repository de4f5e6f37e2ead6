"""What a run is made of beside its state, and how it ends."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.report import machine
from research.train import learner_registry, processes, watch
from research.train.checkpoint import Checkpoints
from research.train.evaluations import Evaluations
from research.train.heartbeat import Heartbeat
from research.train.learner import Learner, Reporter
from research.train.rundir import RunDir
from research.train.saves import Saves
from research.train.sections import RunConfig


@dataclass(frozen=True)
class Parts:
    """What a run is made of, beside its state.

    Attributes:
      heart: tells that it lives, while something takes long.
      learner: what is trained.
      rundir: its folder.
      evaluations: which are done.
      checkpoints, saves: on disk, and when they are made.
      profile: of the updates that are asked for.
    """

    heart: Heartbeat
    learner: Learner
    rundir: RunDir
    evaluations: Evaluations
    checkpoints: Checkpoints
    saves: Saves
    profile: watch.Profile


def make_parts(
    stored: dict[str, Any],
    workdir: Path,
    reporter: Reporter,
    make: Callable[[RunConfig], Learner],
    closing: contextlib.ExitStack,
) -> Parts:
    """Makes the parts of a run.

    Args:
      stored: the config, as the folder keeps it.
      make: the learner.
      closing: is told how they end, also of those that were made before one failed.
    """
    config = RunConfig.of(stored)
    heart = Heartbeat(reporter.say)
    closing.callback(heart.close)
    with heart.at(lambda: learner_registry.opening(config)):
        learner = make(config)
    closing.callback(learner.close)
    rundir = RunDir(workdir, stored, machine.environment(), writes=processes.is_first())
    closing.callback(rundir.close)
    processes.barrier("the run's folder is there")
    evaluations = Evaluations(learner.goal, config.eval.stop_at)
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        **config.checkpoint.keeping,
        metrics=evaluations.values,
        higher_is_better=learner.goal.higher_is_better,
        say=reporter.say,
    )
    closing.callback(checkpoints.abandon)
    profile = watch.Profile(config.train.profile, workdir / "profile")
    closing.callback(profile.close)
    return Parts(heart, learner, rundir, evaluations, checkpoints, Saves(checkpoints), profile)
