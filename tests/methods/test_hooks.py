"""What the hooks of methods are given: other sub-networks, features, the gradients of an update, which draw it is."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.nested.draws import Draw
from research.train.hooks import Extra
from research.train.method import Method
from research.train.method_registry import register
from research.train.setup import make_setup
from research.train.supervised import Supervised
from tests.methods import cases  # noqa: F401  (registers the teacher)
from tests.methods.test_every import tiny


@register("hints")
@dataclass(frozen=True)
class Hints(Method):
    """The network learns hidden states of its smallest sub-network (FitNets the other way round); what a draw is
    called is measured."""

    def objective(self, inner, task):
        def objective(forward, example):
            outcome = inner(forward, example)
            _, own = forward(*example.inputs, features=("hidden",))
            again, same = forward(*example.inputs, subnet="full", features=("hidden",))
            small, other = forward(*example.inputs, subnet="s", features=("hidden", "embedding"))
            apart = jnp.abs(own["hidden"] - same["hidden"]).max() + jnp.abs(again - outcome.outputs).max()
            width = jnp.float32(other["hidden"].shape[-1] + 100 * other["embedding"].shape[-1])
            loss = outcome.loss + 0.1 * jnp.square(jax.nn.softmax(small)).mean()
            return outcome._replace(loss=loss, measured={"apart": apart, "width": width})

        return objective


@register("scores")
@dataclass(frozen=True)
class Scores(Method):
    """Sums gradient times weight over updates, as movement pruning does (Sanh et al. 2020, arXiv 2005.07683)."""

    def arrays(self, model):
        return {"kernel": Extra((16, 10), model.axes["head/kernel"], lambda key, params: jnp.zeros((16, 10)))}

    def after_update(self, params, arrays, made, clock):
        moved = made.grads["head/kernel"] * made.before["head/kernel"]
        return params, {"kernel": arrays["kernel"] - moved}


def test_an_objective_runs_other_sub_networks_and_reads_features():
    learner = Supervised(make_setup(tiny("hints")))
    _, numbers = learner.update(0, learner.initial(print), next(learner.batches(0)))
    line = learner.read(0, jax.device_get(numbers)).record()
    assert line["apart"] == 0 and line["width"] == 8 + 100 * 8
    assert np.isfinite(line["loss"])
    learner.close()


def test_scores_are_of_the_gradient_and_the_weights_before_the_update():
    learner = Supervised(make_setup(tiny("scores", optim__name="sgd", optim__lr=1, optim__momentum=0, optim__warmup=0)))
    first = learner.initial(print)
    before = np.asarray(first.params["head/kernel"])
    state, _ = learner.update(0, first, next(learner.batches(0)))
    moved = before - np.asarray(state.params["head/kernel"])
    rate = float(learner.programs.schedules["all"](0))
    decay = before * rate * learner.setup.config.optim.weight_decay
    np.testing.assert_allclose(
        state.methods["scores"]["kernel"], -(moved - decay) / rate * before, rtol=1e-3, atol=1e-6
    )
    learner.close()


@dataclass(frozen=True)
class _Growing(Method):
    """Cuts the batch into more microbatches as the run goes on, or draws what is not there."""

    name = "growing"
    chooses = True
    other: str = ""

    def draws(self, space, seed, step):
        return (Draw(self.other or space.order[0], microbatches=1 + min(step, 1)),)


def test_draws_that_do_not_divide_the_batch_alike_are_refused(monkeypatch):
    setup = make_setup(tiny("random"))
    object.__setattr__(setup.methods, "items", (_Growing(),))
    assert setup.draw(0) == (Draw("full"),)
    with pytest.raises(UserError, match=r"draw 1 networks on 2 microbatches in update 1 and 1 networks on 1 micro"):
        setup.draw(1)
    object.__setattr__(setup.methods, "items", (_Growing("m"),))
    with pytest.raises(UserError, match="method 'growing' draws 'm' at update 0; valid: full, s"):
        setup.draw(0)


def losses_beside_a_teacher():
    sharded = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "mesh__min_size": 1}
    learner = Supervised(make_setup(tiny("teacher", "sandwich", **sharded if jax.device_count() == 8 else {})))
    state, batches, found = learner.initial(print), learner.batches(0), []
    for step in range(2):
        state, numbers = learner.update(step, state, next(batches))
        found.append(learner.read(step, jax.device_get(numbers)).record()["loss"])
    places = {str(array.sharding.spec) for array in jax.tree.leaves(learner.programs.brought)}
    learner.close()
    return found, len(places)


@pytest.mark.slow
def test_a_network_that_a_method_brings_is_sharded_by_its_own_axes():
    found = {}
    for devices in (1, 8):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        command = [sys.executable, "-m", "tests.methods.test_hooks"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        found[devices] = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(found[8][0], found[1][0], rtol=2e-5)
    assert found[1][1] == 1 < found[8][1]


if __name__ == "__main__":
    print(json.dumps(losses_beside_a_teacher()))
