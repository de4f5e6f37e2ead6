"""What checkpoints and folders hold: no sums, which are zero between updates; readers take no optimizer's state."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from launch import config as recipe
from research.errors import UserError
from research.interop import safetensors_io
from research.modules.axes import StatKind
from research.train import kept, loop
from research.train.checkpoint import Checkpoints
from research.train.extraction import Trained
from research.train.statistics_files import load_statistics, save_statistics
from tests.train.reporter import Lines

MODEL = {
    "model.pattern": "routing",
    "model.depth": "1",
    "model.routing": "{'num_heads': 2, 'num_local_heads': 1, 'num_clusters': 2, 'window': 8, 'local_window': 4}",
}
MODEL |= {"model.moe.num_experts": "4", "model.moe.bias_update_rate": "0.1", "model.moe.scoring_func": "sigmoid"}


def tiny(**overrides):
    fields = {"train.duration": "2", "checkpoint.every": "0", "eval.every": "0", "data.options.train_examples": "16"}
    fields |= {"optim.warmup": "0", "methods": ""}
    config = recipe.load("tests/tiny_lm.py:moe", {**MODEL, **fields, **overrides})
    return {**config, "nested": {**config["nested"], "points": {}}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two updates with mixtures and routing attention: (workdir, opened)."""
    workdir = tmp_path_factory.mktemp("kept") / "run"
    loop.train(tiny(), str(workdir), Lines())
    opened = Trained(workdir)
    opened.programs.close()
    return workdir, opened


def sums(full):
    return set(full.stats_of(StatKind.SUM))


def test_files_hold_no_sums_and_readers_have_zeros(run, tmp_path):
    workdir, opened = run
    full = opened.programs.full
    assert {name.rsplit("/", 1)[-1] for name in sums(full)} == {"chosen", "new_sums", "new_counts"}
    assert opened.state.opt_state is None and list(opened.state.stats) == list(full.stats)
    assert all(not np.any(opened.state.stats[name]) for name in sums(full))
    assert any(np.any(opened.state.stats[name]) for name in full.stats_of(StatKind.STATE))
    with np.load(workdir / "statistics" / "2" / "full.npz") as file:
        assert set(file.files) == full.stats.keys() - sums(full)
    config, params, stats = opened.model("full")
    safetensors_io.save_folder(
        tmp_path / "model", config, params, {k: np.ones(v.shape, np.float32) for k, v in stats.items()}
    )
    held = safetensors_io.load_safetensors(tmp_path / "model" / "model.safetensors")
    assert not any(f"stats/{name}" in held for name in sums(full))
    again = safetensors_io.load_folder(tmp_path / "model")[2]
    assert again.keys() == full.stats.keys() and {name for name, value in again.items() if not np.any(value)} == sums(
        full
    )


def test_files_that_hold_sums_are_read_as_well(run, tmp_path):
    _workdir, opened = run
    programs, full = opened.programs, opened.programs.full
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = dataclasses.replace(opened.state, stats={k: np.full(v.shape, 3, np.float32) for k, v in full.stats.items()})
    checkpoints.save(2, state, {})
    checkpoints.wait()
    wanted = kept.wanted(programs.shapes, programs.shardings, full, optimizer=False)
    found = kept.whole(checkpoints.restore(2, wanted)[0], full, programs.layout.stats)
    with pytest.raises(
        UserError, match="optimizer's state in checkpoint 2 .* it lacks opt_state/.*; start anew from it"
    ):
        checkpoints.restore(2, kept.wanted(programs.shapes, programs.shardings, full, optimizer=True))
    checkpoints.close()
    assert {name for name, value in found.stats.items() if not np.any(value)} == sums(full)
    save_statistics(tmp_path, 2, {"full": state.stats})
    stats, problem = load_statistics(tmp_path, 2, "full", full)
    assert problem == "" and {name for name, value in stats.items() if not np.any(value)} == sums(full)
    config, params, _ = opened.model("full")
    arrays = {f"params/{k}": v for k, v in params.items()} | {f"stats/{k}": v for k, v in state.stats.items()}
    safetensors_io.save_folder(tmp_path / "model", config, params, state.stats)
    safetensors_io.save_safetensors(tmp_path / "model" / "model.safetensors", arrays)
    assert jax.tree.all(jax.tree.map(np.array_equal, safetensors_io.load_folder(tmp_path / "model")[2], stats))


def test_a_run_opens_whatever_its_optimizer_was(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "optim": {**config["optim"], "name": "sm3"}}))
    opened = Trained(tmp_path / "run")
    opened.programs.close()
    assert opened.config.optim.name == "sm3"
    assert jax.tree.all(jax.tree.map(np.array_equal, opened.model("full")[1], run[1].model("full")[1]))


def test_statistics_that_are_not_believed_are_told_where_the_data_are_gone(run, tmp_path, monkeypatch):
    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run" / "statistics" / "2" / "nestax_manifest.json").unlink()
    opened = Trained(tmp_path / "run")
    opened.programs.close()

    def gone(*_):
        raise UserError("the data are gone")

    monkeypatch.setattr(opened.evaluator, "statistics", gone)
    with pytest.raises(
        UserError,
        match="step 2 cannot be used: .*full.npz has no checksum .*, and making them needs the data: the data are",
    ):
        opened.statistics("full")
    shutil.rmtree(tmp_path / "run" / "statistics")
    with pytest.raises(UserError, match="step 2 are not in .*run, and making them needs the data"):
        opened.statistics("full")
