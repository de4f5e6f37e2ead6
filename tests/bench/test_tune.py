"""The tuner times every implementation and rewrites one op's rows of a table, the others to the letter."""

import time

import pytest

from research.bench import tune
from research.ops import dispatch

TABLE = """# made by: python -m launch.bench --tune=other
# made by: python -m launch.bench --tune=op
op,direction,at,implementation,ms
other,forward,pixels=49 taps=169,toeplitz,"a 1.0 b 2.0"
op,forward,length=64,old,
op_two,forward,length=64,kept,
"""


def test_rows_are_ordered_by_time():
    calls = {"slow": lambda: time.sleep(0.02), "fast": lambda: None}
    (row,) = tune.rows_of("op", {"length": 64.0, "taps": 3}, {"weight_grad": calls})
    assert (
        row["op"] == "op"
        and row["direction"] == "weight_grad"
        and row["at"] == "length=64 taps=3"
        and row["implementation"] == "fast"
    )
    assert row["ms"].split()[::2] == ["fast", "slow"] and float(row["ms"].split()[3]) >= 20


def test_only_the_rows_of_the_op_change(tmp_path, monkeypatch):
    table = tmp_path / "implementations.csv"
    table.write_text(TABLE)
    new = [{"op": "op", "direction": "forward", "at": "length=64", "implementation": "new", "ms": "new 1 old 2"}]
    tune.write(table, "op", new, "python -m launch.bench --tune=op")
    assert table.read_text().splitlines() == [
        "# made by: python -m launch.bench --tune=other",
        "# made by: python -m launch.bench --tune=op",
        "op,direction,at,implementation,ms",
        "other,forward,pixels=49 taps=169,toeplitz,a 1.0 b 2.0",
        "op_two,forward,length=64,kept,",
        "op,forward,length=64,new,new 1 old 2",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["implementations.csv"]
    monkeypatch.setattr(dispatch, "TABLE", table)
    dispatch._rows.cache_clear()
    dispatch._nearest.cache_clear()
    try:
        assert (
            dispatch.choose("op", length=100) == "new" and dispatch.choose("other", pixels=49, taps=169) == "toeplitz"
        )
    finally:
        dispatch._rows.cache_clear()
        dispatch._nearest.cache_clear()


@pytest.mark.slow
def test_tuners_yield_calls():
    for tuner in tune.known().values():
        at, directions = next(iter(tuner()))
        assert all(value > 0 for value in at.values())
        assert all(len(calls) > 1 and all(map(callable, calls.values())) for calls in directions.values())
