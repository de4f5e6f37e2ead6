"""Optimizers by name: what a factory's parameters declare, options of an optimizer's own, and one of a user's file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launch import config as recipe
from research.errors import UserError
from research.modules.axes import Kind
from research.optim import registry
from research.optim.build import make_optimizer
from research.optim.section import OptimSection, resolve, stored
from research.sections import defaults
from research.train.rundir import read_config
from tests.documents.pages import guide

ROOT = Path(__file__).parents[2]
AXES = {"up": ("s/embed", "s/layer/mlp"), "bias": ("s/layer/mlp",)}
KINDS = {"up": Kind.MATRIX, "bias": Kind.BIAS}


@pytest.fixture
def register(monkeypatch):
    """Registers for one test."""
    registry.known()
    monkeypatch.setattr(registry, "_OPTIMIZERS", dict(registry._OPTIMIZERS))
    return registry.register


def section(name, **more):
    return resolve({**defaults(OptimSection), "name": name, **more})


def first_update(name, **more):
    given = OptimSection(**section(name, **more))
    optimizer = make_optimizer(given, optax.constant_schedule(0.5), AXES, KINDS)
    params = {"up": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    return optimizer.update(params, optimizer.init(params), params)[0]


def test_parameters_of_a_factory_are_constants_options_or_told(register):
    @register("scaled", source="a test", lr=0.5)
    def scaled(axes, kinds, b1: float = 0.25, power: int = 2, by_kind: bool = False):
        def factor(name):
            return b1**power * len(axes[name]) * (3.0 if by_kind and kinds[name] is Kind.BIAS else 1.0)

        return optax.stateless(lambda grads, _: {name: g * factor(name) for name, g in grads.items()})

    own = registry.find("scaled")
    assert (own.constants, own.options, own.told) == ({"b1": 0.25}, {"power": 2, "by_kind": False}, ("axes", "kinds"))
    assert section("scaled")["options"] == {"power": 2, "by_kind": False}
    updates = first_update("scaled", b1=0.5, options={"power": 3, "by_kind": "yes"})
    np.testing.assert_array_equal(updates["up"], jnp.full((2, 3), -0.5 * 0.125 * 2))
    np.testing.assert_array_equal(updates["bias"], jnp.full(3, -0.5 * 0.125 * 3))


def test_ademamix_adds_alpha_times_the_slow_average():
    """After one update both averages are g times (1 - b), of which the fast one is corrected: g + alpha (1 - b3) g."""
    for alpha in (0.0, 6.0, 50.0):
        updates = first_update("ademamix", b3=0.99, weight_decay=0.0, options={"alpha": alpha})
        np.testing.assert_allclose(updates["up"], -0.5 * (1 + alpha * 0.01), rtol=1e-5)


def test_a_run_saved_without_options_has_the_optimizer_s_own():
    old = {**defaults(OptimSection), "name": "ademamix"}
    assert stored(old)["options"] == {"alpha": 6.0} and stored(old) == resolve(old)
    assert stored({**old, "name": "gone", "options": {"a": 1}})["options"] == {"a": 1}


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("ademamix", {"alpah": 5.0}, r"config\.optim\.options\.alpah is unknown to ademamix; near: alpha$"),
        ("adamw", {"alpha": 5.0}, r"config\.optim\.options\.alpha is unknown to adamw, which has no options$"),
        ("ademamix", {"alpha": "much"}, r"config\.optim\.options\.alpha='much'; valid: a number from 0$"),
        ("ademamix", {"alpha": -1}, r"config\.optim\.options\.alpha=-1; valid: a number from 0$"),
        ("ademamix", {"b3": 0.9}, r"options\.b3 is a field of the section: write config\.optim\.b3$"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        resolve({**defaults(OptimSection), "name": name, "options": options})


def test_what_a_factory_must_declare(register):
    def make(name, factory):
        register(name, source="a test")(factory)

    with pytest.raises(UserError, match=r"adamw of .*test_registry is there already, from research\.optim\.directions"):
        make("adamw", lambda b1=0.9: optax.identity())
    with pytest.raises(UserError, match="mine: b1 has no default"):
        make("mine", lambda b1: optax.identity())
    with pytest.raises(UserError, match=r"mine: alpha has no annotation, by which config\.optim\.options\.alpha"):
        make("mine", lambda alpha=1.0: optax.identity())
    with pytest.raises(UserError, match=r"mine: .* \*\*more takes none of a known name"):
        make("mine", lambda **more: optax.identity())


def test_a_command_line_that_chooses_another_optimizer_leaves_options_behind(tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text(
        "from tests.tiny import get_config as tiny\n\n\ndef get_config(arg=''):\n    config = tiny('all')\n"
        "    config.optim.update({'name': 'ademamix', 'momentum': None, 'options': {'alpha': 4}})\n    return config\n"
    )
    assert recipe.load(str(file), {})["optim"]["options"] == {"alpha": 4.0}
    assert recipe.load(str(file), {"optim.options.alpha": "5"})["optim"]["options"] == {"alpha": 5.0}
    assert recipe.load(str(file), {"optim.name": "adamw"})["optim"]["options"] == {}
    with pytest.raises(UserError, match=r"optim\.options\.alpha is unknown to adamw"):
        recipe.load(str(file), {"optim.name": "adamw", "optim.options.alpha": "5"})


@pytest.mark.slow
def test_an_optimizer_of_one_s_own_with_an_option_trains_by_the_command(tmp_path):
    plugin = tmp_path / "two_averages.py"
    plugin.write_text(guide("optimizer")[1])
    (tmp_path / "recipe.py").write_text("from tests.tiny_lm import get_config\n")
    flags = ("--config.optim.name=two_averages", "--config.train.duration=4", "--config.optim.options.alpha=5")

    def train(*more):
        return subprocess.run(
            [sys.executable, "-m", "launch.train", f"--plugin={plugin}", f"--config={tmp_path}/recipe.py:probe", *more],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )

    done = train(*flags, f"--workdir={tmp_path}/run")
    assert (done.returncode, done.stderr) == (0, "")
    assert read_config(tmp_path / "run")["optim"]["options"] == {"alpha": 5}
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss/full"] for row in rows if "loss/full" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    wrong = train(*flags[:2], "--config.optim.options.alpah=5", f"--workdir={tmp_path}/wrong")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "config.optim.options.alpah is unknown to two_averages; near: alpha" in wrong.stderr
