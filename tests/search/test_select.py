"""Selection under budgets, and the judgement of acceptance criteria."""

import pytest

from research.errors import UserError
from research.report.columns import Column, told
from research.search import sweep
from research.search.criteria import by_network, check_criteria, directions, judge, measures
from research.search.select import select

ROWS = [
    {"name": "full", "value": 0.9, "params": 100, "flops": 1000, "latency_ms": 3.0},
    {"name": "m", "value": 0.85, "params": 50, "flops": 400, "latency_ms": 1.0},
    {"name": "m2", "value": 0.85, "params": 60, "flops": 300, "latency_ms": 2.0},
    {"name": "s", "value": 0.7, "params": 10, "flops": 100, "latency_ms": 0.5},
]


@pytest.mark.parametrize(
    "budgets, name",
    [
        (dict(max_params=1000), "full"),
        (dict(max_params=60), "m2"),
        (dict(max_params=55), "m"),
        (dict(max_flops=350), "m2"),
        (dict(max_latency_ms=1.5), "m"),
        (dict(max_latency_ms=1.5, max_params=20), "s"),
    ],
)
def test_best_within_the_budget(budgets, name):
    assert select(ROWS, "value", budgets)["name"] == name


def test_nothing_fits():
    with pytest.raises(UserError, match="no network fits the budget; they need params from 10"):
        select(ROWS, "value", {"max_params": 5})


def test_acceptance_criteria():
    reports = [
        {
            "metric": "test accuracy",
            "subnets": [{"name": "full", "value": v, "flops": 8}, {"name": "s", "value": 0.9 * v, "flops": 2}],
            "wall_s": 9.0,
        }
        for v in (0.8, 0.9)
    ]
    found = measures(reports)
    assert (
        found["full"] == pytest.approx(0.85)
        and found["smallest_share"] == pytest.approx(0.9)
        and found["smallest_flops"] == 0.25
    )
    higher = directions(reports)
    rows = judge(found, {"full": 0.86, "smallest_flops": (None, 0.25), "wall_s": [None, 10]}, higher)
    assert [r["met"] for r in rows] == ["NO", "yes", "yes"]
    with pytest.raises(UserError, match="unknown acceptance criterion 'speed'"):
        judge(found, {"speed": 1}, higher)


def test_any_column_is_a_criterion_whose_direction_the_report_declares():
    columns = {"value": Column(True, percent=True), "strain": Column(False), "share": Column()}
    row = {"name": "full", "value": 0.5, "flops": 8, "strain": 2.0, "share": 0.3, "word": "x"}
    report = {"metric": "test score", "higher_is_better": True, "columns": told(columns), "subnets": [row], "wall_s": 1}
    reports = [report, report | {"subnets": [row | {"strain": 4.0}]}]
    found, higher = measures(reports), directions(reports)
    assert (found["strain"], found["share"]) == (3.0, 0.3) and "word" not in found
    assert [r["expected"] for r in judge(found, {"strain": 2.9, "full": 0.4}, higher)] == [
        "at most 2.9",
        "at least 0.4",
    ]
    assert [r["met"] for r in judge(found, {"strain": 2.9, "full": 0.4, "share": (0.2, None)}, higher)] == [
        "NO",
        "yes",
        "yes",
    ]
    with pytest.raises(UserError, match="share=0.2 says not which way is better"):
        judge(found, {"share": 0.2}, higher)
    assert by_network([report], ["0"])[0]["seed 0"] == "50.0"  # whatever the metric is called
    assert sweep.row({"a": "1"}, report | {"updates": 7}) == {
        "a": "1",
        "flops": 8,
        "value": 0.5,
        "strain": 2.0,
        "updates": 7,
        "wall_s": 1,
    }
    assert sweep.row({}, report | {"updates": 7}, ["share"])["share"] == 0.3
    with pytest.raises(UserError, match="no column of numbers 'word'; valid: flops, strain, share"):
        sweep.row({}, report | {"updates": 7}, ["word"])


def test_reports_of_earlier_versions_say_by_their_names_how_they_are_read():
    row = {"name": "full", "value": 0.5, "flops": 8, "clean_accuracy": 0.9, "robust_pgd1": 0.4, "expert_0": 0.5}
    report = {"metric": "test loss", "subnets": [row | {"validation_loss": 0.6}], "wall_s": 1, "updates": 3}
    assert "expert_0" not in sweep.row({}, report) and sweep.row({}, report)["robust_pgd1"] == 0.4
    higher = directions([report])
    assert (higher["validation_loss"], higher["full"], higher["robust_pgd1"]) == (False, False, True)


def test_a_misspelt_criterion_is_refused_before_any_run():
    check_criteria({"full": 0.9, "robust_pgd20": 0.5, "my_column": 1}, ["robust_pgd20"])
    for name in ("smalest_share", "robust_pgd2"):
        with pytest.raises(UserError, match=f"unknown acceptance criterion '{name}'"):
            check_criteria({name: 0.9}, ["robust_pgd20"])


def test_rows_by_network_hold_every_seed_and_the_mean():
    reports = [
        {"metric": "test accuracy", "subnets": [{"name": "full", "value": v, "params": 7, "flops": 8}]}
        for v in (0.8, 0.9)
    ]
    assert by_network(reports, ["3", "4"]) == [
        {"name": "full", "params": 7, "flops": 8, "seed 3": "80.0", "seed 4": "90.0", "mean": "85.0"}
    ]
    assert "mean" not in by_network(reports[:1], ["0"])[0]


def test_losses_are_to_be_small():
    rows = [{**row, "value": 1 / row["value"]} for row in ROWS]
    assert select(rows, "value", dict(max_params=60), higher_is_better=False)["name"] == "m2"
    assert select(rows, "value", dict(max_params=1000), higher_is_better=False)["name"] == "full"
    report = {
        "metric": "validation loss",
        "subnets": [{"name": "full", "value": 1.5, "flops": 8}, {"name": "s", "value": 2.0, "flops": 2}],
        "wall_s": 1,
    }
    found = measures([report, {**report, "subnets": [{**n, "value": n["value"] + 0.1} for n in report["subnets"]]}])
    assert found["full_least"] == 1.6 and found["smallest_share"] == pytest.approx(0.75)
    assert by_network([report], ["0"])[1]["seed 0"] == "2.0000"
