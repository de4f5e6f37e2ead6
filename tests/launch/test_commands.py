"""The commands: help, overrides, and what a user's mistake gets."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import common
from launch import config as recipe
from research.errors import UserError

COMMANDS = sorted(path.stem for path in Path(common.__file__).parent.glob("*.py") if "common.run(" in path.read_text())
HEAVY = {"jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "matplotlib", "sklearn"}


def run(*args, timeout=120):
    return subprocess.run([sys.executable, "-m", *args], capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("name", COMMANDS)
def test_helpshort_answers_before_anything_heavy_is_imported(name):
    command = [sys.executable, "-X", "importtime", "-m", f"launch.{name}", "--helpshort"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert "python -m launch" in out.stdout and "--" in out.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in out.stderr.splitlines() if line.startswith("import time:")}
    assert "absl" in imported and not imported & HEAVY


def one_line(out):
    assert out.returncode == 2, out.stdout + out.stderr
    assert out.stderr.startswith("error: ") and out.stderr.count("\n") <= 2 and "Traceback" not in out.stderr
    return out.stderr


def test_mistakes_of_flags(tmp_path):
    assert "near: --workdir" in one_line(run("launch.train", "--workdri=x"))
    assert "--config and --workdir are needed" in one_line(run("launch.train"))
    assert "near: configs/quickstart.py" in one_line(
        run("launch.train", "--config=configs/quikstart.py", f"--workdir={tmp_path}")
    )
    assert "holds no run" in one_line(run("launch.evaluate", f"--workdir={tmp_path}"))
    assert "STATE from 1, e.g. 64x16" in one_line(
        run("launch.train", "--config=configs/mqar.py:64x0", f"--workdir={tmp_path}")
    )
    assert "unknown task 'maze'; valid: bandit" in one_line(run("launch.control", "--task=maze"))
    assert "--seeds=a; valid: whole numbers" in one_line(run("launch.control", "--seeds=a"))
    assert "holds no run" in one_line(run("launch.customise", f"--workdir={tmp_path}"))
    assert "no model matches" in one_line(run("launch.models", "resnext*"))


def test_print_config_checks_the_model_s_fields_without_data():
    """The data set is not there, and its number of classes, which the model has from it, is not asked for."""
    command = ("launch.train", "--config=configs/quickstart.py", "--print_config", "--config.data.name=tfds:not_there")
    done = run(*command, "--config.model.dims=(8, 16, 32, 64)")
    assert done.returncode == 0 and json.loads(done.stdout)["model"]["dims"] == [8, 16, 32, 64]
    assert "model unireplknet_a has no field 'dimz'; near: dims" in one_line(run(*command, "--config.model.dimz=3"))
    assert "model.dims=3; valid" in one_line(run(*command, "--config.model.dims=3"))


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.durations=3", "unknown config field config.train.durations; near: config.train.duration"),
        ("nestd.scheme=all", "unknown config field config.nestd; near: config.nested"),
        ("nested.points=w50", "set --config.nested.points.NAME=width=0.5"),
        ("train.accumulate=many", "config.train.accumulate='many'; valid: a whole number from 1"),
        ("report.latency_batches=5", "config.report.latency_batches=5; valid: a list of whole numbers from 1"),
        ("model.stem_strides=8", "model.stem_strides=8; valid: (a whole number, a whole number)"),
        ("nested.scheme=sorted", "config.nested.scheme is said otherwise now: config.methods"),
        ("methods=sort", "unknown method 'sort'; near: sorted"),
        ("method.sandwich.distill=1.5", "method.sandwich.distill=1.5; valid: a number from 0 up to 1"),
        ("data.name=fashion_mist", "fashion_mnist"),
        ("data.name=idx", "data_dir"),
        ("model.name=unireplknet_z", "unknown model 'unireplknet_z'; near: unireplknet"),
        (
            "data.name=counting",
            "config.data.augment={'mean': [0.3], 'std': [0.37]} is not read in this run, "
            "only by data sets of labelled images",
        ),
        ("model.name=hmode", "model hmode does not predict labels, tokens or vectors, which data set digits asks for"),
        ("model.dept=3", "has no field 'dept'; near: depths"),
        ("model.stem_strides=(8,8)", "images of 8 pixels are smaller than the total stride"),
        ("nested.points.w50=width=1.5", "width=1.5 is outside its space"),
        ("nested.points.w50=hight=0.5", "unknown sub-network dimension 'hight'; valid: width"),
        ("nested.points.w50=kernel=5", "kernel=5 is outside its space"),
        ("train.duration=3weeks", "config.train.duration='3weeks'; valid: a duration: 500 (updates), '10ep'"),
        ("mesh.tensor=3", "does not fit 1 devices"),
        ("data.batch_size=7", "7 does not divide into 4 microbatches"),
    ],
)
def test_mistakes_of_a_config(override, words, tmp_path):
    from research.train.build import make_programs
    from research.train.setup import make_setup

    field, _, value = override.partition("=")
    extra = {"methods": "sorted"} if field == "data.batch_size" else {}
    with pytest.raises(UserError) as error:
        make_programs(make_setup(recipe.load("configs/quickstart.py", {field: value, **extra})))
    assert words in str(error.value) and str(error.value).count("\n") <= 1


def test_a_model_of_labels_does_not_count():
    from research.train.setup import make_setup

    with pytest.raises(
        UserError, match="lenet5 does not predict density maps, which data set counting asks for; choose hmode"
    ):
        make_setup(recipe.load("configs/customise.py", {"data.name": "counting"}))


def test_overrides_reach_fields_of_all_types():
    config = recipe.load(
        "configs/quickstart.py",
        {
            "seed": "3",
            "optim.lr": "1",
            "methods": "sandwich,ema",
            "method.ema.decay": "0.5",
            "model.layer_scale_init_value": "0.25",
            "report.latency": "false",
        },
    )
    assert config["seed"] == 3 and config["optim"]["lr"] == 1.0 and isinstance(config["optim"]["lr"], float)
    assert config["method"]["ema"] == {"decay": 0.5} and config["methods"] == ["sandwich", "ema"]
    assert config["model"]["layer_scale_init_value"] == 0.25 and config["report"]["latency"] is False


def test_models_lists_counts(tmp_path):
    out = run("launch.models", "unireplknet_[at]", f"--csv={tmp_path / 'm.csv'}", timeout=200)
    assert out.returncode == 0, out.stderr
    text = (tmp_path / "m.csv").read_text()
    assert "4649060,4437300,1279687040" in text.replace(" ", "") and "31693420,31037980" in text


@pytest.mark.slow
def test_sweep_trains_two_at_a_time_and_continues_where_it_stopped(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat; " * 200)
    command = [
        "launch.sweep",
        "--config=tests/tiny_lm.py:full",
        f"--config.data.dir={text}",
        "--config.train.duration=4",
        "--jobs=2",
    ]
    command += [
        "--grid=model.dim=16,32",
        "--grid=model.depth=1,2",
        f"--workdir={tmp_path / 'runs'}",
        f"--out={tmp_path / 'out'}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None and len(list((tmp_path / "runs").glob("*/metrics.jsonl"))) < 2:
        time.sleep(0.05)
    process.terminate()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "stopped by SIGTERM" in out, out
    done = run(*command, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 runs" in done.stdout
    with open(tmp_path / "out" / "sweep.csv", encoding="utf-8") as file:
        rows = [line.split(",") for line in file if not line.startswith("#")]
    assert [row[:2] for row in rows[1:]] == [["16", "1"], ["16", "2"], ["32", "1"], ["32", "2"]]
    again = run(*command, timeout=120)
    assert again.returncode == 0 and again.stdout.count("finished before") == 4
    assert "holds a run of another config (train.duration" in one_line(run(*command, "--config.train.duration=5"))


@pytest.mark.slow
def test_a_sweep_continues_past_what_fails_and_tells_why(tmp_path):
    command = [
        "launch.sweep",
        "--config=tests/tiny.py:full",
        "--config.train.duration=4",
        "--config.eval.every=0",
        "--jobs=2",
        "--grid=optim.lr=0.02,1e30",
        "--grid=seed=0,1",
        f"--workdir={tmp_path}",
    ]
    done = run(*command, timeout=300)
    assert done.returncode == 1 and "2 of 4 runs failed" in done.stdout and "plot: " in done.stdout, (
        done.stdout + done.stderr
    )
    table = (tmp_path / "sweep.csv").read_text()
    assert table.count("not finite") == 2 and (tmp_path / "optim.lr=0.02_seed=1" / "report.json").is_file()
    assert "Means over the seeds" in (tmp_path / "sweep.md").read_text() and (tmp_path / "against.png").is_file()
    again = run(*command, timeout=300)
    assert again.stdout.count("finished before") == 2 and again.returncode == 1
