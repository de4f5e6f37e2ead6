"""A run starts as a dense network whose FFNs have become experts; what does not fit, and how it was said before."""

import jax
import numpy as np
import pytest

from launch import config as recipe
from research.errors import UserError
from research.methods.upcycling import Upcycling
from research.nested.upcycle import changes_function, upcycle
from research.train.config import with_defaults
from research.train.extraction import load_model
from research.train.setup import make_setup
from research.train.supervised import Supervised
from tests.methods.cases import NEEDS, source
from tests.methods.test_every import tiny

TINY = "tests/methods/tiny.py"


@pytest.mark.parametrize("options", [{}, {"noise": "0.1", "reinit": "0.5"}])
def test_a_run_starts_as_the_upcycled_network(options):
    said, given = [], {f"method.upcycling.{k}": v for k, v in options.items()}
    learner = Supervised(make_setup(tiny("upcycling", seed=3, **given)))
    state = learner.initial(said.append)
    model = learner.setup.space.full
    numbers = {k: float(v) for k, v in options.items()}
    params, stats = upcycle(*load_model(source()), model, jax.random.key(3), **numbers)
    learner.close()
    for name, value in {**params, **stats}.items():
        np.testing.assert_array_equal({**state.params, **state.stats}[name], value, err_msg=name)
    change = "noise=0.1, reinit=0.5" if options else changes_function(model.mixture)
    told = f"every expert starts as the dense part of {source()}, which changes what it computes ({change})"
    assert said[-1] == told and change


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model.ffn": "mlp"}, "has no mixture of experts; give it one, e.g. config.model.ffn"),
        ({"method.upcycling.source": ""}, "give its run: config.method.upcycling.source"),
        ({"train.init_from": "runs/a"}, "starts from its source, not from train.init_from=runs/a"),
        ({"method.upcycling.reinit": "1.5"}, "method.upcycling.reinit=1.5"),
    ],
)
def test_what_does_not_fit_is_refused(fields, told):
    with pytest.raises(UserError) as caught:
        make_setup(tiny("upcycling", **fields))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_another_family_is_refused_when_the_run_starts():
    other = source("vgg16", dims=(4, 4), depths=(1, 1))
    learner = Supervised(make_setup(tiny("upcycling", **{"method.upcycling.source": other})))
    with pytest.raises(UserError, match="does not fit this model: its model is vgg, not vit"):
        learner.initial(print)
    learner.close()


def test_a_dense_run_as_it_is_is_no_mixture():
    moe = {k: v for k, v in NEEDS["upcycling"]().items() if k.startswith("model.")}
    learner = Supervised(make_setup(tiny(**moe, **{"train.init_from": source()})))
    with pytest.raises(UserError, match=r"at blocks.*its model is vit \(methods that make .*: .*upcycling"):
        learner.initial(print)
    learner.close()


def test_fields_of_earlier_versions():
    with pytest.raises(UserError, match="config.train.upcycle.noise is said otherwise now: config.methods with 'upcyc"):
        recipe.load(TINY, {"train.upcycle.noise": "0.1"})
    config = recipe.load(TINY, {})
    train = {**config["train"], "init_from": "runs/dense"}
    same = with_defaults({**config, "train": {**train, "upcycle": {"noise": 0.0, "reinit": 0.0}}})
    assert same["methods"] == [] and same["train"] == train
    moved = with_defaults({**config, "train": {**train, "upcycle": {"noise": 0.1, "reinit": 0.0}}})
    assert moved["methods"] == ["upcycling"] and moved["train"] == {**train, "init_from": ""}
    assert Upcycling(**moved["method"]["upcycling"]) == Upcycling("runs/dense", 0.1, 0.0)


def test_a_source_that_is_not_there_is_told_by_its_field(tmp_path):
    missing = str(tmp_path / "missing")
    for field, fields in (
        (
            "method.upcycling.source",
            {**NEEDS["upcycling"](), "methods": "upcycling", "method.upcycling.source": missing},
        ),
        ("train.init_from", {"train.init_from": missing}),
    ):
        learner = Supervised(make_setup(tiny(**fields)))
        with pytest.raises(UserError, match=f"^{field}={missing}: {missing} holds no run") as error:
            learner.initial(print)
        assert "\n" not in str(error.value)
        learner.close()
