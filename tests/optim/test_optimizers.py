"""Every optimizer that a config may name: its own constants, a few updates on a small problem, its state sharded and
resumed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from research.errors import UserError
from research.modules.axes import Kind
from research.optim.build import make_optimizer
from research.optim.registry import CONSTANTS, known
from research.optim.section import OptimSection, resolve, stored
from research.sections import defaults, fields_of
from research.train.checkpoint import Checkpoints
from research.train.restore import Wanted
from research.train.sharding import layout, like_params, make_mesh

AXES = {"up": ("s/layers", "s/embed", "s/layer/mlp"), "bias": ("s/layers", "s/layer/mlp"), "scale": ()}
KINDS = {"up": Kind.MATRIX, "bias": Kind.BIAS, "scale": Kind.GAIN}
OPTIMIZERS = known()
RATES = {"factored_rms": 1e-2, "optimistic_gradient": 0.1}
"""Rates of the optimizers that have no usual one."""
WITHOUT_MOMENTS = ("sign",)


def params():
    return {
        "up": jnp.linspace(-1, 1, 24).reshape(2, 3, 4),
        "bias": jnp.linspace(0.5, 2, 8).reshape(2, 4),
        "scale": jnp.float32(0.7),
    }


def loss(p):
    x = jnp.sin(jnp.arange(15.0)).reshape(5, 3)
    y = p["scale"] * (jnp.einsum("bi,lio->lbo", x, p["up"]) + p["bias"][:, None])
    return jnp.square(y - jnp.cos(y.shape[1] * jnp.arange(4.0))).mean()


def section(name, **more):
    return resolve({**defaults(OptimSection), "name": name, "lr": RATES.get(name), **more})


def build(name, **more):
    config = OptimSection(**section(name, **more))
    return make_optimizer(config, optax.constant_schedule(config.lr), AXES, KINDS)


def updates(optimizer, p, state, count):
    step = jax.jit(lambda p, s: optimizer.update(jax.grad(loss)(p), s, p))
    for _ in range(count):
        change, state = step(p, state)
        p = optax.apply_updates(p, change)
    return p, state


def same_bits(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_constant_is_a_field_and_is_one_of_an_optimizer():
    assert len(OPTIMIZERS) == 22 and set(CONSTANTS) <= fields_of(OptimSection).keys()
    assert {constant for own in OPTIMIZERS.values() for constant in own.constants} == set(CONSTANTS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_falls_and_a_state_on_disk_goes_on_to_the_same_bits(name, tmp_path):
    optimizer = build(name)
    start = params()
    half, state = updates(optimizer, start, optimizer.init(start), 4)
    end, last = updates(optimizer, half, state, 4)
    assert float(loss(end)) < float(loss(half)) < float(loss(start))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (half, state))
    leaves, structure = jax.tree.flatten((half, state))
    again, kept = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    assert jax.tree.structure(jax.eval_shape(lambda: (start, optimizer.init(start)))) == jax.tree.structure(shapes)
    same_bits(updates(optimizer, again, kept, 4), (end, last))


def test_states_of_all_optimizers_survive_a_checkpoint(tmp_path):
    states = {name: updates(build(name), params(), build(name).init(params()), 1)[1] for name in OPTIMIZERS}
    mesh = make_mesh({})
    whole = jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), states)
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_every=0, keep_best=False, higher_is_better=True)
    checkpoints.save(1, states, {})
    checkpoints.wait()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), states)
    back, _ = checkpoints.restore(1, Wanted(shapes, whole))
    checkpoints.close()
    assert jax.tree.structure(back) == jax.tree.structure(states)
    same_bits(back, states)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_laid_out_as_their_parameters(name):
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 1, 1), ("data", "fsdp", "tensor", "expert", "context"))
    start = params()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), start)
    shardings, _ = layout(AXES, shapes, mesh, 1)
    state = jax.eval_shape(build(name).init, start)
    found = like_params(state, shapes, shardings, mesh)
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True))
    moments = [sharding.spec for leaf, sharding in pairs if leaf.shape == start["up"].shape]
    assert (len(moments) == 0) == (name in WITHOUT_MOMENTS)
    assert set(moments) <= {shardings["up"].spec} and "fsdp" in shardings["up"].spec


@pytest.mark.parametrize(
    "name, reference",
    [
        ("acprop", optax.contrib.acprop),
        ("adadelta", lambda rate: optax.adadelta(rate)),
        ("adam", optax.adam),
        ("adamax", optax.adamax),
        ("adamw", lambda rate: optax.adamw(rate, weight_decay=0.0)),
        ("adan", lambda rate: optax.adan(rate, eps_root=0.0)),
        ("ademamix", lambda rate: optax.contrib.ademamix(rate, alpha=6.0)),
        ("adopt", optax.contrib.adopt),
        ("amsgrad", optax.amsgrad),
        ("belief", optax.adabelief),
        ("lion", lambda rate: optax.lion(rate, weight_decay=0.0)),
        ("optimistic_gradient", optax.optimistic_gradient_descent),
        ("radam", optax.radam),
        ("rms", optax.rmsprop),
        ("rss", optax.adagrad),
        ("sign", optax.sign_sgd),
        ("stddev", lambda rate: optax.rmsprop(rate, centered=True)),
        ("yogi", optax.yogi),
    ],
)
def test_constants_left_open_are_the_optimizer_s_own(name, reference):
    """A plain name means what optax means by it: Lion has b2 0.99, Adam looks not ahead, Adan has three averages of its
    own."""
    optimizer = build(name, lr=0.01, weight_decay=0.0)
    theirs = reference(0.01)
    ours, _ = updates(optimizer, params(), optimizer.init(params()), 5)
    expected, _ = updates(theirs, params(), theirs.init(params()), 5)
    for path in ours:
        np.testing.assert_allclose(ours[path], expected[path], rtol=2e-6, atol=1e-7, err_msg=path)


def test_novograd_decays_once_and_each_layer_by_its_own_norm():
    plain, decayed = build("novograd", weight_decay=0.0), build("novograd", weight_decay=0.5)
    p = params()
    grads = jax.grad(loss)(p)
    first, _ = plain.update(grads, plain.init(p), p)
    second, _ = decayed.update(grads, decayed.init(p), p)
    np.testing.assert_allclose(second["up"], first["up"] - 1e-2 * 0.5 * p["up"], rtol=1e-5)
    np.testing.assert_array_equal(second["bias"], first["bias"])
    alone = optax.scale_by_novograd()
    for layer in range(2):
        part, own = {"w": grads["up"][layer]}, {"w": p["up"][layer]}
        expected, _ = alone.update(part, alone.init(own), own)
        np.testing.assert_allclose(first["up"][layer], -1e-2 * expected["w"], rtol=1e-5)


def test_a_recipe_s_numbers_stay_and_the_rest_follows_the_optimizer():
    lion = section("lion")
    assert (lion["b1"], lion["b2"], lion["lr"], lion["weight_decay"]) == (0.9, 0.99, 1e-4, 0.5)
    assert lion["eps"] is lion["momentum"] is lion["nesterov"] is None
    given = section("lion", lr=3e-4, b2=0.98)
    assert (given["lr"], given["b1"], given["b2"], given["weight_decay"]) == (3e-4, 0.9, 0.98, 0.5)
    adamw = section("adamw")
    assert [adamw[key] for key in ("lr", "weight_decay", "b1", "b2", "eps")] == [1e-3, 0.05, 0.9, 0.999, 1e-8]
    assert section("adam")["nesterov"] is False and section("adam", nesterov=True)["nesterov"] is True
    assert resolve(lion) == lion  # what is resolved stays


OLD = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "momentum": 0.9, "nesterov": True, "lr": 1e-3, "weight_decay": 0.05}
"""What the config.json of every run held, whatever its optimizer, when the defaults were one for all."""


@pytest.mark.parametrize(
    "name, kept",
    [
        ("adamw", {"b1": 0.9, "b2": 0.999, "eps": 1e-8}),
        ("lion", {"b1": 0.9, "b2": 0.999}),
        ("adam", {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "nesterov": True}),
        ("sgd", {"momentum": 0.9, "nesterov": True}),
        ("muon", {"momentum": 0.9, "b1": 0.9, "b2": 0.999}),
        ("rms", {"rho": 0.9, "eps": 1e-8}),
    ],
)
def test_runs_of_old_keep_the_numbers_they_had(name, kept):
    found = stored({**defaults(OptimSection), **OLD, "name": name})
    assert {key: found[key] for key in CONSTANTS if found[key] is not None} == kept
    assert (found["lr"], found["weight_decay"]) == (1e-3, 0.05)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"name": "schedule"}, "unknown optim.name 'schedule'; near: .*all: acprop, adadelta"),
        ({"name": "rprop"}, "unknown optim.name 'rprop'; near: .*all: "),
        ({"name": "polyak"}, "unknown optim.name 'polyak'; near: .*all: "),
        ({"name": "backtracking_linesearch"}, "unknown optim.name 'backtracking_linesearch'; near: .*all: "),
        ({"name": "zoom_linesearch"}, "unknown optim.name 'zoom_linesearch'; near: .*all: "),
        ({"name": "adamv"}, "unknown optim.name 'adamv'; near: .*adamw.* \\(all: "),
        (
            {"name": "adamw", "momentum": 0.95},
            r"optim.momentum=0.95: adamw has no such constant, only lr, weight_decay, b1, b2, eps; remove",
        ),
        (
            {"name": "sgd", "b1": 0.9},
            r"optim.b1=0.9: sgd has no such constant, only lr, weight_decay, momentum, nesterov",
        ),
        ({"name": "factored_rms", "lr": None}, "optim.lr is missing: factored_rms has no usual learning rate; set one"),
        ({"lr_rules": (("(", 1.0),)}, r"optim.lr_rules: '\(': .*regular expression"),
        ({"lr_rules": ((".*", -1.0),)}, r"optim.lr_rules: '.\*'=-1.0; valid: a number from 0"),
        ({"decay_rules": ((".*", float("nan")),)}, "optim.decay_rules: .*valid: a number from 0"),
        ({"decay_rules": (".*",)}, "optim.decay_rules=.*valid: a list"),
        ({"decay_rules": ((".*",),)}, "is no pair"),
    ],
)
def test_what_does_not_fit_the_optimizer_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        resolve({**defaults(OptimSection), **given})
