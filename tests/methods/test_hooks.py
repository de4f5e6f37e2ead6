"""What the hooks of methods are given: other sub-networks, features, the gradients of an update, which draw it is."""

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
