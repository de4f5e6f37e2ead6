"""Attacks: bounds, the analytic optimum of a linear model, and APGD at least as strong as PGD on a trained network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from research.errors import UserError
from research.robust import attacks, losses

EPSILON = 0.1
KEY = jax.random.key(0)


@functools.cache
def linear():
    """A linear model of 3 classes in the middle of the box, where the ball is not cut: (weights, bias, images,
    labels)."""
    rng = np.random.default_rng(1)
    weights, bias = rng.normal(size=(12, 3)), rng.normal(size=3)
    x = rng.uniform(0.3, 0.7, (40, 12))
    return (
        *tuple(jnp.asarray(a, jnp.float32) for a in (weights, bias, x)),
        jnp.asarray((x @ weights + bias).argmax(-1)),
    )


@functools.cache
def digits():
    """A two-layer network trained on digits by plain gradient descent: (model, test images, labels)."""
    raw = load_digits()
    x, y = jnp.asarray(raw.images.reshape(-1, 64) / 16, jnp.float32), jnp.asarray(raw.target)
    keys = jax.random.split(KEY)
    params = [0.2 * jax.random.normal(keys[0], (64, 48)), 0.2 * jax.random.normal(keys[1], (48, 10))]
    model = lambda p, x: jax.nn.relu(x @ p[0]) @ p[1]
    loss = lambda p: losses.cross_entropy(model(p, x[:1200]), y[:1200]).mean()
    step = jax.jit(lambda p: jax.tree.map(lambda a, g: a - 0.5 * g, p, jax.grad(loss)(p)))
    for _ in range(300):
        params = step(params)
    return functools.partial(model, params), x[1200:1500], y[1200:1500]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("pgd5", marks=pytest.mark.slow),
        "apgd_ce",
        "apgd_dlr",
        pytest.param("apgd_t", marks=pytest.mark.slow),
        "apgd",
    ],
)
def test_images_stay_in_the_ball_and_in_the_box(name):
    f, x, label = digits()
    run = jax.jit(functools.partial(attacks.attack, name, f, epsilon=EPSILON, steps=5))
    attacked = run(x, label, KEY)
    assert float(jnp.abs(attacked - x).max()) <= EPSILON + 1e-6 and float(jnp.abs(attacked - x).max()) > 0.9 * EPSILON
    assert float(attacked.min()) >= 0 and float(attacked.max()) <= 1
    assert (f(attacked).argmax(-1) == label).mean() < (f(x).argmax(-1) == label).mean() - 0.05


@pytest.mark.parametrize("loss", ["cross_entropy", "dlr"])
def test_linear_model_of_two_classes_is_attacked_to_the_optimum(loss):
    """The margin (w_y - w_o) x falls by epsilon times the L1 norm of w_y - w_o, and no further."""
    weights, bias, x, label = linear()
    weights, bias = jnp.concatenate([weights[:, :2], 0 * weights[:, :1]], 1), jnp.asarray([0.0, 0.0, -1e3])
    f = lambda x: x @ weights + bias
    label = f(x).argmax(-1)
    margin = lambda x: jnp.abs(f(x)[:, 0] - f(x)[:, 1]) * jnp.where(f(x).argmax(-1) == label, 1, -1)
    attacked = attacks.apgd(f, x, label, KEY, epsilon=EPSILON, steps=25, loss=getattr(losses, loss))
    least = margin(x) - EPSILON * jnp.abs(weights[:, 0] - weights[:, 1]).sum()
    kept = least > 0  # of the others any point beyond the border is a result
    assert 5 < kept.sum() < 40
    np.testing.assert_allclose(margin(attacked)[kept], least[kept], rtol=1e-4)
    assert (margin(attacked)[~kept] <= 0).all()
    by_pgd = attacks.pgd(
        lambda z: losses.cross_entropy(f(z), label), x, KEY, epsilon=EPSILON, steps=25, step_size=EPSILON / 4
    )
    np.testing.assert_allclose(margin(by_pgd), least, rtol=1e-4)


def test_apgd_s_steps_shrink_until_it_stands_on_an_optimum_inside_the_ball():
    x, label = jnp.full((3, 4), 0.5), jnp.zeros(3, int)
    goal = x + EPSILON * jnp.asarray([[0.3, -0.7, 0.1, 0.5], [0.9, 0.2, -0.4, 0.0], [0.0, 0.6, -0.6, 0.25]])
    shift = 10 * jax.nn.one_hot(label, 4)  # so that no image is ever misclassified
    distance = lambda logits, _: -jnp.square(logits - shift - goal).sum(-1)
    attacked = attacks.apgd(lambda x: x + shift, x, label, KEY, epsilon=EPSILON, steps=100, loss=distance)
    np.testing.assert_allclose(attacked, goal, atol=0.03 * EPSILON)


@pytest.mark.slow
def test_apgd_is_at_least_as_strong_as_pgd_with_as_many_steps_on_a_trained_network():
    f, x, label = digits()
    robust = {}
    for name in ("pgd20", "apgd_ce", "apgd_dlr", "apgd_t", "apgd"):
        correct = jax.jit(functools.partial(attacks.is_correct, name, f, epsilon=EPSILON, steps=20))(x, label, KEY)
        robust[name] = float(correct.mean())
    clean = float((f(x).argmax(-1) == label).mean())
    assert clean > 0.9 and 0.05 < robust["pgd20"] < clean - 0.2, robust
    assert robust["apgd_ce"] <= robust["pgd20"] + 1e-6
    assert (
        robust["apgd"] <= min(robust["apgd_ce"], robust["apgd_dlr"]) + 0.01
    )  # the second of both starts from another key


@pytest.mark.slow
def test_apgd_s_loss_is_at_least_pgd_s():
    f, x, label = digits()
    value = lambda z: losses.cross_entropy(f(z), label)
    by_pgd = value(attacks.pgd(value, x, KEY, epsilon=0.02, steps=20, step_size=0.005))
    by_apgd = value(attacks.apgd(f, x, label, KEY, epsilon=0.02, steps=20))
    kept = f(attacks.apgd(f, x, label, KEY, epsilon=0.02, steps=20)).argmax(-1) == label
    assert (by_apgd >= by_pgd - 1e-3)[kept].mean() > 0.95 and by_apgd[kept].mean() >= by_pgd[kept].mean() - 1e-4


def test_checkpoints_are_those_of_the_paper():
    assert attacks.checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]


def test_start_noise_and_key_decide_the_result():
    f, x, label = digits()
    loss = lambda z: losses.cross_entropy(f(z), label)
    run = functools.partial(attacks.pgd, loss, x, epsilon=EPSILON, steps=0, step_size=0.1)
    assert float(jnp.abs(run(KEY, noise=0.001) - x).max()) < 0.01 < float(jnp.abs(run(KEY) - x).max())
    assert not np.array_equal(run(KEY), run(jax.random.key(1))) and np.array_equal(run(KEY), run(KEY))


def test_no_gradient_reaches_what_made_the_attack():
    _, x, label = digits()

    def through(scale):
        return attacks.pgd(
            lambda z: losses.cross_entropy(scale * z[:, :10], label), x, KEY, epsilon=EPSILON, steps=2, step_size=0.1
        ).sum()

    assert float(jax.grad(through)(1.0)) == 0.0


def test_worst_case_keeps_the_first_result_that_fools_and_else_the_last():
    x, label = jnp.zeros((3, 2)), jnp.zeros(3, int)
    first = jnp.asarray([[0.0, 1.0], [0.1, 0.0], [0.1, 0.0]])
    second = jnp.asarray([[0.2, 0.0], [0.0, 2.0], [0.2, 0.0]])
    chosen = attacks.worst(lambda x: x, x, label, KEY, [lambda _: first, lambda _: second])
    np.testing.assert_array_equal(chosen, jnp.stack([first[0], second[1], second[2]]))


def test_unknown_attack():
    with pytest.raises(UserError, match="report.attacks: unknown attack 'fgsm'; valid: pgdN, apgd_ce"):
        attacks.check_attacks(("pgd20", "fgsm"), "report.attacks")
