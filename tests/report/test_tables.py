"""Numbers for people, tables to the character, CSV round trip, fronts and hypervolume."""

import math

import pytest

from research.report import tables


@pytest.mark.parametrize(
    "number, unit, text",
    [
        (0, "", "0"), (950, "", "950"), (999, "", "999"), (1000, "", "1.00 k"), (1_234_567, "", "1.23 M"),
        (45_600_000, "FLOPs", "45.6 MFLOPs"), (999_600, "", "1.00 M"), (4.1e9, "MACs", "4.10 GMACs"),
        (99.96, "", "100"), (9.996, "", "10.0"), (-2500, "", "-2.50 k"), (12, "FLOPs", "12 FLOPs"),
    ],
)  # fmt: skip
def test_human_count(number, unit, text):
    assert tables.human_count(number, unit) == text


def test_human_bytes_and_times():
    assert [tables.human_bytes(n) for n in (0, 512, 1536, 1023 * 1024, 3 * 2**30)] == [
        "0 B", "512 B", "1.50 KiB", "1023 KiB", "3.00 GiB",
    ]  # fmt: skip
    assert [tables.human_ms(t) for t in (0, 0.0123, 4.56, 78.9, 12345)] == [
        "0.00 ms",
        "12.3 us",
        "4.56 ms",
        "78.9 ms",
        "12.3 s",
    ]


def test_cells_take_their_unit_from_the_key():
    cells = {
        "params": 269_722,
        "flops": 81_102_080,
        "latency_ms": 1.5,
        "peak_memory_bytes": 2**20,
        "wall_s": 90.0,
        "value": 0.98125,
    }
    shown = [tables.format_cell(key, value) for key, value in cells.items()]
    assert shown == ["270 k", "81.1 MFLOPs", "1.50 ms", "1.00 MiB", "90.0 s", "0.9812"]
    assert tables.format_cell("value", None) == tables.format_cell("flops", math.nan) == "-"


ROWS = [{"name": "small", "params": 1_500, "value": 0.5}, {"name": "a|b", "params": None, "value": 0.25}]


def test_markdown_table():
    assert tables.markdown_table(ROWS, {"name": "net", "params": "parameters", "value": "accuracy"}) == (
        "| net | parameters | accuracy |\n| --- | ---: | ---: |\n| small | 1.50 k | 0.5 |\n| a\\|b | - | 0.25 |\n"
    )


def test_text_table():
    assert tables.text_table(ROWS, ["name", "params", "value"]) == (
        "sub-network  parameters  value\n-----------  ----------  -----\nsmall            1.50 k    0.5\na|b           "
        "        -   0.25\n"
    )
    assert tables.text_table([], ["name"]) == "sub-network\n-----------\n"


def test_csv_round_trip_keeps_full_precision(tmp_path):
    rows = [
        {"name": "a,b", "value": 0.1 + 0.2, "params": 10**12, "note": 'say "x"'},
        {"name": "1_000", "value": None, "params": -1, "note": "#2"},
    ]
    path = tables.write_csv(tmp_path / "sub" / "t.csv", rows, "python -m launch.bench \\\n  --csv=t.csv")
    assert path.read_text().splitlines()[:2] == [
        "# made by: python -m launch.bench \\ --csv=t.csv",
        "name,value,params,note",
    ]
    assert tables.read_csv(path) == rows
    assert [p.name for p in path.parent.iterdir()] == ["t.csv"]


def test_csv_columns_are_the_union_of_the_rows(tmp_path):
    path = tables.write_csv(tmp_path / "t.csv", [{"a": 1}, {"b": 2.5}], "x")
    assert tables.read_csv(path) == [{"a": 1, "b": None}, {"a": None, "b": 2.5}]


def test_pareto_keeps_the_undominated():
    rows = [
        {"name": "a", "flops": 1, "value": 0.5},
        {"name": "dominated: same cost", "flops": 1, "value": 0.4},
        {"name": "dominated: same value", "flops": 2, "value": 0.5},
        {"name": "b", "flops": 3, "value": 0.9},
        {"name": "b again", "flops": 3, "value": 0.9},
        {"name": "dominated", "flops": 4, "value": 0.8},
        {"name": "unknown", "flops": None, "value": 1.0},
        {"name": "nan", "flops": 5, "value": math.nan},
    ]
    names = lambda front: [row["name"] for row in front]
    assert names(tables.pareto(reversed(rows), "flops", "value")) == ["a", "b again", "b"]
    assert names(tables.pareto(rows, "flops", "value", higher_is_better=False)) == ["dominated: same cost"]
    losses = [{"name": n, "c": c, "v": v} for n, c, v in [("a", 1, 3.0), ("b", 2, 2.0), ("c", 3, 2.5)]]
    assert names(tables.pareto(losses, "c", "v", higher_is_better=False)) == ["a", "b"]


def test_hypervolume():
    assert tables.hypervolume([(0.2, 0.6), (0.5, 0.3)], (1, 1)) == pytest.approx(0.47, abs=1e-12)
    # Dominated points and points beyond the reference change nothing; the order does not matter.
    more = [(0.5, 0.3), (0.6, 0.7), (1.2, 0.1), (0.1, 1.5), (0.2, 0.6)]
    assert tables.hypervolume(more, (1, 1)) == pytest.approx(0.47, abs=1e-12)
    assert tables.hypervolume([], (1, 1)) == 0
