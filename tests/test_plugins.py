"""What a user brings, one file a component, outside of the repository: it is trained, killed, resumed, evaluated,
extracted and exported."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launch import config as recipe
from research.bench.case import BOTH, FORWARD
from research.data import registry as data_sets
from research.data.kinds import Plain
from research.data.source import Source
from research.data.sources import load_splits
from research.errors import UserError
from research.interop.safetensors_io import load_safetensors
from research.modules.mixers import base
from research.modules.state import apply
from research.plugins import load
from research.report.tables import read_csv
from research.tasks import registry as tasks
from research.train.extraction import Trained
from research.train.loop import train
from research.train.restore import whole_steps
from research.train.setup import make_setup
from tests.documents.pages import GUIDES, guide
from tests.train.reporter import Lines

ROOT = Path(__file__).resolve().parents[1]

LANGUAGE = """
from tests.tiny_lm import get_config as tiny


def get_config(arg="probe"):
    config = tiny(arg)
    config.model.pattern = "average"
    config.model.depth = 2
    config.methods = ("all", "magnitude")
    config.method.magnitude = {"until": 6, "every": 2}
    config.optim.update({"name": "signum", "lr": 1e-3, "momentum": None})
    config.train.duration = "24"
    config.checkpoint.every = "4"
    return config
"""
PICTURES = """
from tests.tiny import get_config as tiny


def get_config(arg="directions"):
    config = tiny("all")
    config.model = {"name": "perceptron"}
    config.data.name = arg
    config.data.augment = {}
    config.train.duration = "24"
    return config
