"""Columns that methods add to a report: in a run, and where a run is opened again, whatever it was trained with."""

import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from research.errors import UserError
from research.report.columns import Column
from research.train import columns, loop, method_registry
from research.train.extraction import Trained
from research.train.method import Evaluation, Method
from tests.train.ends import tiny
from tests.train.reporter import Lines
from tests.train.test_sharding import FAST


@dataclass(frozen=True)
class Strain(Method, Evaluation):
    """A column of one's own, better where it is small: the number of examples, and an offset."""

    offset: int = 0
    words: tuple[str, ...] = ()

    def evaluations(self):
        return (self,)

    def declared(self) -> Mapping[str, Column]:
        return {"strain": Column(higher_is_better=False)}

    def columns(self, evaluator, weights, statistics, split):
        count = sum(batch["mask"].sum() for batch in evaluator.batches(split))
        return {name: {"strain": float(count) + self.offset + 1000 * len(self.words)} for name in statistics}


@pytest.fixture
def strain(monkeypatch):
    monkeypatch.setattr(method_registry, "_METHODS", method_registry.known())
    method_registry.register("strain")(Strain)


def run(folder, **fields):
    return loop.train(tiny(train__duration=3, **fields), str(folder), Lines())


def test_a_report_holds_the_columns_and_how_they_are_read(strain, tmp_path):
    report = run(tmp_path / "run", methods="strain", method__strain__offset=2)
    assert report["subnets"][0]["strain"] == 362
    stored = json.loads((tmp_path / "run" / "report.json").read_text())
    assert stored["columns"] == {
        "value": {"higher_is_better": True, "percent": True},
        "validation_accuracy": {"higher_is_better": True, "percent": True},
        "strain": {"higher_is_better": False, "percent": False},
    }


def test_a_plain_run_is_evaluated_by_any_method_of_the_registry(strain, tmp_path):
    assert "strain" not in run(tmp_path / "run")["subnets"][0]
    trained = Trained(tmp_path / "run")
    setup, statistics = trained.setup, {"full": trained.statistics("full")}

    def value(names, options):
        found = columns.evaluations(setup, names, options)
        rows = columns.add([{"name": "full"}], found, trained.evaluator, trained.weights, statistics, "test")
        return rows[0].get("strain")

    assert value(None, {}) is None and value([], {}) is None
    assert value(["strain"], {}) == 360
    assert value(None, {"strain": {"offset": "5", "words": "a, b"}}) == 2365
    for names, options, said in (
        (["sandwich"], {}, "method sandwich adds no columns to a report; valid: attacks, customisation, strain"),
        (["attacks"], {"strain": {"offset": "1"}}, "options of strain are given, which is not evaluated"),
        (None, {"strain": {"offset": "x"}}, "method.strain.offset='x'; valid: a whole number"),
        (None, {"strain": {"ofset": "1"}}, "method.strain.ofset is unknown to strain; near: offset"),
        (["stran"], {}, "evaluations: unknown method 'stran'"),
    ):
        with pytest.raises(UserError, match=said):
            columns.evaluations(setup, names, options)
    trained.programs.close()


@pytest.mark.slow
def test_the_command_attacks_a_run_that_was_not_trained_to_be_attacked(tmp_path):
    run(tmp_path / "run")
    command = [sys.executable, "-m", "launch.evaluate", f"--workdir={tmp_path}/run", f"--out={tmp_path}/out.csv"]
    options = ["--config.method.attacks.names=pgd1", "--config.method.attacks.examples=20"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=FAST, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = (line for line in (tmp_path / "out.csv").read_text().splitlines() if not line.startswith("#"))
    (row,) = csv.DictReader(lines)
    assert float(row["robust_pgd1"]) <= float(row["clean_accuracy"]) and (20 * float(row["clean_accuracy"])) % 1 < 1e-6
    refused = subprocess.run([*command, "--config.seed=1"], capture_output=True, text=True, env=FAST, timeout=300)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--config.seed: a run keeps its config" in refused.stderr
