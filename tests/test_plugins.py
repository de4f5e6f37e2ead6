"""What a user brings in one file of their own, outside of the repository: it is trained, killed, resumed, evaluated,
extracted and exported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from research.errors import UserError
from research.interop.safetensors_io import load_safetensors
from research.modules.mixers import base
from research.plugins import load

ROOT = Path(__file__).resolve().parents[1]

MIXER = '''
"""An exponential moving average over the sequence, one learned rate a channel."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from research.modules.axes import Kind
from research.modules.mixers.base import Spec, register
from research.ops.linear_recurrence import linear_recurrence


@register
@dataclass(frozen=True)
class Average(Spec):
    start: float = 2.0

    kind: ClassVar[str] = "average"
    paper: ClassVar[str] = "a note of mine"

    def build(self, dim, length, scope, init, form):
        return Mixer(self, dim, init)


class Mixer(nnx.Module):
    def __init__(self, spec, dim, init):
        self.rate = init.param("rate", (dim,), ("embed",), jax.nn.initializers.constant(spec.start), Kind.CONSTANT)

    def __call__(self, x, call, state=None):
        rate = jax.nn.sigmoid(self.rate[...])
        keep = jnp.broadcast_to(rate, x.shape)
        if call.segment_ids is not None:
            keep = jnp.where(jnp.diff(call.segment_ids, axis=1, prepend=-2)[..., None] != 0, 0.0, keep)
        y, last = linear_recurrence(keep, (1 - rate) * x, None if state is None else state["mean"])
        return y, {"mean": last}

    def step(self, x, call, state):
        rate = jax.nn.sigmoid(self.rate[...])
        mean = rate * state["mean"] + (1 - rate) * x
        return mean, {"mean": mean}

    def init_state(self, batch, capacity, dtype):
        return {"mean": jnp.zeros((batch, self.rate.shape[0]), dtype)}
'''

MODEL = '''
"""A perceptron with one hidden layer on images."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
from flax import nnx

from research.models.base import ModelConfig
from research.models.registry import Entry, register
from research.modules import elastic
from research.modules.layers import Linear


@dataclass(frozen=True)
class PerceptronConfig(ModelConfig):
    hidden: int = 64
    num_classes: int = 10
    in_channels: int = 1
    image_size: int = 8

    family: ClassVar[str] = "perceptron"
    elastic: ClassVar[dict[str, str]] = {"width": "fraction of the hidden units"}

    def build(self, init):
        return Perceptron(self, init)

    def input_shape(self):
        return (self.image_size, self.image_size, self.in_channels)

    def shrink(self, *, width=1.0):
        return replace(self, hidden=elastic.scaled(self.hidden, width, 8, "width"))


class Perceptron(nnx.Module):
    def __init__(self, config, init):
        size = config.image_size**2 * config.in_channels
        self.hidden = Linear(size, config.hidden, ("input", "mlp"), init.child("hidden"))
        self.head = Linear(config.hidden, config.num_classes, ("mlp", "classes"), init.child("head"))

    def __call__(self, x, *, mode="eval", key=None):
        return self.head(jax.nn.relu(self.hidden(x.reshape(x.shape[0], -1))))


register(Entry("perceptron", PerceptronConfig(), "nobody", "a note of mine", {"hidden": 16}))
'''


def command(name, *flags, check=True):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{name}", *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert not check or (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done


DATA = '''
"""Images of stripes, upright or level."""

import numpy as np

from research.data.registry import register
from research.data.source import arrays_to_sources


@register("stripes", "image", ready=False)
def load_stripes(*, period: int = 2):
    def images(count, seed):
        rng = np.random.Generator(np.random.Philox(seed))
        labels = rng.integers(0, 2, count).astype(np.int32)
        stripes = np.where(np.arange(8) % (2 * period) < period, 255, 0)
        upright = np.broadcast_to(stripes, (8, 8))
        pixels = np.where(labels[:, None, None], upright, upright.T)
        return np.clip(pixels + rng.normal(0, 50, (count, 8, 8)), 0, 255).astype(np.uint8)[..., None], labels

    return arrays_to_sources("stripes", images(320, 0), images(80, 1), 2)
'''

OPTIMIZER = '''
"""The sign of a moving average."""

import jax
import jax.numpy as jnp
import optax

from research.optim.directions import register
from research.optim.fields import Optimizer


@register("signum", Optimizer({"b1": 0.9}, "Bernstein et al. 2018, arXiv 1802.04434", lr=1e-3))
def signum(b1):
    return optax.chain(optax.ema(b1, debias=False), optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates)))
'''

RECIPE = """
from tests.tiny import get_config as tiny


