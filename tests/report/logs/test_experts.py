"""What a report makes of the loads of experts."""

import numpy as np
import pytest

from research.report.logs.experts import Experts, dead

ROWS = [{"step": i, "experts/layer1/load": [0.5, 1.5, 0.0], "experts/layer1/entropy": 0.5} for i in range(1, 9)]


def test_dead_needs_the_whole_last_quarter():
    load = np.ones((12, 3))
    load[-3:, 1] = 0
    load[-2:, 2] = 0
    assert dead(load) == [1]
    assert dead(load[-2:]) == []


def test_dead_experts_are_counted_and_named():
    reader = Experts()
    assert reader.facts(ROWS) == {"dead_experts": 1}
    assert reader.remarks(ROWS) == ["experts of layer1 that got no token in the last quarter of the log: 2"]
    assert reader.facts([{"step": 1, "loss": 1.0}]) == {} and reader.remarks([{"step": 1, "loss": 1.0}]) == []


def test_the_section_has_a_row_for_each_layer():
    table, words, figure = Experts().sections(ROWS)
    assert "| layer | experts | least load | largest load | entropy | dead |" in table
    assert table.splitlines()[-1].split("|")[1:4] == [" layer1 ", " 3 ", " 0 "] and "nats" in words
    assert list(Experts().figures(ROWS)) == list(Experts.files) and f"({Experts.files[0]})" in figure
    assert Experts().sections([]) == [] and Experts().figures([]) == {}


@pytest.mark.parametrize("load", [None, "x"])
def test_a_damaged_line_is_no_load(load):
    rows = [*ROWS, {"step": 9, "experts/layer1/load": load}]
    assert Experts().facts(rows) == {"dead_experts": 1}
