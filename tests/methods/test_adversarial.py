"""Robust training through the loop: alternation, exact resume in the middle of a round, robust accuracies, mistakes."""

import json
import shutil

import jax
import numpy as np
import pytest

from launch import config as recipe
from research.errors import UserError
from research.methods.bases.adversarial import check_pixels
from research.models import registry
from research.tasks.base import Example
from research.tasks.classification import Classification
from research.train import loop
from research.train.durations import to_steps
from research.train.extraction import Trained
from research.train.method_registry import make
from research.train.sections import RunConfig
from research.train.setup import make_setup
from research.train.supervised import Supervised
from tests.train.reporter import Lines


def tiny(arg="advmoe", **overrides):
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
def test_a_phase_moves_its_own_parameters_and_leaves_the_others_bits():
    learner = Supervised(make_setup(tiny()))
    state, batches = learner.initial(print), learner.batches(0)
    host = lambda tree: jax.tree.map(np.array, jax.device_get(tree))
    before = host(state)
    for step, (phase, other) in enumerate((("experts", "router"), ("router", "experts"))):
        assert learner.setup.phase(step).name == phase
        state, _ = learner.update(step, state, next(batches))
        after = host(state)
        for name in before.params:
            moved = not np.array_equal(before.params[name].view(np.uint32), after.params[name].view(np.uint32))
            assert moved == (name.startswith("router/") == (phase == "router")), (phase, name)
        same = jax.tree.map(np.array_equal, before.opt_state[other], after.opt_state[other])
        assert all(jax.tree.leaves(same)) and not all(
            jax.tree.leaves(jax.tree.map(np.array_equal, before.opt_state[phase], after.opt_state[phase]))
        )
        before = after
    learner.close()


def test_phases_of_a_round_share_their_batch_and_a_resumed_stream_goes_on_within_it():
    setup = make_setup(tiny())
    index = [batch["train"]["index"].tolist() for batch in setup.batches(0)]
    assert len(index) == 8 and index[0] == index[1] != index[2] == index[3]
    assert [batch["train"]["index"].tolist() for batch in setup.batches(3)] == index[3:]
    assert [setup.phase(s).name for s in range(3)] == ["experts", "router", "experts"]
    assert make_setup(tiny("trades")).phase(5).name == "all"


def test_an_epoch_of_alternation_has_twice_the_updates():
    how = dict(batch_size=32, num_examples=1000, total=None, field="f")
    assert to_steps("1.5ep", **how) == 47 and to_steps("1.5ep", **how, phases=2) == 94
    assert to_steps("64ex", **how, phases=2) == 4 and to_steps("7", **how, phases=2) == 7
    assert make_setup(tiny(train__duration=7)).total == 8  # whole rounds


def test_only_images_are_attacked():
    config = tiny()
    with pytest.raises(UserError, match="attacks are on images with labels, which data set digits does not give"):
        check_pixels(RunConfig.of(config), {"vectors": np.zeros((1, 4, 2)), "label": np.zeros(1)})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_other_methods_train_a_dense_network_with_finite_losses(method, tmp_path):
    config = tiny(method, model__num_experts=0, train__duration=4, eval__every=0, methods=method)
    report = loop.train(config, str(tmp_path / method), Lines())
    losses = [m["loss"] for m in metrics_of(tmp_path / method) if "loss" in m]
    assert len(losses) == 4 and np.isfinite(losses).all() and "robust_pgd1" not in report["subnets"][0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__num_experts": 1}, "method advmoe needs a model with a router, e.g. advmoe_resnet18"),
        ({"methods": "fgsm"}, "unknown method 'fgsm'; near: "),
        ({"method__advmoe__epsilon": -0.1}, "advmoe.epsilon=-0.1; valid: a number above 0"),
        ({"method__advmoe__steps": 0}, "advmoe.steps=0; valid: a whole number from 1"),
        ({"method__advmoe__beta": -1.0}, "advmoe.beta=-1.0; valid: a number from 0"),
        ({"data__augment__mean": "(0.3,)"}, r"attacks are on images in \[0, 1\]; remove data.augment.mean"),
        (
            {"methods": "pgd,sandwich", "nested__points__s": "width=0.75"},
            "method sandwich teaches by outputs, of which the objective of pgd has none",
        ),
        (
            {"methods": "sandwich,advmoe", "nested__points__s": "width=0.75"},
            "method advmoe puts an objective in the place of that of sandwich, .*; name advmoe first",
        ),
        ({"methods": "advmoe,trades"}, "methods advmoe and trades both put an objective of their own"),
        ({"method__attacks__names": "('pgd',)"}, "method.attacks.names: unknown attack 'pgd'; valid: pgdN"),
        ({"method__attacks__examples": 0}, "attacks.examples=0"),
    ],
)
def test_mistakes_are_told_in_a_line_before_anything_runs(changes, message):
    with pytest.raises(UserError, match=message) as error:
        make_setup(tiny(**changes))
    assert "\n" not in str(error.value)


def seen(method, frozen, phase="experts"):
    """The images that a method's objective attacks two grey ones into."""
    attacked = []

    def forward(x, mode="train", method="__call__", params="live"):
        if params == "live":
            attacked.append(np.asarray(x))
        return frozen(x, method, mode or "eval")

    image = np.full((2, 8, 8, 1), 0.5, np.float32)
    task = method.wrapped(Classification(10), advmoe)
    example = Example({}, (image,), np.eye(10)[:2], None, phase, jax.random.key(0))
    method.objective(task.objective, task)(forward, example)
    return attacked[-1]


advmoe = registry.model_config("advmoe_resnet18", num_experts=2)
SIZES = {"epsilon": 0.1, "steps": 1, "step_size": 0.1}


@pytest.mark.parametrize("arg", ["trades", "advmoe"])
def test_attacks_of_training_follow_the_gate_where_the_config_asks_for_it(arg):
    """Only the attacks do: what is evaluated, and clean outputs, are of eval mode."""
    modes = []

    def frozen(x, method, mode):
        modes.append((method, mode))
        logits, scores = (x.sum((1, 2, 3))[:, None] * np.arange(1.0, n + 1) for n in (10, 2))
        return {"__call__": logits, "scores": scores, "with_scores": (logits, scores)}[method]

    seen(make(arg, {**SIZES, "through_gate": True}), frozen)
    attacked = "with_scores" if arg == "advmoe" else "__call__"
    assert (attacked, "through_gate") in modes and ("with_scores", "train") in modes


def test_each_phase_attacks_what_its_own_loss_holds_or_both_the_sum():
    """An attack on scores that do not depend on the image leaves it where it started; one on outputs that do moves
    it."""

    def frozen(x, method, mode):
        logits, scores = x.sum((1, 2, 3))[:, None] * np.arange(1.0, 11), np.ones((2, 2))
        return {"__call__": logits, "scores": scores, "with_scores": (logits, scores)}[method]

    def moved(phase, shared):
        return float(np.abs(seen(make("advmoe", {**SIZES, "shared_attack": shared}), frozen, phase) - 0.5).max())

    assert moved("router", False) < 0.01 and moved("experts", False) > 0.05
    assert moved("router", True) > 0.05 and moved("experts", True) > 0.05
