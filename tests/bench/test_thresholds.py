"""Thresholds are judged both ways, and the reductions that they are made of."""

import pytest

from research.bench import catalog, thresholds
from research.bench.thresholds import Threshold


def row(shape, contender, ms, name="op", direction="forward and gradients", **more):
    return {"name": name, "shape": shape, "direction": direction, "contender": contender, "median_ms": ms, **more}


ROWS = [
    row("4 experts", "ours", 2.0, temp_bytes=10),
    row("4 experts", "xla", 8.0, temp_bytes=40),
    row("64 experts", "ours", 1.0, temp_bytes=10),
    row("64 experts", "xla", 9.0, temp_bytes=20),
    row("64 experts", "ours", 100.0, direction="forward"),
]


@pytest.mark.parametrize(
    "asked, at_least, met", [(4, True, "yes"), (4.1, True, "no"), (4, False, "yes"), (3.9, False, "no")]
)
def test_judged_both_ways(asked, at_least, met):
    threshold = Threshold("speed", lambda rows: min(thresholds.ratios(rows, "op", "xla", "ours")), asked, at_least)
    bound = f"at {'least' if at_least else 'most'} {asked:g}"
    assert threshold.judge(ROWS, []) == {"claim": "speed", "figure": 4.0, "asked": bound, "met": met}


def test_thresholds_without_their_peer_are_not_judged():
    threshold = Threshold("speed", lambda rows: 1 / 0, 2, peer="torch")
    assert threshold.judge(ROWS, []) == {
        "claim": "speed",
        "figure": None,
        "asked": "at most 2",
        "met": "not judged: needs --peer=torch",
    }
    with pytest.raises(ZeroDivisionError):
        threshold.judge(ROWS, ["torch"])


def test_ratios_of_cases_with_both():
    assert thresholds.ratios(ROWS, "op", "xla", "ours") == [4.0, 9.0]
    assert thresholds.ratios(ROWS, "op", "ours", "xla", words="4 experts") == [0.25]  # not "64 experts"
    assert thresholds.ratios(ROWS, "op", "ours", "xla", field="temp_bytes") == [0.25, 0.5]
    with pytest.raises(LookupError, match="'torch'|torch"):
        thresholds.ratios(ROWS, "op", "torch", "ours")


def test_reductions():
    assert thresholds.geometric_mean([1, 10, 100]) == pytest.approx(10)
    assert thresholds.spread([2.0, 3.0, 2.5]) == 1.5
    assert thresholds.exponent({1024: 1.0, 2048: 2.0, 4096: 4.0}) == pytest.approx(1)
    assert thresholds.exponent({2: 3.0, 8: 48.0}) == pytest.approx(2)
    rows = [
        row("gla 4x512x4 64x64", "ours", 2.0),
        row("linear 4x512x4 64x64", "ours", 9.0),
        row("gla 1x2048x4 64x64", "ours", 3.0),
    ]
    assert thresholds.times_by_length(rows, "op", "gla") == {512: 2.0, 2048: 3.0}


@pytest.mark.slow
def test_suites_name_cases_that_exist_and_have_what_their_thresholds_compare():
    """Every threshold is judged on made-up times of the contenders that its cases really have."""
    peers = {"torch": "", "transformers": "", "unireplknet": "a path"}
    for suite in catalog.suites().values():
        rows = [
            row(one.shape, name, 5.0, one.name, one.direction, temp_bytes=7)
            for one in catalog.cases_of(suite, peers)
            for name in (*one.contenders, *one.peers)
        ]
        judged = [threshold.judge(rows, peers) for threshold in suite.thresholds]
        assert all(0 <= entry["figure"] <= 1 and entry["met"] in ("yes", "no") for entry in judged)


def test_suites_that_need_a_peer():
    assert {name for name, suite in catalog.suites().items() if thresholds.needs_peer(suite)} == {
        "unireplknet",
        "language_models",
    }


def test_a_mark_whose_cases_were_left_out_is_not_judged():
    judged = catalog.find_suite("grouped").thresholds[0].judge([], [])
    assert judged["figure"] is None and judged["met"] == "not judged: its cases were left out"


def test_a_mark_over_lengths_is_not_judged_without_its_cases():
    threshold = catalog.find_suite("context").thresholds[0]
    assert threshold.judge([], [])["met"].startswith("not judged")
    rows = [{"shape": "mamba 8192 tokens width 192", "median_ms": ms} for ms in (10.0, 11.0, 13.0)]
    assert threshold.judge(rows, [])["figure"] == pytest.approx(1.3) and threshold.judge(rows, [])["met"] == "no"
