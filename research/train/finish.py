"""The end of a run: every network evaluated with statistics of its own, the test split read once, costs measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.modules.state import Arrays
from research.nested.slicing import slice_like
from research.train import costs
from research.train.attack_checks import attack_epsilon
from research.train.attacked import columns, robust_accuracies
from research.train.evaluation import Evaluator
from research.train.programs import Programs
from research.train.setup import Setup
from research.train.statistics_files import save_statistics


def final_report(setup: Setup, programs: Programs, evaluator: Evaluator, weights: Arrays, stats: Arrays, folder: Path) -> dict[str, Any]:
    """Evaluates every network, saves its statistics in the run's folder and returns {"metric", "subnets", ...}.

    Args:
      weights: parameters of the full network that are evaluated.
      stats: its running statistics.
      folder: the run's directory.
    """
    statistics = {name: evaluator.statistics(name, weights, stats) for name in setup.order}
    validation = evaluator.run(statistics, weights, "validation")
    split = "test" if setup.config["report"]["test"] and len(setup.splits["test"]) else "validation"
    results = evaluator.run(statistics, weights, split) if split == "test" else validation
    save_statistics(folder, setup.total, statistics)
    attacks, seconds = setup.config["report"].get("attacks", ()), programs.seconds
    robust = _attacked(setup, evaluator, weights, statistics, attacks, split) if attacks else {}
    return {
        "metric": f"{split} {setup.task.metric}",
        "subnets": [row | robust.get(row["name"], {}) for row in _rows(setup, programs, weights, statistics, results, validation)],
        "compile_s": sum(seconds.values()),
        "programs": len(seconds),
        "programs_bound": programs.bound(),
    }


def _attacked(
    setup: Setup, evaluator: Evaluator, weights: Arrays, statistics: Mapping[str, Arrays], attacks: Sequence[str], split: str
) -> dict[str, dict[str, float]]:
    report = setup.config["report"]
    sizes = {"epsilon": attack_epsilon(setup.config), "examples": report["attack_examples"], "steps": report["attack_steps"]}
    found = robust_accuracies(evaluator, weights, statistics, attacks, split, **sizes)
    return {name: columns(accuracies) for name, accuracies in found.items()}


def _rows(
    setup: Setup, programs: Programs, weights: Arrays, statistics: Mapping[str, Arrays], results: Mapping, validation: Mapping
) -> list[dict[str, Any]]:
    metric, space = setup.task.metric, setup.space
    measured: Mapping[str, Mapping[str, float]] = {}
    if setup.config["report"]["latency"] and jax.process_count() == 1:
        host = {k: np.asarray(v) for k, v in jax.device_get(weights).items()}
        sliced = {name: slice_like(host, programs.full, programs.small(name), programs.shards) for name in setup.order}
        models = {name: (space.configs[name], sliced[name], jax.device_get(dict(statistics[name]))) for name in setup.order}
        measured = costs.measured_costs(models, setup.config["report"]["latency_batches"])
    rows = []
    for name in setup.order:
        row = {"name": name, "value": results[name][metric], f"validation_{metric}": validation[name][metric]}
        row |= {
            key: value
            for key, value in results[name].items()
            if key.startswith("expert_") or key.endswith("_of_mean") or (key == "accuracy" != metric)
        }
        rows.append(row | costs.static_costs(space.configs[name]) | dict(measured.get(name, {})))
    return rows
