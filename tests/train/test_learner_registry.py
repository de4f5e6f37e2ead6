"""Learners by name: of the repository, and of a user's own file."""

import pytest

from research import plugins
from research.errors import UserError
from research.train import learner_registry
from research.train.config import base_config, resolved, with_defaults
from research.train.sections import RunConfig
from research.train.setup import make_setup
from research.train.used import check_used

OWN = """
from dataclasses import dataclass

from research.train.learner_registry import register


@dataclass(frozen=True)
class Options:
    size: int = 3


@register("own_learner", options=Options, reads=("model", "optim.lr"))
def make(config, waiting, waited):
    return config.learner.options["size"]
"""


def config_of(name, **options):
    config = base_config()
    config.learner = {"name": name, "options": options}
    return resolved(config)


def test_the_learner_says_what_making_it_waits_for():
    said = {
        name: learner_registry.opening(RunConfig.of(config_of(name))) for name in ("supervised", "soft_actor_critic")
    }
    assert said == {
        "supervised": f"loading data set {base_config().data.name}",
        "soft_actor_critic": "making the learner soft_actor_critic",
    }


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own_learner_file.py").write_text(OWN)
    plugins.load(str(tmp_path / "own_learner_file.py"))
    yield
    learner_registry._LEARNERS.pop("own_learner")


def test_a_learner_of_one_s_own_is_made_by_its_name_and_says_what_it_reads(own):
    config = config_of("own_learner", size=5)
    assert learner_registry.make(RunConfig.of(config), lambda: None, lambda title, seconds: None) == 5
    assert config_of("own_learner")["learner"]["options"] == {"size": 3}
    config["model"]["depths"], config["optim"]["lr"] = [1, 1], 0.5
    check_used(config)
    config["data"]["batch_size"] = 7
    with pytest.raises(
        UserError, match=r"config.data.batch_size=7 is not read in this run, only by .*supervised; leave it at 128"
    ):
        check_used(config)
    with pytest.raises(UserError, match="for runs of the learner supervised; the run's is own_learner"):
        make_setup(config)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("superviced", {}, "unknown learner 'superviced'; near: supervised"),
        ("supervised", {"size": 1}, "learner.options.size is unknown to supervised, which has no options"),
    ],
)
def test_what_is_no_learner_or_option_is_refused(name, options, words):
    with pytest.raises(UserError, match=words):
        config_of(name, **options)


def test_one_name_is_one_learner():
    learner_registry.known()
    with pytest.raises(ValueError, match="registered twice"):
        learner_registry.register("supervised")(lambda config, waiting, waited: None)


def test_runs_of_earlier_versions_are_supervised():
    config = resolved(base_config())
    del config["learner"]
    assert with_defaults(config)["learner"] == {"name": "supervised", "options": {}}
