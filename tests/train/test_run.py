"""Whole runs of seconds: the run directory, exact resume after kill -9, SIGTERM, corruption, NaN, other configs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from launch import config as recipe
from research.errors import UserError
from research.train import initial, loop
from research.train.extraction import Trained
from research.train.manifests import MANIFEST
from research.train.methods import make_methods
from research.train.rundir import read_config
from research.train.sections import RunConfig
from tests.methods.test_draws import space_of
from tests.train.reporter import Lines


def tiny(arg="all", **overrides):
    return recipe.load(f"tests/tiny.py:{arg}", {k.replace("__", "."): str(v) for k, v in overrides.items()})


def command(workdir, *extra):
    return [sys.executable, "-m", "launch.train", "--config=tests/tiny.py", f"--workdir={workdir}", *extra]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run: (workdir, report, lines)."""
    workdir, lines = tmp_path_factory.mktemp("whole") / "run", Lines()
    report = loop.train(tiny(), str(workdir), lines)
    return workdir, report, lines


def final_arrays(workdir):
    trained = Trained(workdir)
    return {k: np.asarray(v) for k, v in trained.state.params.items()}, trained


def test_run_directory_explains_itself(whole):
    workdir, _report, lines = whole
    names = {p.name for p in workdir.iterdir()}
    assert {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "timings.jsonl",
        "checkpoints",
        "report.md",
        "report.json",
        "pareto.png",
    } <= names
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == list(range(1, 25))
    stored = json.loads((workdir / "report.json").read_text())
    assert [n["name"] for n in stored["subnets"]] == ["full", "s"] and stored["metric"] == "test accuracy"
    assert stored["subnets"][1]["flops"] < stored["subnets"][0]["flops"]
    timings = [json.loads(line) for line in (workdir / "timings.jsonl").read_text().splitlines()]
    assert all(t["images_per_s"] > 0 and t["mfu"] > 0 for t in timings)
    assert any("images/s" in s and "MFU" in s and "ETA" in s for s in lines.steps)


def test_number_of_programs(whole):
    _, report, _ = whole
    assert report["programs"] == report["programs_bound"] == 3 * 2 + 1


