"""Names the best sub-network of a run under a budget: the best validation metric among those that fit.

    python -m launch.select --workdir=runs/quickstart --max_flops=500000
    python -m launch.select --workdir=runs/quickstart --max_params=30000 --max_latency_ms=0.8 --candidate=width=0.6

The values are those of the run's report where it has them all; else the networks are evaluated, which needs the data.
Latency is measured now, on this machine, at batch 1, all networks interleaved.
"""

from absl import flags

from launch import common, outputs

_WORKDIR = common.path_flag("workdir", None, "Directory of a run.")
_MAX_PARAMS = flags.DEFINE_float("max_params", None, "Most parameters.")
_MAX_FLOPS = flags.DEFINE_float("max_flops", None, "Most FLOPs of one example's forward pass.")
_MAX_LATENCY = flags.DEFINE_float("max_latency_ms", None, "Most milliseconds for one example.")
_CANDIDATES = flags.DEFINE_multi_string(
    "candidate", [], "Further sub-networks to consider, as choices: width=0.6,depth=0.5. Repeatable."
)
_OUT = outputs.output_flag("out", outputs.Place.FILE, "CSV file for the whole table.", reads=[_WORKDIR])


def main() -> int:
    from research.errors import UserError

    if not _WORKDIR.value:
        raise UserError("--workdir is needed: the directory of a run, e.g. --workdir=runs/quickstart")
    budgets = {"max_params": _MAX_PARAMS.value, "max_flops": _MAX_FLOPS.value, "max_latency_ms": _MAX_LATENCY.value}
    if all(v is None for v in budgets.values()):
        raise UserError("no budget given; set --max_params, --max_flops or --max_latency_ms")

    from research.report import tables
    from research.report.machine import command_line
    from research.report.run_card import read_report
    from research.search.select import select
    from research.train import costs
    from research.train.extraction import Trained
    from research.train.supervised import goal_of

    trained = Trained(_WORKDIR.value, say=print)
    names = [*trained.setup.order, *(trained.add(text) for text in _CANDIDATES.value)]
    metric, report = trained.setup.task.metric, read_report(_WORKDIR.value) or {}
    known = (
        {row["name"]: row.get(f"validation_{metric}") for row in report.get("subnets", ())}
        if report.get("updates") == trained.step
        else {}
    )
    if any(known.get(name) is None for name in names):  # the report of this step has not all of them
        statistics = {name: trained.statistics(name) for name in names}
        known = {
            name: values[metric]
            for name, values in trained.evaluator.run(statistics, trained.weights, "validation").items()
        }
    rows = [{"name": n, "value": known[n], **costs.static_costs(trained.setup.space.configs[n])} for n in names]
    if _MAX_LATENCY.value is not None:
        measured = costs.measured_costs({n: trained.model(n) for n in names}, (1,))
        rows = [{**row, **measured[row["name"]]} for row in rows]
    print(tables.text_table(rows, list(rows[0])))
    if _OUT.value:
        tables.write_csv(_OUT.value, rows, command=command_line())
    best = select(rows, "value", budgets, higher_is_better=trained.setup.task.higher_is_better)
    print(
        f"\nbest within the budget: {best['name']} (validation {metric} "
        f"{goal_of(trained.setup.task).shown(best['value'])})"
    )
    common.print_next(
        f"python -m launch.extract --workdir={_WORKDIR.value} --subnet={best['name']} "
        f"--out={_WORKDIR.value}/{best['name'].replace('=', '')}"
    )
    trained.programs.close()
    return 0


if __name__ == "__main__":
    common.run(main)
