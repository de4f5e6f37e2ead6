"""Python in the documents runs as it stands; complete files of the guides work as plugins."""

import json
import os
import subprocess
import sys

import pytest

from tests.documents.pages import DOCUMENTS, GUIDES, ROOT, guide, name, python_blocks

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def run(*args, folder):
    done = subprocess.run(
        [sys.executable, *args], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def saved(folder):
    """The complete files of the guides in a folder: name -> path."""
    paths = {}
    for part in GUIDES:
        paths[part] = folder / f"my_{part}.py"
        paths[part].write_text(guide(part)[0])
    return paths


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_python_can_be_parsed(path):
    for block in python_blocks(path.read_text()):
        compile(block, str(path), "exec")


def test_readme_runs(tmp_path):
    (block,) = python_blocks((ROOT / "README.md").read_text())
    assert run("-c", block, folder=tmp_path).splitlines()[-2:] == ["25557032", "(8, 10) (8, 10)"]


REGISTERED = """
from research import plugins
for file in {files}:
    plugins.load(file)
from research.data.sources import load_splits
from research.models import registry
from research.optim.registry import known
from research.tasks.registry import find
from research.train import learner_registry
from research.train.method_registry import make
found = registry.model_info("average_small")["paper"], registry.model_info("perceptron")["params"]
print(*found, "signum" in known(), "evolution" in learner_registry.known())
print({{split: len(source) for split, source in load_splits("stripes", period=1).items()}})
task = find("", "direction", "directions")
print(f"{{task.__module__}}.{{task.__name__}}", make("magnitude", {{"sparsity": 0.8}}))
"""


def test_files_of_the_guides_register_what_they_add(tmp_path):
    files = [str(path) for path in saved(tmp_path).values()]
    out = run("-c", REGISTERED.format(files=files), folder=ROOT).splitlines()
    assert out[0] == f"a note of mine {64 * 64 + 64 + 64 * 10 + 10} True True"
    assert out[1] == "{'train': 288, 'validation': 32, 'test': 80}"
    assert out[2] == "plugin_my_task.Direction Magnitude(sparsity=0.8, until=100, every=10)"


@pytest.mark.slow
def test_getting_started_runs(tmp_path):
    blocks = python_blocks((ROOT / "docs/getting-started.md").read_text())
    order = [blocks[1], blocks[0], *blocks[2:]]  # the process is set up before JAX is imported
    run("-c", "\n".join([*order, "assert logits.shape == half(images).shape == (64, 10)"]), folder=tmp_path)
    given = ("--config.data.name=arrays", f"--config.data.options.file={tmp_path}/my_images.npz")
    short = ("--config.train.duration=6", "--config.method.sandwich.count=2", "--config.report.latency=False")
    flags = (*given, *short, f"--workdir={tmp_path}/run")
    run("-m", "launch.train", "--config=configs/quickstart.py", *flags, folder=ROOT)
    load = [*order, f"print(trained('{tmp_path}/run', 'w50')(images).shape)"]
    assert run("-c", "\n".join(load), folder=tmp_path).splitlines()[-1] == "(64, 10)"


@pytest.mark.slow
def test_the_mixer_of_the_guide_passes_the_checks_and_trains(tmp_path):
    plugin = saved(tmp_path)["mixer"]
    test = tmp_path / "test_my_mixer.py"
    test.write_text(guide("mixer")[1])
    assert "3 passed" in run("-m", "pytest", str(test), folder=ROOT)
    small = ("--config.model.dim=32", "--config.model.ffn_dim=64", "--config.data.options.max_bytes=100000")
    flags = ("--config=configs/lm_quickstart.py", "--config.model.pattern=average", "--config.train.duration=4", *small)
    run("-m", "launch.train", f"--plugin={plugin}", *flags, f"--workdir={tmp_path}/run", folder=ROOT)
    written = ("--prompt=def ", "--num_tokens=4", f"--workdir={tmp_path}/run")
    assert "tokens 4" in run("-m", "launch.generate", f"--plugin={plugin}", *written, folder=ROOT)


@pytest.mark.slow
def test_the_method_of_the_guide_passes_its_test(tmp_path):
    saved(tmp_path)
    test = tmp_path / "test_my_method.py"
    test.write_text(guide("method")[1])
    assert "2 passed" in run("-m", "pytest", str(test), folder=ROOT)


@pytest.mark.slow
def test_the_task_of_the_guide_learns(tmp_path):
    """Guessing is 45 degrees off."""
    plugin = saved(tmp_path)["task"]
    (tmp_path / "my_directions.py").write_text(guide("task")[1])
    flags = (f"--plugin={plugin}", f"--config={tmp_path}/my_directions.py", "--config.report.latency=False")
    assert "picture  float32[64, 8, 8, 1]" in run("-m", "launch.train", *flags, "--dry_run", folder=ROOT)
    run("-m", "launch.train", *flags, f"--workdir={tmp_path}/run", folder=ROOT)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["metric"] == "test degrees" and all(row["value"] < 20 for row in report["subnets"])


@pytest.mark.slow
def test_the_recipe_of_the_guide_trains(tmp_path):
    plugin = saved(tmp_path)["model"]
    (tmp_path / "my_recipe.py").write_text(guide("model")[1])
    flags = (f"--plugin={plugin}", f"--config={tmp_path}/my_recipe.py", "--config.train.duration=4")
    run("-m", "launch.train", *flags, f"--workdir={tmp_path}/run", folder=ROOT)
    found = run("-m", "launch.select", flags[0], f"--workdir={tmp_path}/run", "--max_params=5000", folder=ROOT)
    assert "w50" in found or "w25" in found
