"""What the documents say of how results were made follows from the recipes as they are."""

import pytest

from research.report.tables import read_csv
from tests.documents.conditions import RESULTS, ROOT, facts, wall

ROWS = {row["result"]: row for row in read_csv(ROOT / "results/conditions.csv")}


def test_every_trained_result_is_listed():
    """A folder of results is of trained networks, or of measurements of time and faults."""
    folders = {str(path.parent.relative_to(ROOT / "results")) for path in (ROOT / "results").rglob("*.md")} - {
        ".",
        "bench",
        "faults",
    }
    told = {result.folder for result in RESULTS} | {
        "control/bandit",
        "control/detour",
        "shakespeare",
        "shakespeare/large",
    }
    assert folders == told and set(ROWS) == {result.folder for result in RESULTS}


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result.folder)
def test_wall_times_are_those_of_the_files(result):
    assert str(ROWS[result.folder]["wall_s"]) == wall(result)
    assert (ROWS[result.folder]["seeds"], ROWS[result.folder]["changed_since"] or "") == (result.seeds, result.since)


@pytest.mark.slow_unless(
    "customise",
    "hybrid",
    "in_context_linear",
    "lm_quickstart",
    "moe_lm",
    "pixel_sequences",
    "quickstart",
    "sandwich_lm",
    "wide_deep",
)
@pytest.mark.parametrize(
    "result", [r for r in RESULTS if "fashion" not in " ".join(r.recipes)], ids=lambda result: result.folder
)
def test_updates_choices_and_flops_follow_from_the_recipes(result):
    found = facts(result)
    expected = {key: str(ROWS[result.folder][key]) for key in ("updates", "examples", "chosen")}
    if result.folder == "domain_encoder":  # its epochs are those of the interpreter's own standard library
        assert (found["examples"], found["chosen"]) == (expected["examples"], expected["chosen"])
        return
    assert {key: found[key] for key in expected} == expected
    told = [float(value) for value in str(ROWS[result.folder]["train_flops"]).split("; ")]
    assert [float(value) for value in found["train_flops"].split("; ")] == pytest.approx(told)
