"""A sentence encoder through the whole loop: dense, then upcycled to experts of domains; what does not fit is told at
set-up."""

import jax
import numpy as np
import pytest

from launch import config as recipe
from research.errors import UserError
from research.nested.upcycle import upcycle
from research.search import embedding
from research.train import loop
from research.train.extraction import load_model
from research.train.setup import make_setup
from tests import text_pairs
from tests.train.reporter import Lines


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """Overrides that make the recipe a run of seconds, on pairs of three domains."""
    folder = tmp_path_factory.mktemp("pairs")
    sizes = {
        "data.batch_size": "4",
        "eval.batch_size": "8",
        "train.duration": "3",
        "train.log_every": "1",
        "eval.every": "0",
    }
    sizes |= {
        "data.name": "text_pairs",
        "data.dir": text_pairs.write(folder, 60, 12, 13),
        "data.options.length": "6",
        "data.options.vocab_size": "40",
    }
    return sizes | {"model.dim": "16", "model.depth": "1", "model.attention": "{'num_heads': 2}"}


def load(arg, fields, **more):
    return recipe.load(f"configs/domain_encoder.py:{arg}", {**fields, **more})


@pytest.fixture(scope="module")
def dense(fields, tmp_path_factory):
    workdir, lines = str(tmp_path_factory.mktemp("dense") / "run"), Lines()
    return workdir, loop.train(load("dense", fields), workdir, lines), lines


def test_it_trains_and_reports_retrieval(dense):
    _, report, lines = dense
    assert report["metric"] == "test accuracy" and 0 <= report["subnets"][0]["value"] <= 1 and report["updates"] == 3
    assert "pairs/s" in lines.steps[-1] and "state" not in report["subnets"][0]
    assert (
        report["train_flops"] == 3 * 4 * 2 * 3 * report["subnets"][0]["flops"]
    )  # two texts a pair, forward and backward


@pytest.mark.slow
def test_domain_run_starts_as_the_dense_one(dense, fields, tmp_path):
    config = load("domain", fields, **{"methods": "upcycling", "method.upcycling.source": dense[0]})
    run = loop.Run(config, str(tmp_path / "run"), Lines())
    state = run.learner.initial(print)
    base, params, stats = load_model(dense[0])
    target = run.learner.setup.space.full
    expected, _ = upcycle(base, params, stats, target, jax.random.key(0))
    for name, value in expected.items():
        np.testing.assert_array_equal(state.params[name], value, err_msg=name)
    source = run.learner.setup.splits["test"]
    ours, theirs = (
        embedding.embed(m, source, run.learner.setup.task, pairs=13)
        for m in ((target, state.params, state.stats), (base, params, stats))
    )
    np.testing.assert_allclose(ours.a, theirs.a, rtol=1e-4, atol=1e-5)
    run.learner.close()
    assert len(jax.tree.leaves(state.opt_state)) > 0


def test_what_does_not_fit_is_told_at_set_up(fields):
    with pytest.raises(
        UserError, match=r"has texts of domain 2 \(c\) that no expert has; valid with model.num_domains=2: 0..1"
    ):
        make_setup(load("domain", fields, **{"model.num_domains": "2"}))
    with pytest.raises(UserError, match="model attention_small does not take pairs"):
        make_setup(load("domain", fields, **{"model.name": "attention_small"}))
    with pytest.raises(UserError, match="model.vocab_size=30 is less than the 40 tokens"):
        make_setup(load("domain", fields, **{"model.vocab_size": "30"}))
    with pytest.raises(UserError, match="task.contrastive.loss='triplet'; valid: mnr, symmetric, mnr_plus"):
        make_setup(load("domain", fields, **{"task.contrastive.loss": "triplet"}))
