"""What decides whether the hooks of methods carry: alternating phases with sub-networks, a second stream of data with
second-order gradients, quantisation under slices."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import config as recipe
from research.errors import UserError
from research.methods.advmoe import AdvMoe
from research.nested.draws import Draw
from research.train import loop
from research.train.checkpoint import Checkpoints
from research.train.extraction import Trained
from research.train.gradient import Gradient
from research.train.hooks import everything
from research.train.layout import shapes_of
from research.train.setup import make_setup
from research.train.state import Microbatch
from research.train.supervised import Supervised
from research.train.turns import InParallel, InTurn
from tests.methods import cases
from tests.train.reporter import Lines


def learner_of(text, **fields):
    given = {k.replace("__", "."): str(v) for k, v in fields.items()}
    return Supervised(make_setup(recipe.load(text, given)))


def test_advmoe_alternates_with_sandwich_networks():
    """The router's phase has no outputs to learn from; in the experts' phase the small network learns from the clean
    outputs of the full one."""
    fields = {"methods": "advmoe,sandwich", "nested__points__s": "width=0.5", "method__sandwich__count": 2}
    fields |= {"model__dims": "(16, 32)", "model__stem_dim": 16}
    learner = learner_of("tests/tiny_robust.py:advmoe", **fields)
    state, batches, lines = learner.initial(print), learner.batches(0), []
    for step in range(4):
        state, numbers = learner.update(step, state, next(batches))
        lines.append(learner.read(step, jax.device_get(numbers)).record())
    programs = [p for p in learner.programs.compiler.compiled if isinstance(p, Gradient)]
    found = {(p.name, p.phase, p.distill, p.teaches) for p in programs}
    assert found == {
        ("full", "experts", False, True),
        ("s", "experts", True, False),
        ("full", "router", False, False),
        ("s", "router", False, False),
    }
    assert all(np.isfinite(line["loss/s"]) and np.isfinite(line["loss/full"]) for line in lines)
    assert ["loss_router" in line for line in lines] == [False, True, False, True]
    learner.close()


def test_every_network_of_an_update_attacks_its_own_images(monkeypatch):
    """Under one clock, so that random numbers make no difference: attacks differ by the network that they see."""
    fields = {"methods": "advmoe,sandwich", "nested__points__s": "width=0.5", "method__sandwich__count": 2}
    learner = learner_of("tests/tiny_robust.py:advmoe", **fields, model__dims="(16, 32)", model__stem_dim=16)
    programs, state = learner.programs, learner.initial(print)
    batches = {
        k: {n: jnp.asarray(v) for n, v in b.items() if n != "index"} for k, b in next(learner.batches(0)).items()
    }
    (batch,), attacked, made = batches.values(), AdvMoe.attacked, []
    monkeypatch.setattr(AdvMoe, "attacked", lambda *args: made.append(attacked(*args)) or made[-1])
    one = (jnp.float32(1), jnp.float32(1))
    microbatch = Microbatch(batches, jnp.zeros(3, jnp.uint32), one, jnp.float32(0))

    def images(name):
        key = Gradient(name, tuple((k, shapes_of(b)) for k, b in batches.items()), "experts")
        loss = key.loss(programs, programs.held(state), microbatch)
        return np.asarray(jax.jit(lambda params: (loss(params), made.pop())[1])(dict(state.params)))

    full, small = images("full"), images("s")
    for found in (full, small):
        moved = np.abs(found - np.asarray(batch["image"])).max((1, 2, 3))
        assert (moved > 0.09).all() and (moved < 0.1 + 1e-6).all()
    assert (np.abs(full - small).max((1, 2, 3)) > 0.05).all()
    learner.close()


def test_streams_are_disjoint_and_follow_from_seed_and_step():
    learner = learner_of("tests/methods/tiny.py:darts")
    rows = [{k: v["index"].tolist() for k, v in batch.items()} for batch in learner.batches(0)]
    assert [set(row) for row in rows] == [{"train", "held"}] * 8
    own = {name: {i for row in rows for i in row[name]} for name in ("train", "held")}
    seen = {name: learner.setup.batches(0) for name in own}
    assert rows[0] == rows[1] != rows[2], "the phases of a round share their batches"
    again = [{k: v["index"].tolist() for k, v in batch.items()} for batch in learner.batches(5)]
    assert again == rows[5:] and len(seen) == 2
    count = learner.setup.examples("train")
    source = learner.setup.splits["train"]
    from research.train.streams import Part

    parts = [Part(source, stream, 0) for stream in learner.setup.methods.streams()]
    held = [set(part._own.tolist()) for part in parts]
    assert not held[0] & held[1] and len(held[0] | held[1]) == count
    learner.close()


@pytest.mark.slow
def test_networks_in_parallel_take_the_phase_s_own_stream():
    learner = learner_of("tests/methods/tiny.py:own_stream")
    state, batch, draws, found = learner.initial(print), next(learner.batches(0)), (Draw("full"),), []
    for execution in (InTurn(learner.setup, learner.programs), InParallel(learner.setup, learner.programs)):
        grads = learner.programs.zero_grads()
        grads, _, numbers = execution.gradients(learner.programs.get, 0, state, batch, draws, grads)
        ((_, measured),) = execution.read(jax.device_get(numbers), draws)
        found.append((float(measured["loss"]), jax.device_get(grads)))
    (loss, turn), (its_loss, parallel) = found
    assert its_loss == pytest.approx(loss, rel=1e-6) and set(batch) == {"own"}
    for name in turn:
        np.testing.assert_allclose(parallel[name], turn[name], rtol=1e-5, atol=1e-7)
    learner.close()


def test_the_bare_step_runs_the_programs_of_the_loop():
    """Networks of one shape share a program, and a phase without outputs teaches nobody."""
    learner = learner_of("tests/methods/tiny.py:all,head_alone", **{"nested__points__same": "width=1.0"})
    asked, wanted = [], []
    for step in range(2):
        ready = learner.execution.ready(step, next(learner.batches(step)), learner.setup.draw(step))
        asked += [program for program, _ in ready]
        wanted += learner.execution.programs(learner.setup.draw(step), learner.setup.phase(step))
    assert len(asked) == len(wanted) == 6 and set(asked) == set(wanted) and len(set(asked)) == 2
    learner.close()


@pytest.mark.slow
def test_the_second_order_gradient_is_that_of_differentiating_twice():
    """Finite differences against the exact derivative of L_held(w - rate dL_train/dw, alpha), over reference ops."""
    learner = learner_of("tests/methods/tiny.py:darts", model__implementation="naive")
    programs, state = learner.programs, learner.initial(print)
    batches = {
        k: {n: jnp.asarray(v) for n, v in b.items() if n != "index"} for k, b in next(learner.batches(0)).items()
    }
    key = Gradient("full", tuple((k, shapes_of(b)) for k, b in batches.items()), "architecture")
    one = (jnp.float32(1), jnp.float32(1))
    microbatch = Microbatch(batches, jnp.zeros(3, jnp.uint32), one, jnp.float32(0))
    params = dict(state.params)
    params["darts/alpha"] = jnp.array([0.3, -0.2])
    loss = key.loss(programs, programs.held(dataclasses.replace(state, params=params)), microbatch)
    method = learner.setup.methods.items[0]

    def exact(alpha):
        own = {**params, "darts/alpha": alpha}
        ahead = jax.grad(lambda p: loss(p, stream="train", trains=everything)[0])(own)
        moved = {k: v if k == "darts/alpha" else v - method.rate * ahead[k] for k, v in own.items()}
        return loss(moved, stream="held", trains=everything)[0]

    found = jax.jit(lambda p: method.second_order(loss, p, None)[1])(params)
    wanted = jax.jit(jax.grad(exact))(params["darts/alpha"])
    first = jax.grad(lambda p: loss(p, stream="held", trains=everything)[0])(params)["darts/alpha"]
    np.testing.assert_allclose(found["darts/alpha"], wanted, rtol=2e-2, atol=1e-5)
    assert float(np.abs(wanted - first).max()) > 10 * float(np.abs(found["darts/alpha"] - wanted).max())
    assert all(not np.any(v) for k, v in found.items() if k != "darts/alpha")
    learner.close()


@pytest.mark.slow
def test_each_phase_moves_its_own_arrays():
    learner = learner_of("tests/methods/tiny.py:darts")
    state, batches = learner.initial(print), learner.batches(0)
    for step, name in enumerate(("weights", "architecture")):
        before = jax.device_get(state.params)
        state, _ = learner.update(step, state, next(batches))
        moved = {k for k, v in jax.device_get(state.params).items() if not np.array_equal(v, before[k])}
        assert (moved == {"darts/alpha"}) == (name == "architecture") and moved, name
    learner.close()


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quantised") / "run"
    fields = {"methods": "fake_quantisation,sandwich", "train.duration": "4"}
    loop.train(recipe.load("tests/methods/tiny.py", fields), str(workdir), Lines())
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "s"])
def test_quantisation_has_the_scales_of_the_sub_network_and_is_baked_into_what_is_extracted(quantised, name):
    trained = Trained(quantised)
    trained.programs.close()
    _, params, _ = trained.model(name)
    levels = 2 ** (cases.FakeQuantisation().bits - 1) - 1
    kernels = {k: np.asarray(v) for k, v in params.items() if v.ndim > 1}
    raw = jax.device_get(trained.programs.layout.sliced(name, trained.state.params))
    for k, kernel in kernels.items():
        scale = np.abs(raw[k]).max() / levels
        np.testing.assert_allclose(kernel / scale, np.round(kernel / scale), atol=1e-4, err_msg=k)
        assert len(np.unique(np.round(kernel / scale))) <= 2 * levels + 1
    assert float(trained.state.methods["fake_quantisation"]["updates"]) == 4
    assert not any(np.array_equal(kernels[k], raw[k]) for k in kernels)


@pytest.mark.slow
def test_a_network_that_a_method_brings_teaches_and_is_found_again_by_its_digest(tmp_path):
    """Its arrays are in no checkpoint, and a resumed run with another one is refused."""
    fields = {"methods": "teacher,sandwich", "train.duration": "2"}
    workdir = tmp_path / "run"
    loop.train(recipe.load("tests/methods/tiny.py", fields), str(workdir), Lines())
    learner = Supervised(make_setup(recipe.load("tests/methods/tiny.py", fields)))
    about = Checkpoints(workdir / "checkpoints").about(2)
    assert about["brought"] == {"teacher": "weights of seed 1"}
    learner.adopt(about)
    with pytest.raises(UserError, match="method teacher brings another network than the run began with"):
        learner.adopt({**about, "brought": {"teacher": "weights of seed 2"}})
    assert learner.programs.shapes.params.keys() == learner.programs.layout.model.params.keys()
    learner.close()


def test_one_phase_that_trains_a_part_leaves_the_bits_of_the_rest_and_resumes(tmp_path):
    """Also where the method has an option that is a tuple, which files hold as a list."""
    fields = {"methods": "head_alone", "train.duration": "4", "optim.weight_decay": "0.1"}
    config, workdir, lines = recipe.load("tests/methods/tiny.py", fields), tmp_path / "run", Lines()
    learner = Supervised(make_setup(config))
    start = jax.device_get(learner.initial(print).params)
    learner.close()
    loop.train(config, str(workdir), Lines())
    shutil.rmtree(workdir / "checkpoints" / "4")
    loop.train(config, str(workdir), lines)
    assert "resumed from step 2" in lines.said
    trained = Trained(workdir)
    trained.programs.close()
    moved = {k for k, v in trained.state.params.items() if not np.array_equal(v, start[k])}
    assert moved == {"head/kernel", "head/bias"}