def get_config(arg="all"):
    config = tiny(arg)
    config.model = {"name": "perceptron"}
    return config
"""
CASES = {
    "mixer": (
        MIXER,
        ["--config=tests/tiny_lm.py:probe", "--config.model.pattern=average", "--config.train.duration=24"],
    ),
    "data": (DATA, ["--config=tests/tiny.py", "--config.data.name=stripes", "--config.data.options.period=1"]),
    "optimizer": (OPTIMIZER, ["--config=tests/tiny.py", "--config.optim.name=signum", "--config.optim.lr=1e-3"]),
    "model": (MODEL, ["--config={folder}/recipe.py"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_file_is_enough(name, tmp_path):
    source, fields = CASES[name]
    plugin = tmp_path / f"my_{name}.py"
    plugin.write_text(source)
    mine = f"--plugin={plugin}"
    (tmp_path / "recipe.py").write_text(RECIPE)
    fields = [
        *(field.format(folder=tmp_path) for field in fields),
        "--config.checkpoint.every=4",
        "--config.train.log_every=1",
    ]
    command("train", mine, *fields, f"--workdir={tmp_path}/whole")
    killed = tmp_path / "killed"
    train = [sys.executable, "-m", "launch.train", mine, *fields, f"--workdir={killed}"]
    process = subprocess.Popen(train, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "checkpoints" / "4").is_dir():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    command("train", mine, *fields, f"--workdir={killed}")
    for run in ("whole", "killed"):
        command("extract", mine, f"--workdir={tmp_path}/{run}", "--subnet=s", f"--out={tmp_path}/{run}_s")
    whole, resumed = (load_safetensors(tmp_path / f"{run}_s" / "model.safetensors") for run in ("whole", "killed"))
    assert whole.keys() == resumed.keys() and all(np.array_equal(whole[k], resumed[k]) for k in whole)
    command("evaluate", mine, f"--workdir={killed}", f"--out={tmp_path}/table.csv")
    assert (tmp_path / "table.csv").read_text().count("\n") >= 3
    command("export", mine, f"--workdir={tmp_path}/whole_s", "--format=stablehlo", f"--out={tmp_path}/model.stablehlo")
    assert (tmp_path / "model.stablehlo").stat().st_size > 1000
    without = command("evaluate", f"--workdir={killed}", check=False)
    assert (without.returncode, without.stderr.count("\n")) == (
        (0, 0) if name == "optimizer" else (2, 1)
    )  # whose state is not read


def test_files_that_are_no_plugin(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(str(tmp_path / "none.py"))
    broken = tmp_path / "broken.py"
    broken.write_text("import os\n1 / 0\n")
    with pytest.raises(UserError, match="broken.py cannot be imported in line 2: ZeroDivisionError"):
        load(str(broken))
    late = tmp_path / "late.py"
    late.write_text(MIXER)
    assert "average" not in base.known()
    with pytest.raises(UserError, match="mixer average comes too late"):
        load(str(late))
    again = tmp_path / "again.py"
    again.write_text(MIXER.replace('"average"', '"hgrn"'))
    with pytest.raises(
        UserError, match=r"mixer hgrn of plugin_again is there already, from research\.modules\.mixers\.hgrn"
    ):
        load(str(again))
