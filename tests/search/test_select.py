"""Selection under budgets, and the judgement of acceptance criteria."""

import pytest

from research.errors import UserError
from research.search.criteria import by_network, judge, measures
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
    rows = judge(found, {"full": 0.86, "smallest_flops": (None, 0.25), "wall_s": [None, 10]})
    assert [r["met"] for r in rows] == ["NO", "yes", "yes"]
    with pytest.raises(UserError, match="unknown acceptance criterion 'speed'"):
        judge(found, {"speed": 1})


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
