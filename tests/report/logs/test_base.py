"""Readers of logs register themselves, and reports know none of them by name."""

import json

import pytest

from research.report import run_card
from research.report.logs import base

REPORT = {"metric": "accuracy", "subnets": [{"name": "full", "value": 0.5, "params": 10, "flops": 20}]}


@pytest.fixture
def gates(monkeypatch):
    """A reader of one's own, of numbers called gates/LAYER/open."""
    monkeypatch.setattr(base, "_READERS", {reader.heading: reader for reader in base.readers()})

    @base.register
    class Gates(base.LogReader):
        heading, files, counts = "gates", ("gates.txt",), ("open_gates",)

        def last(self, rows):
            return [row["gates/layer0/open"] for row in rows if "gates/layer0/open" in row][-1:]

        def facts(self, rows):
            return {"open_gates": sum(self.last(rows))} if self.last(rows) else {}

        def remarks(self, rows):
            return [f"a gate is shut: {value}" for value in self.last(rows) if value < 0.1]

        def figures(self, rows):
            return {name: lambda path: path.write_text("drawn") for name in self.files if self.last(rows)}

        def sections(self, rows):
            return [f"## Gates\n\n{value}\n" for value in self.last(rows)]

    return Gates


def test_a_reader_of_one_s_own_is_asked_for_everything(gates, tmp_path):
    rows = [{"step": 1, "gates/layer0/open": 0.5}, {"step": 2, "gates/layer0/open": 0.05}]
    assert [reader.heading for reader in base.readers()] == ["experts", "gates"]
    assert base.facts(rows) == {"open_gates": 0.05} and base.facts([]) == {}
    assert base.counts() == ("dead_experts", "open_gates")
    assert base.remarks(rows) == ["a gate is shut: 0.05"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = {path.name for path in run_card.write_report(tmp_path, REPORT)}
    assert written == {"report.json", "report.md", "pareto.png", "gates.txt"}
    assert "## Gates\n\n0.05\n" in (tmp_path / "report.md").read_text()


def test_a_figure_that_the_log_no_longer_gives_is_removed(gates, tmp_path):
    for name in ("gates.txt", "experts.png", "other.png"):
        (tmp_path / name).write_text("of another run")
    run_card.write_report(tmp_path, REPORT)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "pareto.png", "other.png"}


def test_a_heading_has_one_reader(gates):
    with pytest.raises(ValueError, match="the heading gates has a reader already"):
        base.register(gates)
