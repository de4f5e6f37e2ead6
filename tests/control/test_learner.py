"""Soft actor-critic as a learner of the harness: exact resume, signals, the report, what is refused, the numbers of the
loop that it had of its own."""

import functools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from launch import config as recipe
from research.control import runs, trained
from research.control.environments import environment
from research.control.learner import SoftActorCritic
from research.errors import UserError
from research.report.reading import load_metrics
from research.train import loop
from research.train.config import base_config, check, resolved
from research.train.extraction import Trained
from research.train.restore import restore, whole_steps
from research.train.rundir import read_config
from research.train.sections import RunConfig
from research.train.used import check_used
from tests.train.killed import Processes
from tests.train.reporter import Lines

TINY = {"hidden": 4, "depth": 1, "batch": 8, "capacity": 64, "warmup": 10, "steps": 10, "episodes": 2, "seeds": (0, 3)}


def config_of(duration="6", every="2", **options):
    config = base_config()
    config.learner = {"name": "soft_actor_critic", "options": {**TINY, **options}}
    config.train.update({"duration": duration, "log_every": "1"})
    config.eval.every = config.checkpoint.every = every
    check(config)
    config = resolved(config)
    check_used(config)
    return config


def arrays_at(workdir, step):
    learner = SoftActorCritic(RunConfig.of(read_config(workdir)))
    learner.close()
    return jax.tree.map(np.asarray, restore(workdir / "checkpoints", step, learner.wanted())[0])


def assert_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(folder, report) of a run that nothing happens to."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    return workdir, loop.train(config_of(), str(workdir), Lines())


def test_a_killed_run_ends_with_the_same_bits(reference, tmp_path):
    (whole, report), workdir, config = reference, tmp_path / "run", config_of()
    assert whole_steps(whole / "checkpoints")[-2:] == [4, 6]
    with Processes() as processes:
        processes.kill(config, workdir, at=5, saved=4)
        assert "resumed from step 4" in processes.train(config, workdir)
    assert json.loads((workdir / "report.json").read_text())["subnets"] == report["subnets"]
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert_equal(arrays_at(workdir, 6), arrays_at(whole, 6))