"""
CASES = {"language": (LANGUAGE, ("mixer", "method", "optimizer")), "pictures": (PICTURES, ("model", "task"))}
"""Recipe, and the components that its run needs beside."""


def command(name, *flags, check=True):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{name}", *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert not check or (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done


def brought(folder, recipe, parts):
    """Writes one file for each component, as the guide to it has it, and one for the recipe; returns the flags."""
    (folder / "recipe.py").write_text(recipe)
    for part in parts:
        (folder / f"my_{part}.py").write_text(guide(part)[0])
    assert len(list(folder.iterdir())) == 1 + len(parts)  # files touched to add all of them
    return [f"--plugin={folder}/my_{part}.py" for part in parts]


def kill_at(step, train, workdir):
    process = subprocess.Popen(train, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while step not in whole_steps(workdir / "checkpoints"):  # the folder itself is there before the save has ended
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_file_for_each_is_enough(name, tmp_path):
    recipe, parts = CASES[name]
    mine = brought(tmp_path, recipe, parts)
    flags = (*mine, f"--config={tmp_path}/recipe.py")
    command("train", *flags, f"--workdir={tmp_path}/whole")
    killed = tmp_path / "killed"
    kill_at(4, [sys.executable, "-m", "launch.train", *flags, f"--workdir={killed}"], killed)
    assert "resumed from step" in command("train", *flags, f"--workdir={killed}").stdout
    for run in ("whole", "killed"):
        command("extract", *mine, f"--workdir={tmp_path}/{run}", "--subnet=s", f"--out={tmp_path}/{run}_s")
    whole, resumed = (load_safetensors(tmp_path / f"{run}_s" / "model.safetensors") for run in ("whole", "killed"))
    assert whole.keys() == resumed.keys() and all(np.array_equal(whole[k], resumed[k]) for k in whole)
    if "method" in parts:  # the masks of the full network's inputs, half of which are 0, are baked in
        assert 0.3 < np.mean([value == 0 for key, value in whole.items() if key.endswith("/input")]) < 0.7
    command("evaluate", *mine, f"--workdir={killed}", f"--out={tmp_path}/table.csv")
    assert (tmp_path / "table.csv").read_text().count("\n") >= 3
    command("export", *mine, f"--workdir={tmp_path}/whole_s", "--format=stablehlo", f"--out={tmp_path}/model.stablehlo")
    assert (tmp_path / "model.stablehlo").stat().st_size > 1000
    without = command("evaluate", f"--workdir={killed}", check=False)
    assert (without.returncode, without.stderr.count("\n")) == (2, 1)


@pytest.mark.slow
def test_what_a_mixer_of_one_s_own_declares_is_logged(tmp_path):
    """The rates start at sigmoid(2): averages over 1 + e^2 = 8.4 tokens."""
    blocks = guide("mixer")
    (told,) = (block for block in blocks if "StatKind.LOG" in block)
    whole = blocks[0].replace("return AverageMixer(", "return LoggedMixer(") + told
    (tmp_path / "my_mixer.py").write_text(whole)
    (tmp_path / "recipe.py").write_text(LANGUAGE.replace('("all", "magnitude")', '("all",)').replace("signum", "adamw"))
    flags = (f"--plugin={tmp_path}/my_mixer.py", f"--config={tmp_path}/recipe.py", "--config.train.duration=4")
    command("train", *flags, f"--workdir={tmp_path}/run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "loss/full" in row]
    assert [row["step"] for row in updates] == [1, 2, 3, 4]
    for layer in ("layer0", "layer1"):
        assert updates[0][f"average/{layer}/shortest"] == pytest.approx(1 + np.exp(2), rel=1e-5)
        assert updates[0][f"average/{layer}/shortest"] == updates[0][f"average/{layer}/longest"]
        assert updates[-1][f"average/{layer}/shortest"] < updates[-1][f"average/{layer}/longest"]


@pytest.mark.slow
def test_a_data_set_of_one_s_own_is_trained_on(tmp_path):
    mine = brought(tmp_path, PICTURES, ("data", "model"))
    own = ("--config.data.options.period=1", "--config.train.duration=4")
    command("train", *mine, f"--config={tmp_path}/recipe.py:stripes", *own, f"--workdir={tmp_path}/run")
    assert "test accuracy" in (tmp_path / "run/report.md").read_text()


@pytest.mark.slow
def test_a_benchmark_case_of_one_s_own_is_timed_and_judged(tmp_path):
    file = tmp_path / "my_benchmark.py"
    file.write_text(guide("benchmark")[0])
    mine, csv = f"--plugin={file}", f"--csv={tmp_path}/out/table.csv"
    command("bench", mine, "--op=running_sum", "--shapes=512x64 | forward", csv)
    rows = read_csv(tmp_path / "out/table.csv")
    assert [(row["direction"], row["contender"]) for row in rows] == [
        (direction, contender) for direction in (FORWARD, BOTH) for contender in ("ours", "naive", "xla")
    ]
    # forward: 512 * 64 numbers are read and as many written; with gradients, a cotangent and a gradient beside
    assert [row["num_bytes"] for row in rows[::3]] == [4 * 2 * 512 * 64, 4 * 4 * 512 * 64]
    judged = command("bench", mine, "--suite=running_sum", "--shapes=512x64", csv, check=False)
    assert judged.returncode in (0, 1) and "[1/1]" in judged.stdout  # whether it is faster is the machine's affair
    (threshold,) = read_csv(tmp_path / "out/table_thresholds.csv")
    assert threshold["met"] == ("no" if judged.returncode else "yes") and threshold["asked"] == "at least 1"


@pytest.fixture
def directions(tmp_path, monkeypatch):
    """The config of a run over the data set and the task of the guide to tasks, known for the length of a test: the
    source tells the symmetry of its pictures, by which the task measures angles."""
    data_sets.find("digits")  # which imports all of them
    monkeypatch.setattr(data_sets, "_SETS", dict(data_sets._SETS))
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks.known()))
    (tmp_path / "directions.py").write_text(guide("task")[0])
    load(str(tmp_path / "directions.py"))
    config = recipe.load("tests/tiny.py:full", {"train.duration": "1", "optim.warmup": "0", "eval.every": "0"})
    config["data"] |= {"name": "directions", "augment": {}}
    config["nested"]["points"] = {}
    yield config
    sys.modules.pop("plugin_directions")


def test_a_task_reads_what_its_own_source_tells_and_its_run_is_evaluated_without_the_data(
    directions, tmp_path, monkeypatch
):
    train(directions, str(tmp_path / "run"), Lines())
    stored = json.loads((tmp_path / "run/data.json").read_text())
    assert stored["attributes"] == {"name": "directions/train", "symmetry": 2}
    block = load_splits("directions")["test"].gather(np.arange(128))

    def gone(**options):
        raise UserError("the pictures are gone")

    known = data_sets.find("directions")[0]
    monkeypatch.setitem(data_sets._SETS, "directions", dataclasses.replace(known, loader=gone))
    opened = Trained(tmp_path / "run")
    task, (config, params, stats) = opened.setup.task, opened.model("full")
    opened.programs.close()
    assert task.symmetry == 2
    outputs = apply(config, params, stats, block["picture"], mode="eval")[0]
    found = task.summarize(task.sums(outputs, block))["degrees"]
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert found == pytest.approx(report["subnets"][0]["value"], rel=1e-4) and 0 < found < 90
    with pytest.raises(UserError, match="the pictures are gone"):
        opened.setup.splits  # noqa: B018


def test_what_a_source_does_not_tell_or_cannot_is_named(directions, monkeypatch):
    source = type(load_splits("directions")["train"])
    monkeypatch.setattr(source, "facts", Source.facts)
    with pytest.raises(UserError, match=r"directions/train tells no 'symmetry', .*; return it from `facts`"):
        make_setup(directions)
    monkeypatch.setattr(source, "facts", lambda self: {"symmetry": self.angles[:2]})
    with pytest.raises(UserError, match=r"directions/train: the fact symmetry is array.*; valid: finite numbers"):
        make_setup(directions)
    monkeypatch.setattr(source, "facts", lambda self: {"symmetry": np.int64(4)})
    task = make_setup(directions).task
    assert (task.symmetry, type(task.symmetry)) == (4, int)
    known = dataclasses.replace(data_sets.find("directions")[0], loader=lambda: {"train": Plain()})
    monkeypatch.setitem(data_sets._SETS, "directions", known)
    with pytest.raises(UserError, match="data set directions: Plain is no source; derive it from"):
        load_splits("directions")
    with pytest.raises(UserError, match="examples='image' is no kind; give IMAGE"):
        data_sets.register("pictures", "image")


@pytest.mark.slow
def test_a_learner_of_one_s_own_is_trained_and_repeated(tmp_path):
    """From a distance of sqrt(8) = 2.8."""
    file, recipe = tmp_path / "my_learner.py", tmp_path / "my_evolution.py"
    for path, block in zip((file, recipe), guide("learner"), strict=True):
        path.write_text(block)
    flags = (f"--plugin={file}", f"--config={recipe}")
    for run in ("one", "again"):
        command("train", *flags, f"--workdir={tmp_path}/{run}")
    one, again = (json.loads((tmp_path / run / "report.json").read_text())["subnets"] for run in ("one", "again"))
    assert one == again and 0 < one[0]["value"] < 0.1
    refused = command("evaluate", flags[0], f"--workdir={tmp_path}/one", check=False)
    assert refused.returncode == 2 and "for runs of the learner supervised; the run's is evolution" in refused.stderr


def test_every_component_has_a_guide_whose_file_is_tried_here():
    assert set(GUIDES) == {part for _, parts in CASES.values() for part in parts} | {"data", "benchmark", "learner"}


def test_files_that_are_no_plugin(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(str(tmp_path / "none.py"))
    broken = tmp_path / "broken.py"
    broken.write_text("import os\n1 / 0\n")
    with pytest.raises(UserError, match="broken.py cannot be imported in line 2: ZeroDivisionError"):
        load(str(broken))
    mixer, late = guide("mixer")[0], tmp_path / "late.py"
    late.write_text(mixer)
    assert "average" not in base.known()
    with pytest.raises(UserError, match="mixer average comes too late"):
        load(str(late))
    again = tmp_path / "again.py"
    again.write_text(mixer.replace('"average"', '"hgrn"'))
    with pytest.raises(
        UserError, match=r"mixer hgrn is registered twice, by research\.modules\.mixers\.hgrn and by plugin_again"
    ):
        load(str(again))
