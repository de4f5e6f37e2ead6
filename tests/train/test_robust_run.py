"""Robust training through the loop: alternation, exact resume in the middle of a round, robust accuracies, mistakes."""

import json
import shutil

import jax
import numpy as np
import pytest

from launch import config as recipe
from research.errors import UserError
from research.train import loop
from research.train.attack_checks import check_pixels
from research.train.durations import to_steps
from research.train.extraction import Trained
from research.train.setup import make_setup
from tests.train.reporter import Lines


def tiny(arg="alternate", **overrides):
    return recipe.load(f"tests/tiny_robust.py:{arg}", {k.replace("__", "."): str(v) for k, v in overrides.items()})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run of eight updates: (workdir, report)."""
    workdir = tmp_path_factory.mktemp("robust") / "run"
    return workdir, loop.train(tiny(), str(workdir), Lines())


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final_params(workdir):
    trained = Trained(workdir)
    trained.programs.close()
    return {k: np.asarray(v) for k, v in trained.state.params.items()}


def test_report_holds_robust_accuracies_and_the_phases_are_logged(whole):
    workdir, report = whole
    row = report["subnets"][0]
    assert report["metric"] == "test robust_accuracy" and report["programs"] <= report["programs_bound"] == 4 + 2
    assert {"accuracy", "clean_accuracy", "robust_pgd1", "robust_apgd_dlr", "expert_0", "expert_1"} <= set(row)
    assert row["robust_apgd_dlr"] <= row["clean_accuracy"] and row["value"] <= row["accuracy"]
    assert (70 * row["robust_pgd1"]) % 1 == pytest.approx(0, abs=1e-9)  # of 70 images, not of whole batches
    assert row["expert_0"] + row["expert_1"] == pytest.approx(1)
    records = {m["step"]: m for m in metrics_of(workdir) if "loss" in m}
    assert all(
        ("loss_experts" in records[s], "loss_router" in records[s]) == (bool(s % 2), not s % 2) for s in range(1, 9)
    )
    assert all(np.isfinite(m["loss"]) for m in records.values())
    validation = [m for m in metrics_of(workdir) if "validation/robust_accuracy/full" in m]
    assert [m["step"] for m in validation] == [4, 8] and "validation/expert_1/full" in validation[0]


@pytest.mark.slow
def test_run_resumed_in_the_middle_of_a_round_ends_with_the_same_bits(whole, tmp_path):
    reference, _ = whole
    workdir = tmp_path / "resumed"
    shutil.copytree(reference, workdir)
    for step in ("8", "6"):
        shutil.rmtree(workdir / "checkpoints" / step)
    lines = Lines()
    loop.train(tiny(), str(workdir), lines)
    assert "resumed from step 3" in lines.said
    ours, theirs = final_params(workdir), final_params(reference)
    assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)
    assert (workdir / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_phase_moves_its_own_parameters_and_leaves_the_others_bits(tmp_path):
    run = loop.Run(tiny(), str(tmp_path / "run"), Lines())
    run.step, run.state, run.clock, run.first = 0, run.programs.init_state(), loop.Clock(), 0
    batches, grads = run.setup.batches(0), run.programs.zero_grads()
    host = lambda tree: jax.tree.map(np.array, jax.device_get(tree))
    before = host(run.state)
    for phase, other in (("experts", "router"), ("router", "experts")):
        assert run.setup.phase(run.step) == phase
        grads, _ = run.update(next(batches), run.setup.draw(run.step), grads)
        run.step += 1
        after = host(run.state)
        for name in before.params:
            moved = not np.array_equal(before.params[name].view(np.uint32), after.params[name].view(np.uint32))
            assert moved == (name.startswith("router/") == (phase == "router")), (phase, name)
        same = jax.tree.map(np.array_equal, before.opt_state[other], after.opt_state[other])
        assert all(jax.tree.leaves(same)) and not all(
            jax.tree.leaves(jax.tree.map(np.array_equal, before.opt_state[phase], after.opt_state[phase]))
        )
        before = after
    run.programs.close()
    run.rundir.close()


def test_phases_of_a_round_share_their_batch_and_a_resumed_stream_goes_on_within_it():
    setup = make_setup(tiny())
    index = [batch["index"].tolist() for batch in setup.batches(0)]
    assert len(index) == 8 and index[0] == index[1] != index[2] == index[3]
    assert [batch["index"].tolist() for batch in setup.batches(3)] == index[3:]
    assert [setup.phase(s) for s in range(3)] == ["experts", "router", "experts"]
    assert make_setup(tiny("trades")).phase(5) == ""


def test_an_epoch_of_alternation_has_twice_the_updates():
    how = dict(batch_size=32, num_examples=1000, total=None, field="f")
    assert to_steps("1.5ep", **how) == 47 and to_steps("1.5ep", **how, phases=2) == 94
    assert to_steps("64ex", **how, phases=2) == 4 and to_steps("7", **how, phases=2) == 7
    assert make_setup(tiny(train__duration=7)).total == 8  # whole rounds


def test_only_images_are_attacked():
    config = tiny()
    with pytest.raises(UserError, match="attacks are on images with labels, which data set digits does not give"):
        check_pixels(config, {"vectors": np.zeros((1, 4, 2)), "label": np.zeros(1)})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_other_methods_train_a_dense_network_with_finite_losses(method, tmp_path):
    config = tiny(method, model__experts=0, train__duration=4, eval__every=0, report__attacks="()")
    report = loop.train(config, str(tmp_path / method), Lines())
    losses = [m["loss"] for m in metrics_of(tmp_path / method) if "loss" in m]
    assert len(losses) == 4 and np.isfinite(losses).all() and "robust_pgd1" not in report["subnets"][0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__experts": 1}, "method='alternate' needs a model with a router, e.g. advmoe_resnet18"),
        ({"task__robust__method": "fgsm"}, "task.robust.method='fgsm'; valid: none, pgd, trades, alternate"),
        ({"task__robust__epsilon": -0.1}, "robust.epsilon=-0.1; valid: a number above 0"),
        ({"task__robust__steps": 0}, "robust.steps=0; valid: a whole number from 1"),
        ({"task__robust__beta": -1.0}, "robust.beta=-1.0; valid: a number from 0"),
        ({"data__augment__mean": "(0.3,)"}, r"attacks are on images in \[0, 1\]; remove data.augment.mean"),
        (
            {"nested__scheme": "sandwich", "nested__points__s": "width=0.75"},
            "nested.scheme='sandwich' teaches by outputs",
        ),
        ({"report__attacks": "('pgd',)"}, "report.attacks: unknown attack 'pgd'; valid: pgdN"),
        ({"report__attack_examples": 0}, "attack_examples=0"),
    ],
)
def test_mistakes_are_told_in_a_line_before_anything_runs(changes, message):
    with pytest.raises(UserError, match=message) as error:
        make_setup(tiny(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arg", ["trades", "alternate"])
def test_attacks_of_training_follow_the_gate_where_the_config_asks_for_it(arg):
    """Only the attacks do: what is evaluated, and clean outputs, are of eval mode."""
    setup = make_setup(tiny(arg, task__robust__through_gate=True))
    modes = []

    def frozen(x, method="__call__", mode="eval"):
        modes.append((method, mode))
        logits, scores = (x.sum((1, 2, 3))[:, None] * np.arange(1.0, n + 1) for n in (10, 2))
        return {"__call__": logits, "scores": scores, "with_scores": (logits, scores)}[method]

    image = np.full((2, 8, 8, 1), 0.5, np.float32)
    setup.task._attack(frozen, image, np.eye(10)[:2], jax.random.key(0), "experts")
    attacked = "with_scores" if arg == "alternate" else "__call__"
    assert (attacked, "through_gate") in modes and ("with_scores", "eval") in modes


def test_each_phase_attacks_what_its_own_loss_holds_or_both_the_sum():
    """An attack on scores that do not depend on the image leaves it where it started; one on outputs that do moves
    it."""
    image = np.full((2, 8, 8, 1), 0.5, np.float32)

    def frozen(x, method="__call__", mode="eval"):
        logits, scores = x.sum((1, 2, 3))[:, None] * np.arange(1.0, 11), np.ones((2, 2))
        return {"__call__": logits, "scores": scores, "with_scores": (logits, scores)}[method]

    def moved(phase, shared):
        task = make_setup(tiny(task__robust__shared_attack=shared)).task
        return float(np.abs(task._attack(frozen, image, np.eye(10)[:2], jax.random.key(0), phase) - image).max())

    assert moved("router", False) < 0.01 and moved("experts", False) > 0.05
    assert moved("router", True) > 0.05 and moved("experts", True) > 0.05
