"""Trains soft actor-critic with a mixture of experts on a toy control task, over seeds, and sets estimators side by
side.

    python -m launch.control --task=detour --experts=1,2,4 --estimator=frequency,gumbel,score --seeds=0,1,2 \\
        --out=results/control/detour

Each of the numbers of experts is run with each estimator (one expert once: there all are plain SAC). Writes
control.csv, a row per seed, and control.md, means over seeds.
"""

import functools
import itertools
import tempfile
import time
from typing import Any

from absl import flags

from launch import common, outputs

_TASK = flags.DEFINE_string("task", "bandit", "Toy task: bandit, detour or pendulum.")
_EXPERTS = flags.DEFINE_list("experts", ["1", "2"], "Numbers of primitives of the policy; 1 is plain SAC.")
_ESTIMATOR = flags.DEFINE_list(
    "estimator", ["frequency"], "Gradients of the router: frequency, frequency_best, gumbel, score."
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, trained side by side.")
_STEPS = flags.DEFINE_integer("steps", 5000, "Environment steps of each seed, one update each.", lower_bound=10)
_OUT = outputs.output_flag(
    "out", outputs.Place.FOLDER, "Folder for control.csv and control.md; default: nothing is written."
)

EVALUATIONS = 10
"""Evaluations of a run, at equal distances; the last is at its end."""


def _numbers(name: str, texts: list[str]) -> list[int]:
    from research.errors import UserError

    if not texts or not all(text.isdigit() for text in texts):
        raise UserError(f"--{name}={','.join(texts)}; valid: whole numbers joined by commas, e.g. --{name}=1,2")
    return [int(text) for text in texts]


def _config(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of a run that is evaluated EVALUATIONS times."""
    from research.train.config import base_config, resolved

    config = base_config()
    config.learner = {"name": "soft_actor_critic", "options": options}
    config.train.duration, config.eval.every, config.checkpoint.every = str(EVALUATIONS), "1", "0"
    return resolved(config)


def _train(config: dict[str, Any], head: str) -> list[Any]:
    """Trains a config in a folder that nothing is kept of and returns its evaluations; `head` begins their lines."""
    from launch.terminal import Silent
    from research.control.learner import SoftActorCritic
    from research.control.runs import Evaluation
    from research.train.loop import Preempted, train

    curve: list[Evaluation] = []

    def told(evaluation: Evaluation) -> None:
        curve.append(evaluation)
        returns = " ".join(f"{value:.2f}" for value in evaluation.returns)
        print(f"{head}: step {evaluation.steps}/{_STEPS.value}  returns {returns}", flush=True)

    try:
        with tempfile.TemporaryDirectory() as folder:
            train(config, folder, Silent(), functools.partial(SoftActorCritic, told=told))
    except Preempted:
        common.stopped("stopped; nothing is kept, start the same command again")
    return curve


def main() -> int:
    experts, seeds = _numbers("experts", _EXPERTS.value), _numbers("seeds", _SEEDS.value)

    from research.control import runs
    from research.control.environments import environment
    from research.report import machine, tables

    environment(_TASK.value)  # or an error
    options = {"task": _TASK.value, "seeds": seeds, "steps": _STEPS.value // EVALUATIONS}
    configs = {
        (k, estimator if k > 1 else "-"): _config({**options, "experts": k, "estimator": estimator})
        for k, estimator in itertools.product(experts, _ESTIMATOR.value)
    }
    rows = []
    for (k, estimator), config in configs.items():
        start = time.perf_counter()
        curve = _train(config, f"{_TASK.value}, {k} experts, {estimator}")
        rows += runs.summary(_TASK.value, k, estimator, seeds, curve, time.perf_counter() - start)
    shown = runs.over_seeds(rows)
    print(tables.text_table(shown, list(shown[0])))
    if _OUT.value:
        tables.write_both(_OUT.value, "control", rows, shown, machine.command_line())
        print(f"written to {_OUT.value}/control.csv, .md")
    return 0


if __name__ == "__main__":
    common.run(main, trains=True)
