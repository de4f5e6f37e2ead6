"""Runs that earlier versions saved open, continue, are evaluated, extracted and exported."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from launch import config as recipe
from research.interop.stablehlo import export_stablehlo, load_stablehlo
from research.modules.state import apply
from research.train import loop
from research.train.config import differences
from research.train.extraction import Trained, load_model
from research.train.rundir import read_config
from research.train.used import ignored
from tests.train.reporter import Lines

HERE = Path(__file__).parent / "old_runs"
STEPS = {"image": 6, "robust": 4}
CLOSE = {"image": 2e-3, "robust": 3e-2}  # signs of gradients turn with the last bits


@pytest.fixture
def unpacked(tmp_path):
    def unpack(name):
        with tarfile.open(HERE / f"{name}.tar.xz") as archive:
            archive.extractall(tmp_path / name, filter="data")
        return tmp_path / name

    return unpack


@pytest.mark.parametrize("name", STEPS)
def test_its_config_is_the_recipe_s_of_today(unpacked, name):
    old, new = read_config(unpacked(name)), recipe.load(str(HERE / f"{name}.py"), {})
    assert differences(old, new, ignored=ignored(old, new)) == []
    assert old["methods"] == {"image": ["sandwich", "ema"], "robust": ["advmoe", "attacks"]}[name]


@pytest.mark.parametrize("name", STEPS)
def test_it_opens_and_its_evaluation_is_the_one_that_it_stored(unpacked, name):
    workdir = unpacked(name)
    trained = Trained(workdir)
    assert trained.step == STEPS[name]
    found = trained.evaluator.run({"full": trained.statistics("full")}, trained.weights, "validation")["full"]
    trained.programs.close()
    rows = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]
    (stored,) = (row for row in rows if row["step"] == STEPS[name] and "validation/loss/full" in row)
    stored = {key.split("/")[1]: value for key, value in stored.items() if key.endswith("/full")}
    assert {"accuracy", "loss"} <= set(stored) <= set(found)
    assert {key: found[key] for key in stored} == pytest.approx(stored, rel=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_what_is_extracted_and_exported_computes_the_same(unpacked, name):
    trained = Trained(unpacked(name))
    smallest = trained.setup.order[-1]
    config, params, stats = trained.model(smallest)
    trained.programs.close()
    assert all(np.isfinite(v).all() for v in params.values())
    if name == "image":  # what is evaluated is the average
        own = trained.state.params["head/kernel"][: params["head/kernel"].shape[0]]
        assert not np.array_equal(params["head/kernel"], own)
    # So bright that the outputs of networks of a few updates differ.
    image = 1e4 * np.random.default_rng(0).random((2, *config.input_shape()), np.float32)
    wanted, _ = apply(config, params, stats, image, mode="eval")
    program = load_stablehlo(export_stablehlo(config, params, stats, batch=2, platforms=("cpu",)))
    assert wanted.shape == (2, 10) and np.ptp(wanted, 0).max() > 1e-3
    np.testing.assert_allclose(program.call(image), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_it_goes_on_to_the_end_that_it_would_have_had(unpacked, name):
    workdir, lines = unpacked(name), Lines()
    loop.train(recipe.load(str(HERE / f"{name}.py"), {}), str(workdir), lines)
    assert f"resumed from step {STEPS[name]}" in lines.said
    ours, theirs = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (workdir / "metrics.jsonl", HERE / f"{name}.jsonl")
    )
    assert [set(row) for row in ours] == [set(row) for row in theirs]
    for row, wanted in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "lr"):
            if key in wanted:
                assert row[key] == pytest.approx(wanted[key], rel=CLOSE[name]), (row["step"], key)
    config, params, _ = load_model(workdir)
    assert config.num_classes == 10 and all(np.isfinite(v).all() for v in params.values())
