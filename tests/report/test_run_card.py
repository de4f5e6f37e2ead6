"""The files of a run card, and the comparison of runs."""

import json

import numpy as np
import pytest

from research.errors import UserError
from research.report import run_card, tables


def subnet(name, value, params, flops):
    return {
        "name": name,
        "value": value,
        "params": params,
        "flops": flops,
        "latency_ms": 1.5,
        "peak_memory_bytes": 2**20,
    }


REPORT = {
    "metric": "accuracy",
    "subnets": [
        subnet("small", 0.9, 1000, 20_000),
        subnet("odd", 0.8, 1500, 30_000),
        subnet("full", 0.95, 4000, 80_000),
    ],
    "wall_s": 90.0,
    "compile_s": 12.5,
    "mfu": 0.321,
    "steps": 500,
}


def run(tmp_path, name, values, params=(1000, 4000), metric="accuracy"):
    rows = [subnet(n, v, p, 20 * p) for n, v, p in zip(("small", "full"), values, params, strict=True)]
    run_card.write_report(tmp_path / name, {"metric": metric, "subnets": rows})
    return tmp_path / name


def test_report_files(tmp_path):
    (tmp_path / "environment.json").write_text(
        json.dumps(
            {"command": "python -m launch.train --config=configs/x.py", "git": {"commit": "abc123", "dirty": True}}
        )
    )
    paths = run_card.write_report(tmp_path, REPORT)
    assert {p.name for p in paths} == {"report.json", "report.md", "pareto.png"}
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.md", "pareto.png", "environment.json"}
    assert json.loads((tmp_path / "report.json").read_text()) == REPORT
    text = (tmp_path / "report.md").read_text()
    for part in (
        "    python -m launch.train --config=configs/x.py\n",
        "| sub-network | accuracy | parameters | FLOPs | latency | memory |\n",
        "| full | 0.95 | 4.00 k | 80.0 kFLOPs | 1.50 ms | 1.00 MiB |\n",
        "On the Pareto front (FLOPs of one example's forward pass): small, full.\n",
        "* wall time: 90.0 s\n* of it compiling: 12.5 s\n* model FLOPs utilisation: 32.1 %\n* steps: 500\n",
        "* commit: abc123 with local changes",
        "](pareto.png)",
        f"    python -m launch.select --workdir={tmp_path} --max_flops=80000\n",
    ):
        assert part in text, part


def test_report_json_holds_plain_values(tmp_path):
    report = {
        "metric": "loss",
        "subnets": [{"name": "a", "value": np.float32(0.5), "params": np.int64(3), "flops": float("nan")}],
    }
    run_card.write_report(tmp_path, report)
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "metric": "loss",
        "subnets": [{"name": "a", "value": 0.5, "params": 3, "flops": None}],
    }


@pytest.mark.parametrize(
    "metric, higher",
    [("accuracy", True), ("perplexity", False), ("eval_loss", False), ("bits_per_byte", False), ("top1", True)],
)
def test_direction_follows_the_metric(metric, higher):
    assert run_card.higher_is_better({"metric": metric}) is higher
    assert run_card.higher_is_better({"metric": metric, "higher_is_better": not higher}) is not higher


@pytest.mark.parametrize(
    "report, words",
    [
        ({"subnets": []}, "needs 'metric'"),
        ({"metric": "a", "subnets": [{"name": "x"}]}, "'name' and 'value'"),
        ({"metric": "a", "subnets": [{"name": "x", "value": 1}] * 2}, "one name"),
    ],
)
def test_incomplete_reports_are_refused_and_nothing_is_written(tmp_path, report, words):
    with pytest.raises(ValueError, match=words):
        run_card.write_report(tmp_path / "run", report)
    assert not (tmp_path / "run").exists()


def test_compare_joins_by_name(tmp_path):
    a, b = run(tmp_path, "nested", (0.9, 0.95)), run(tmp_path, "other", (0.8, 0.97))
    result = run_card.compare([a, b])
    assert result["metric"] == "accuracy" and result["runs"] == ["nested", "other"] and result["plots"] == []
    assert result["rows"] == [
        {"name": "small", "params": 1000, "flops": 20_000, "nested": 0.9, "other": 0.8},
        {"name": "full", "params": 4000, "flops": 80_000, "nested": 0.95, "other": 0.97},
    ]
    assert "| full | 4.00 k | 80.0 kFLOPs | 0.95 | 0.97 |\n" in result["markdown"]


def test_compare_unites_runs_under_a_label_and_writes(tmp_path):
    nested = run(tmp_path, "nested", (0.9, 0.95))
    for name, value, params in (("small", 0.91, 1000), ("full", 0.96, 4000)):
        report = {"metric": "accuracy", "subnets": [subnet(name, value, params, 20 * params)]}
        run_card.write_report(tmp_path / f"alone-{name}", report)
        (tmp_path / f"alone-{name}" / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"st'
        )
    runs = {"many-in-one": nested, "trained alone": [tmp_path / "alone-small", tmp_path / "alone-full"]}
    result = run_card.compare(runs, tmp_path / "out")
    assert [(row["many-in-one"], row["trained alone"]) for row in result["rows"]] == [(0.9, 0.91), (0.95, 0.96)]
    assert [p.name for p in result["plots"]] == ["compare.png", "curves.png"]
    assert tables.read_csv(tmp_path / "out" / "compare.csv") == result["rows"]
    assert "](curves.png)" in (tmp_path / "out" / "compare.md").read_text()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"compare.md", "compare.csv", "compare.png", "curves.png"}


def test_compare_says_where_one_name_means_two_networks(tmp_path):
    result = run_card.compare([run(tmp_path, "a", (0.9, 0.95)), run(tmp_path, "b", (0.8, 0.97), params=(1000, 5000))])
    full = next(row for row in result["rows"] if row["name"] == "full")
    assert (full["params"], full["flops"], full["a"], full["b"]) == (None, None, 0.95, 0.97)
    assert "differ between the runs): full." in result["markdown"]


def test_runs_with_one_last_name_keep_apart(tmp_path):
    a, b = run(tmp_path, "x/run", (0.9, 0.95)), run(tmp_path, "y/run", (0.8, 0.97))
    assert run_card.compare([a, b])["runs"] == [str(a), str(b)]


def test_compare_refuses_what_it_cannot_join(tmp_path):
    a, b = run(tmp_path, "a", (0.9, 0.95)), run(tmp_path, "b", (0.8, 0.97), metric="loss")
    with pytest.raises(UserError, match=r"accuracy \(a\), loss \(b\)"):
        run_card.compare([a, b])
    with pytest.raises(UserError, match="holds no report.json"):
        run_card.compare([a, tmp_path / "none"])
    with pytest.raises(UserError, match="at least one run"):
        run_card.compare([])


def test_metrics_end_at_a_line_cut_by_a_kill(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert run_card.load_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    assert run_card.load_metrics(tmp_path / "none") == []


def test_curves_show_the_metric_then_the_loss():
    assert run_card._curve_key("accuracy", [{"loss": 1}, {"accuracy": 1}]) == "accuracy"
    assert run_card._curve_key("accuracy", [{"train_loss": 1}, {"loss": 1}]) == "loss"
    assert run_card._curve_key("accuracy", [{"step": 1, "train_loss": 1}]) == "train_loss"
    assert run_card._curve_key("accuracy", [{"step": 1}]) is None