def test_it_learns(whole):
    workdir, report, _ = whole
    losses = [json.loads(line).get("loss") for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [x for x in losses if x is not None]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.05
    assert report["subnets"][0]["value"] > 0.12  # chance is 0.1


def test_killed_and_resumed_run_is_bit_identical(whole, tmp_path):
    reference, _, _ = whole
    workdir = tmp_path / "killed"
    process = subprocess.Popen(command(workdir), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 240
    while time.time() < deadline:  # somewhere after a checkpoint, in the middle of the run
        metrics = workdir / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count('"loss"') >= 14:
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit() and (p / MANIFEST).exists()}
    assert before and max(before) < 24, "the run was not killed in its middle"
    out = subprocess.run(command(workdir), capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    assert f"resumed from step {max(before)}" in out.stdout
    assert (workdir / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    ours, reopened = final_arrays(workdir)
    theirs, _ = final_arrays(reference)
    assert reopened.step == 24 and set(ours) == set(theirs)
    assert all(np.array_equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.slow
def test_sigterm_saves_and_exits_soon(tmp_path):
    workdir = tmp_path / "stopped"
    extra = ["--config.train.duration=100000", "--config.checkpoint.every=0", "--config.eval.every=0"]
    process = subprocess.Popen(command(workdir, *extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 240
    while time.time() < deadline:
        metrics = workdir / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count('"loss"') >= 5:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(steps) == 1 and steps[0] >= 5 and (workdir / "checkpoints" / str(steps[0]) / MANIFEST).exists()
    assert f"stopped by SIGTERM at step {steps[0]}" in out
    last = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
    assert last == steps[0]


def test_flipped_bit_is_said_and_the_step_before_used(whole, tmp_path):
    reference, _, _ = whole
    workdir = tmp_path / "flipped"
    shutil.copytree(reference, workdir)
    newest = workdir / "checkpoints" / "24"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 3] ^= 4
    largest.write_bytes(data)
    lines = Lines()
    loop.train(tiny(), str(workdir), lines)
    assert any("checkpoint 24 is not used" in line for line in lines.said)
    assert "resumed from step 20" in lines.said
    assert (workdir / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()


def test_a_run_that_failed_at_its_start_is_put_right_in_its_folder(tmp_path):
    with pytest.raises(UserError, match="train.init_from="):
        loop.train(tiny(train__init_from=str(tmp_path / "missing")), str(tmp_path / "run"), Lines())
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    loop.train(tiny(train__duration=3), str(tmp_path / "run"), Lines())
    assert read_config(tmp_path / "run")["train"]["init_from"] == ""


def test_another_config_is_refused_and_nothing_lost(whole):
    workdir, _, _ = whole
    before = sorted((str(p), p.stat().st_size) for p in workdir.rglob("*") if p.is_file())
    with pytest.raises(UserError, match=r"another config \(seed: 0 -> 7\)"):
        loop.train(tiny(seed=7), str(workdir), Lines())
    assert sorted((str(p), p.stat().st_size) for p in workdir.rglob("*") if p.is_file()) == before


@pytest.mark.slow
def test_nan_stops_with_step_network_and_checkpoint(tmp_path):
    config = tiny(optim__lr=1e30, optim__warmup=0)
    with pytest.raises(
        UserError, match=r"not finite at step \d+, sub-network \w+.*(last good checkpoint|no checkpoint)"
    ):
        loop.train(config, str(tmp_path / "nan"), Lines())


def test_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    import errno

    from research.train import checkpoint

    def full(folder, step):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    with pytest.raises(UserError, match="no space left on the disk; no earlier checkpoint exists"):
        loop.train(tiny(), str(tmp_path / "full"), Lines())


def test_statistics_are_kept_beside_the_checkpoint(whole):
    workdir, _, _ = whole
    assert {p.stem for p in (workdir / "statistics" / "24").iterdir()} == {"full", "s", "nestax_manifest"}


@pytest.mark.parametrize("damage", ["other_values", "truncated", "no_manifest", "copied_step", "not_damaged"])
def test_statistics_that_are_not_as_written_are_made_again(whole, tmp_path, damage):
    workdir, said = tmp_path / "run", []
    shutil.copytree(whole[0], workdir)
    folder = workdir / "statistics" / "24"
    path = folder / "s.npz"
    with np.load(path) as data:
        right = dict(data)
    if damage == "other_values":
        np.savez(path, **{k: v * 3 for k, v in right.items()})
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    elif damage == "no_manifest":
        (folder / MANIFEST).unlink()
    elif damage == "copied_step":
        text = (folder / MANIFEST).read_text()
        (folder / MANIFEST).write_text(text.replace('"step": 24', '"step": 20'))
    trained = Trained(workdir, said.append)
    found = trained.statistics("s")
    assert found.keys() == right.keys()
    for name, value in right.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
    assert len(said) == (damage != "not_damaged") and all("made again from training batches" in line for line in said)


@pytest.mark.slow
def test_extracted_equals_in_place(whole):
    from research.modules.state import apply

    workdir, report, _ = whole
    trained = Trained(workdir)
    batch = next(iter(trained.evaluator.batches("test")))
    for name in ("full", "s"):
        config, params, stats = trained.model(name)
        inside = apply(config, trained.programs.layout.sliced(name, trained.weights.params), stats, batch["image"])[0]
        outside = apply(config, params, stats, batch["image"])[0]
        assert np.array_equal(np.asarray(inside), np.asarray(outside))
    again = trained.evaluator.run({n: trained.statistics(n) for n in ("full", "s")}, trained.weights, "test")
    assert [again[n]["accuracy"] for n in ("full", "s")] == [n["value"] for n in report["subnets"]]


@pytest.mark.slow
def test_importance_sorting_starts_from_a_run_and_keeps_its_function(whole, tmp_path):
    from research.modules.state import apply

    reference, _, _ = whole
    source = Trained(reference)
    _, _, stats = source.model("full")
    config = tiny(train__init_from=str(reference), nested__sort_importance=True, train__duration=1, optim__warmup=0)
    run = loop.Run(config, str(tmp_path / "sorted"), Lines())
    state = run.learner.programs.state_from(*initial.arrays(run.learner.setup, run.config, print))
    image = next(iter(source.evaluator.batches("test")))["image"]
    before = apply(source.setup.space.full, source.weights.params, stats, image)[0]
    after = apply(source.setup.space.full, state.params, state.stats, image)[0]
    np.testing.assert_allclose(after, before, atol=1e-4 * float(np.abs(before).max()))
    up = "stages/0/layer/phases/0/up/kernel"
    assert not np.array_equal(np.asarray(state.params[up]), np.asarray(source.weights.params[up]))
    report = run.run()
    assert np.isfinite(report["subnets"][1]["value"])


def test_the_test_split_is_read_at_the_end_alone(whole):
    metrics = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()]
    assert any("validation/accuracy/full" in m for m in metrics)
    assert not any("test" in key for m in metrics for key in m)


@pytest.mark.slow
def test_accumulation_equals_the_whole_batch(tmp_path):
    """Without batch norm, the gradient over four microbatches of a batch is that of the whole."""
    after = {}
    for parts in (1, 4):
        config = tiny(
            "full", train__duration=1, eval__every=0, optim__warmup=0, optim__name="sgd", train__accumulate=parts
        )
        config["model"] = {"name": "vit_tiny_patch16_224", "patch_size": 4, "dim": 16, "depth": 2, "num_heads": 2}
        config["nested"]["points"] = {}
        loop.train(config, str(tmp_path / str(parts)), Lines())
        after[parts] = {k: np.asarray(v) for k, v in Trained(tmp_path / str(parts)).state.params.items()}
    for k, whole in after[1].items():
        np.testing.assert_allclose(after[4][k], whole, atol=2e-6 * max(np.abs(whole).max(), 1e-3), err_msg=k)


def test_what_was_trained_on_other_devices_is_read_on_one(whole, tmp_path):
    """Networks on devices of their own, of which this machine has not as many."""
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["nested"]["execution"] = "parallel"
    config |= {"methods": ["sorted"], "method": {"sorted": {"count": 2}}}
    config["mesh"] |= {"data": 2}
    (workdir / "config.json").write_text(json.dumps(config))
    _, params, stats = Trained(workdir).model("s")
    _, wanted, wanted_stats = Trained(whole[0]).model("s")
    jax.tree.map(np.testing.assert_array_equal, (params, stats), (wanted, wanted_stats))


@pytest.mark.slow
def test_a_run_is_read_on_more_devices_than_its_batches_divide_over(whole, tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [
        sys.executable,
        "-m",
        "launch.evaluate",
        f"--workdir={whole[0]}",
        "--split=test",
        f"--out={tmp_path}/e.csv",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "e.csv").read_text().count("\n") > 2


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["random", "sorted", "sandwich"])
def test_an_update_trains_what_its_method_draws(scheme, tmp_path):
    count = {} if scheme == "random" else {f"method__{scheme}__count": 2}  # random draws one
    config = tiny(scheme, train__duration=4, eval__every=0, **count)
    loop.train(config, str(tmp_path / scheme), Lines())
    rows = [json.loads(line) for line in (tmp_path / scheme / "metrics.jsonl").read_text().splitlines()]
    trained = [{key for key in row if key.startswith("loss/")} for row in rows if "loss" in row]
    drawn = [make_methods(RunConfig.of(config)).draws(space_of(("full", "s")), 0, step) for step in range(4)]
    assert trained == [{f"loss/{draw.name}" for draw in draws} for draws in drawn]


@pytest.mark.slow
def test_bfloat16_distillation_ema_clipping_and_remat(tmp_path):
    precise = {
        "train__precision": "bfloat16",
        "method__ema__decay": 0.9,
        "optim__clip_norm": 1.0,
        "train__remat": "full",
    }
    config = tiny(
        "sandwich", methods="sandwich,ema", method__sandwich__count=2, train__duration=4, optim__name="lion", **precise
    )
    report = loop.train(config, str(tmp_path / "run"), Lines())
    assert np.isfinite(report["subnets"][0]["value"])
    trained = Trained(tmp_path / "run")
    average = trained.state.methods["ema"]
    assert average.keys() == trained.state.params.keys() and all(
        v.dtype == np.float32 for v in trained.state.params.values()
    )
    assert any(
        not np.array_equal(np.asarray(average[k]), np.asarray(trained.state.params[k])) for k in trained.state.params
    )