class Interrupting(Lines):
    def progress(self, done, total, text):
        super().progress(done, total, text)
        if len(self.steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_and_the_run_continues(reference, tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(loop.Preempted, match=r"stopped by SIGTERM at step [23]; the state is saved") as stop:
        loop.train(config_of(), str(workdir), Interrupting())
    assert whole_steps(workdir / "checkpoints")[-1] == stop.value.step
    loop.train(config_of(), str(workdir), Lines())
    assert (workdir / "metrics.jsonl").read_bytes() == (reference[0] / "metrics.jsonl").read_bytes()


def test_state_metrics_and_report_tell_one_story(reference):
    workdir, report = reference
    rows = load_metrics(workdir)
    last = [row for row in rows if "validation/return/full" in row][-1]
    by_seed = [last["validation/return/seed0"], last["validation/return/seed3"]]
    assert last["validation/return/full"] == pytest.approx(np.mean(by_seed), rel=1e-6)
    (row,) = report["subnets"]
    assert (report["metric"], report["split"], report["higher_is_better"]) == ("validation return", "validation", True)
    assert row["value"] == last["validation/return/full"] and row["least"] == pytest.approx(min(by_seed))
    assert row["params"] > 0 and row["flops"] > 0 and report["environment_steps"] == 60
    assert json.loads((workdir / "report.json").read_text())["updates"] == 6
    assert "launch.extract" not in (workdir / "report.md").read_text()
    run = arrays_at(workdir, 6)
    assert run["memory"].count.tolist() == [70, 70] and run["key"].dtype == np.uint32
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == [1, 2, 3, 4, 5, 6] and all(np.isfinite(row["loss"]) for row in losses)


def test_the_steps_of_an_update_are_those_of_several_shorter_ones(reference, tmp_path):
    report = loop.train(config_of(duration="60ex", every="50%", steps=30), str(tmp_path / "run"), Lines())
    assert report["updates"] == 2 and report["subnets"] == reference[1]["subnets"]
    assert_equal(arrays_at(tmp_path / "run", 2), arrays_at(reference[0], 6))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"expert": 2}, "learner.options.expert is unknown to soft_actor_critic; near: experts"),
        ({"experts": 0}, "learner.options.experts=0; valid: a whole number from 1"),
        ({"experts": 1.5}, "learner.options.experts=1.5; valid: a whole number from 1"),
        ({"task": "maze"}, "learner.options.task='maze'; valid: bandit, detour, pendulum"),
        ({"estimator": "best"}, "learner.options.estimator='best'; valid: frequency, frequency_best"),
        ({"gamma": 1.5}, "learner.options.gamma=1.5; valid: a number from 0 up to 1"),
        ({"seeds": (1, 1)}, r"learner.options.seeds=\[1, 1\]; valid: different whole numbers"),
        ({"steps": 0}, "learner.options.steps=0; valid: a whole number from 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        config_of(**options)


def test_settings_that_it_does_not_go_by_are_refused():
    text = "configs/control_detour.py"
    for field, value in (
        ("data.batch_size", "64"),
        ("model.depths", "(1,1)"),
        ("task.label_smoothing", "0.1"),
        ("optim.lr", "1"),
        ("data.augment.flip", "True"),
        ("train.nan", "skip"),
        ("mesh.data", "2"),
    ):
        with pytest.raises(UserError, match=r"is not read in this run, only by the learner supervised") as error:
            recipe.load(text, {field: value})
        assert "\n" not in str(error.value)
    config = recipe.load(text, {"learner.options.experts": "2", "seed": "7"})
    assert config["learner"]["options"]["experts"] == 2 and config["learner"]["options"]["gamma"] == 0.99
    with pytest.raises(UserError, match=r"train.duration='10ep': there are no epochs here"):
        SoftActorCritic(RunConfig.of(recipe.load(text, {"train.duration": "10ep"})))


def test_a_run_of_it_has_no_networks_to_extract_and_says_what_works(reference):
    words = (
        r"of the learner supervised; the run's is soft_actor_critic: .* research\.control\.trained\.actors\(WORKDIR\)"
    )
    with pytest.raises(UserError, match=words) as error:
        Trained(reference[0])
    assert "\n" not in str(error.value)


def test_the_policies_of_a_run_earn_what_the_report_says(reference):
    workdir, report = reference
    found = trained.actors(workdir)
    assert list(found) == [0, 3]
    task, state = environment("bandit"), arrays_at(workdir, 6)
    learner = SoftActorCritic(RunConfig.of(read_config(workdir)))
    run = learner.whole(state)
    for place, (seed, (config, params)) in enumerate(found.items()):
        assert config == learner.options.actor(task) and params.keys() == run.learner.trained.actor.keys()
        own = jax.tree.map(lambda v, place=place: v[place], run)
        own = own._replace(learner=own.learner._replace(trained=own.learner.trained._replace(actor=params)))
        earned, _ = runs.measure(learner.options, task, own, learner.options.episodes)
        assert float(earned) == pytest.approx(report["returns"][f"return/seed{seed}"], rel=1e-5)
    learner.close()


def test_other_options_are_another_run(reference, tmp_path):
    shutil.copytree(reference[0], tmp_path / "run")
    with pytest.raises(UserError, match=r"a run of another config \(learner.options.gamma: 0.99 -> 0.9\)"):
        loop.train(config_of(gamma=0.9), str(tmp_path / "run"), Lines())


FORMER = {
    "bandit": ({"seeds": (3, 5)}, [(0.0151776746, 0.0052703531), (0.9769299626, 0.0062402282)]),
    "detour": (
        {"seeds": (0, 7), "estimator": "gumbel"},
        [(-0.5327182412, -0.5419091582), (-0.4782311618, -0.6533045172)],
    ),
}
"""Task -> (options, mean returns of both seeds after 100 and 200 steps), as its former loop found them."""


@pytest.mark.slow
@pytest.mark.parametrize("task", FORMER)
def test_returns_are_those_of_the_former_loop(task, tmp_path):
    more, returns = FORMER[task]
    options = {"hidden": 16, "depth": 2, "batch": 32, "capacity": 500, "warmup": 50, "steps": 100, "episodes": 20}
    found = []
    make = functools.partial(SoftActorCritic, told=lambda evaluation: found.append(evaluation.returns))
    loop.train(config_of("2", "1", task=task, **options, **more), str(tmp_path / "run"), Lines(), make)
    np.testing.assert_allclose(found, returns, rtol=1e-4)


@pytest.mark.slow
def test_runs_learn_the_bandit_and_depend_on_their_own_seed_alone(tmp_path):
    options = {"hidden": 16, "depth": 2, "batch": 64, "capacity": 2000, "warmup": 200, "steps": 600, "episodes": 20}
    both = loop.train(config_of("2", "1", **options, seeds=(3, 5)), str(tmp_path / "both"), Lines())
    assert both["subnets"][0]["least"] > 0.7 and both["environment_steps"] == 1200
    loop.train({**config_of("2", "1", **options, seeds=(0,)), "seed": 5}, str(tmp_path / "alone"), Lines())
    one, two = arrays_at(tmp_path / "alone", 2), arrays_at(tmp_path / "both", 2)
    np.testing.assert_array_equal(one["key"][0], two["key"][1])
    for name, array in one["learner"].trained.actor.items():
        np.testing.assert_allclose(array[0], two["learner"].trained.actor[name][1], rtol=0.1, atol=0.05)


def test_what_a_run_would_be_is_told_without_compiling(reference):
    learner = SoftActorCritic(RunConfig.of(config_of()))
    found = learner.foresee()
    learner.close()
    actor, critics = found.networks
    row = reference[1]["subnets"][0]
    assert (actor["params"], actor["flops"]) == (row["params"], row["flops"])
    assert critics["params"] == reference[1]["critic_params"]
    assert found.updates == 6 and len(found.programs) == reference[1]["programs_bound"]
    assert found.flops == reference[1]["train_flops"] and found.floor_s > 0
    held = jax.tree.leaves(arrays_at(reference[0], 6))
    assert found.bytes == {"state": sum(array.nbytes for array in held)}
    assert not learner.compiler.compiled
