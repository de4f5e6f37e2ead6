"""The progress bar in narrow terminals."""

import pytest

from launch.terminal import bar_line, shorten

TEXT = "loss 2.3026  acc 0.123  lr 1.00e-03  12,345 images/s  MFU 12.3 %  ETA 12:34"


@pytest.mark.parametrize("columns", [200, 120, 80, 60, 40])
def test_the_counter_and_the_time_left_are_never_cut(columns):
    line = bar_line(12_345, 100_000, TEXT, columns)
    assert len(line) < columns and line.startswith("12345/100000 ") and line.endswith("ETA 12:34")


def test_what_is_less_needed_goes_first():
    assert shorten(TEXT, 60) == "loss 2.3026  acc 0.123  12,345 images/s  ETA 12:34"
    assert shorten(TEXT, 12) == "ETA 12:34"
    assert bar_line(1, 2, "loss 1", 80) == "1/2 " + "#" * 12 + "-" * 12 + " loss 1"
