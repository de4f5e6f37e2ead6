"""The end of a run: every network evaluated with statistics of its own, the test split read once, costs measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.modules.state import Arrays
from research.nested.slicing import slice_like
from research.optim.build import state_bytes
from research.report.experts import dead, loads
from research.report.run_card import load_metrics
from research.train import costs
from research.train.attack_checks import attack_epsilon
from research.train.attacked import columns, robust_accuracies
from research.train.evaluation import Evaluator
from research.train.foreseen import report_split
from research.train.journal import Journal
from research.train.programs import Programs
from research.train.setup import Setup
from research.train.statistics_files import save_statistics


def final_report(
    setup: Setup, programs: Programs, evaluator: Evaluator, weights: Arrays, stats: Arrays, folder: Path
) -> dict[str, Any]:
    """Evaluates every network, saves its statistics in the run's folder and returns {"metric", "split", "subnets",
    ...}.

    The numbers are those of the test split, where there is none of the validation split; where there is neither, a
    network has costs alone.

    Args:
      weights: parameters of the full network that are evaluated.
      stats: its running statistics.
      folder: the run's directory.
    """
    statistics = {name: evaluator.statistics(name, weights, stats) for name in setup.order}
    validation = evaluator.run(statistics, weights, "validation") if setup.examples("validation") else {}
    split = report_split(setup)
    results = evaluator.run(statistics, weights, split) if split == "test" else validation
    own = {
        name: {k: v for k, v in stats.items() if k in programs.small(name).kept_stats()}
        for name, stats in statistics.items()
    }
    save_statistics(folder, setup.total, own)
    attacks, seconds = setup.config["report"].get("attacks", ()), programs.seconds
    robust = _attacked(setup, evaluator, weights, statistics, attacks, split) if attacks and split else {}
    return {
        "metric": f"{split} {setup.task.metric}".strip(),
        "split": split or None,
        "subnets": [
            row | robust.get(row["name"], {})
            for row in _rows(setup, programs, weights, statistics, results, validation)
        ],
        "compile_s": sum(seconds.values()),
        "programs": len(seconds),
        "programs_bound": programs.bound(),
    }


def facts(
    setup: Setup, programs: Programs, folder: Path, wall_s: float, journal: Journal, updates: int
) -> dict[str, Any]:
    """Returns what a report tells of a run as a whole: {"wall_s", "train_flops", "updates", ...}.

    Args:
      wall_s: seconds of all its starts.
      updates: how many it made.
    """
    found: dict[str, Any] = {
        "training_data_sha256": setup.splits["train"].digest,
        "wall_s": wall_s,
        "train_flops": journal.flops,
        "updates": updates,
        "optimizer_state_bytes": state_bytes(programs.state_shapes.opt_state),
        "gemm_gflops": journal.gemm / 1e9,
        "mfu": journal.flops / wall_s / journal.gemm / jax.device_count(),
    }
    if journal.skipped:
        found["skipped_updates"] = journal.skipped
    layers = _dead_experts(folder)
    return found | ({"dead_experts": sum(map(len, layers.values()))} if layers else {})


def _dead_experts(folder: Path) -> dict[str, list[int]]:
    return {layer: dead(load) for layer, (_, load) in loads(load_metrics(folder)).items()}


def remarks(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Returns lines on a report that people should see."""
    lines = [
        f"experts of {layer} that got no token in the last quarter of the log: {', '.join(map(str, names))}"
        for layer, names in _dead_experts(folder).items()
        if names
    ]
    if not report["split"]:
        lines.append("neither a test nor a validation split is there: the report has costs and no metric")
    bad = [row["name"] for row in report["subnets"] if row["value"] is not None and not np.isfinite(row["value"])]
    if bad:
        lines.append(f"{report['metric']} is not finite: {', '.join(bad)}")
    programs, most = report["programs"], report["programs_bound"]
    return [*lines, f"{programs} programs compiled in {report['compile_s']:.1f} s (at most {most} allowed)"]


def _attacked(
    setup: Setup,
    evaluator: Evaluator,
    weights: Arrays,
    statistics: Mapping[str, Arrays],
    attacks: Sequence[str],
    split: str,
) -> dict[str, dict[str, float]]:
    report = setup.config["report"]
    sizes = {
        "epsilon": attack_epsilon(setup.config),
        "examples": report["attack_examples"],
        "steps": report["attack_steps"],
    }
    found = robust_accuracies(evaluator, weights, statistics, attacks, split, **sizes)
    return {name: columns(accuracies) for name, accuracies in found.items()}


def _rows(
    setup: Setup,
    programs: Programs,
    weights: Arrays,
    statistics: Mapping[str, Arrays],
    results: Mapping,
    validation: Mapping,
) -> list[dict[str, Any]]:
    metric, space = setup.task.metric, setup.space
    measured: Mapping[str, Mapping[str, float]] = {}
    if setup.config["report"]["latency"] and jax.process_count() == 1:
        host = {k: np.asarray(v) for k, v in jax.device_get(weights).items()}
        sliced = {name: slice_like(host, programs.full, programs.small(name), programs.shards) for name in setup.order}
        models = {
            name: (space.configs[name], sliced[name], jax.device_get(dict(statistics[name]))) for name in setup.order
        }
        measured = costs.measured_costs(models, setup.config["report"]["latency_batches"])
    rows = []
    for name in setup.order:
        row = {"name": name, "value": results[name][metric] if results else None}
        row |= {f"validation_{metric}": validation[name][metric]} if validation else {}
        row |= {
            key: value
            for key, value in results.get(name, {}).items()
            if key.startswith("expert_") or key.endswith("_of_mean") or (key == "accuracy" != metric)
        }
        rows.append(row | costs.static_costs(space.configs[name]) | dict(measured.get(name, {})))
    return rows
