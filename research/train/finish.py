"""The end of a run: every network evaluated with statistics of its own, the test split read once, costs measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.modules.state import Arrays
from research.report.columns import told
from research.report.logs import base as logs
from research.report.reading import load_metrics
from research.train import columns, costs
from research.train.evaluation import Evaluator, Weights, extracted
from research.train.foreseen import report_split
from research.train.gradient import Gradient, Weigh
from research.train.journal import Journal
from research.train.programs import Programs
from research.train.setup import Setup
from research.train.statistics_files import save_statistics


@dataclass(frozen=True)
class Compiled:
    """What was compiled: seconds, programs, and how many it may be at most."""

    seconds: float = 0.0
    programs: int = 0
    bound: int = 0

    def __add__(self, other: "Compiled") -> "Compiled":
        return Compiled(self.seconds + other.seconds, self.programs + other.programs, self.bound + other.bound)


def compiled(programs: Programs) -> Compiled:
    """Returns what was compiled for a network of one shape."""
    seconds = programs.compiler.seconds
    return Compiled(sum(seconds.values()), len(seconds), bound(programs))


def final_report(
    setup: Setup, programs: Programs, evaluator: Evaluator, weights: Weights, folder: Path, before: Compiled
) -> dict[str, Any]:
    """Evaluates every network, saves its statistics in the run's folder and returns {"metric", "split", "subnets",
    ...}.

    The numbers are those of the test split, where there is none of the validation split; where there is neither, a
    network has costs alone.

    Args:
      weights: what is evaluated.
      folder: the run's directory.
      before: what was compiled for shapes that the network had before.
    """
    statistics = {name: evaluator.statistics(name, weights) for name in setup.order}
    validation = evaluator.run(statistics, weights, "validation") if setup.examples("validation") else {}
    split = report_split(setup)
    results = evaluator.run(statistics, weights, split) if split == "test" else validation
    kept = {name: programs.layout.small(name).kept_stats() for name in setup.order}
    own = {name: {k: v for k, v in stats.items() if k in kept[name]} for name, stats in statistics.items()}
    save_statistics(folder, setup.total, own)
    rows = _rows(setup, programs, weights, statistics, results, validation)
    evaluations = setup.methods.evaluations() if split else ()
    rows = columns.add(rows, evaluations, evaluator, weights, statistics, split)
    all_compiled = before + compiled(programs)
    return {
        "metric": f"{split} {setup.task.metric}".strip(),
        "higher_is_better": setup.task.higher_is_better,
        "split": split or None,
        "subnets": rows,
        "columns": told(columns.declared(setup.task, rows, evaluations)) if split else {},
        "compile_s": all_compiled.seconds,
        "programs": all_compiled.programs,
        "programs_bound": all_compiled.bound,
    }


def bound(programs: Programs) -> int:
    """The most programs that may be compiled for one shape of a run's network: three per distinct sub-network, and the
    update; gradient and update in each phase.

    Networks that an update distils and another does not have a gradient program for each, and unequal microbatches one
    that weighs them.
    """
    count, networks = len(programs.phases), len(programs.layout.distinct())
    compiled = list(programs.compiler.compiled)
    gradients = sum(isinstance(program, Gradient) for program in compiled)
    more = max(gradients - count * networks, 0) + sum(isinstance(program, Weigh) for program in compiled)
    return (2 + count) * networks + count + more


def facts(folder: Path, wall_s: float, journal: Journal, updates: int) -> dict[str, Any]:
    """Returns what a report tells of a run as a whole: {"wall_s", "train_flops", "updates", ...}.

    Args:
      wall_s: seconds of all its starts.
      updates: how many it made.
    """
    found: dict[str, Any] = {
        "wall_s": wall_s,
        "train_flops": journal.flops,
        "updates": updates,
        "gemm_gflops": journal.gemm / 1e9,
        "mfu": journal.flops / wall_s / journal.gemm / jax.device_count(),
    }
    if journal.skipped:
        found["skipped_updates"] = journal.skipped
    return found | logs.facts(load_metrics(folder))


def remarks(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Returns lines on a report that people should see."""
    lines = logs.remarks(load_metrics(folder))
    if not report["split"]:
        lines.append("neither a test nor a validation split is there: the report has costs and no metric")
    bad = [row["name"] for row in report["subnets"] if row["value"] is not None and not np.isfinite(row["value"])]
    if bad:
        lines.append(f"{report['metric']} is not finite: {', '.join(bad)}")
    programs, most = report["programs"], report["programs_bound"]
    return [*lines, f"{programs} programs compiled in {report['compile_s']:.1f} s (at most {most} allowed)"]


def _rows(
    setup: Setup,
    programs: Programs,
    weights: Weights,
    statistics: Mapping[str, Arrays],
    results: Mapping[str, Mapping[str, float]],
    validation: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    metric, space = setup.task.metric, setup.space
    measured: Mapping[str, Mapping[str, float | None]] = {}
    if setup.config.report.latency and jax.process_count() == 1:
        host = Weights(*jax.device_get((weights.params, weights.stats, weights.methods)))
        networks = {name: extracted(programs, name, host) for name in setup.order}
        models = {
            name: (space.configs[name], networks[name], jax.device_get(dict(statistics[name]))) for name in setup.order
        }
        measured = costs.measured_costs(models, setup.config.report.latency_batches)
    rows = []
    for name in setup.order:
        row = {"name": name, "value": results[name][metric] if results else None}
        row |= {f"validation_{metric}": validation[name][metric]} if validation else {}
        row |= setup.task.columns(results.get(name, {}))
        rows.append(row | costs.static_costs(space.configs[name]) | dict(measured.get(name, {})))
    return rows
