"""Contrastive losses by hand, what is swapped, masks and metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.tasks.contrastive import Contrastive, mnr, mnr_plus
from research.tasks.section import ContrastiveSection, TaskSection

RNG = np.random.default_rng(0)
OUT = RNG.normal(size=(10, 4)).astype(np.float32)
A, B = OUT[::2].astype(np.float64), OUT[1::2].astype(np.float64)


def batch(count=5, **more):
    lengths = np.tile([[2, 3]], (count, 1))
    pairs = np.arange(count * 2 * 3).reshape(count, 2, 3)
    return {"pairs": jnp.asarray(pairs), "lengths": jnp.asarray(lengths), "domain": jnp.arange(count) % 3, **more}


def nll(logits, target):
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -log_p[np.arange(len(target)), target]


def test_mnr_of_unit_vectors():
    """-log(e / (e + 2)): facts of the paper's loss, a worked value."""
    np.testing.assert_allclose(mnr(jnp.eye(3), jnp.eye(3)), 0.551445, atol=5e-7)
    np.testing.assert_allclose(
        mnr(jnp.asarray(A), jnp.asarray(B), 0.5), nll(A @ B.T / 0.5, np.arange(5)).mean(), rtol=1e-5
    )


def test_mnr_plus_by_hand():
    alike = (A @ A.T + B @ B.T) / 2
    p = np.exp(alike) / np.exp(alike).sum(1, keepdims=True)
    rows, columns = p.argmax(1), p.argmax(0)
    expected = (nll(A @ B.T, rows).mean() + nll((A @ B.T).T, columns).mean()) / 2
    np.testing.assert_allclose(mnr_plus(jnp.asarray(A), jnp.asarray(B)), expected, rtol=1e-5)


def test_targets_of_mnr_plus_are_the_longest_vectors():
    a = jnp.array([[1.0, 0.0], [3.0, 0.0]])
    products = np.array([[1.0, 3.0], [3.0, 9.0]])  # of a and b = a; the first row's target is the second text
    p = np.exp(products) / np.exp(products).sum(1, keepdims=True)
    assert list(p.argmax(1)) == [1, 1] and list(p.argmax(0)) == [0, 1]
    expected = (nll(products, [1, 1]).mean() + nll(products.T, [0, 1]).mean()) / 2
    np.testing.assert_allclose(mnr_plus(a, a), expected, rtol=1e-5)


def test_symmetric_takes_both_directions_and_mnr_plus_is_refused_for_unit_vectors():
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (A, B))
    expected = (nll(a @ b.T / 0.1, np.arange(5)).mean() + nll(b @ a.T / 0.1, np.arange(5)).mean()) / 2
    np.testing.assert_allclose(Contrastive("symmetric", 0.1, True).loss(jnp.asarray(OUT)), expected, rtol=1e-5)
    of_before = Contrastive("mnr_plus", 0.1, True).loss(jnp.asarray(OUT))  # a run of before is judged as it was trained
    np.testing.assert_allclose(of_before, mnr_plus(jnp.asarray(a), jnp.asarray(b), 0.1), rtol=1e-5)
    with pytest.raises(
        UserError,
        match=r"lengths of the vectors, which .*normalize=True.*valid with vectors of length 1: symmetric, mnr",
    ):
        Contrastive.check_new(TaskSection(contrastive=ContrastiveSection(loss="mnr_plus", normalize=True)))


def test_normalised_products_do_not_know_lengths_and_raw_ones_do():
    longer = jnp.asarray(OUT * np.arange(1, 11)[:, None])
    for normalize in (True, False):
        task = Contrastive("mnr", 0.5, normalize)
        assert np.isclose(task.loss(longer), task.loss(jnp.asarray(OUT)), rtol=1e-4) == normalize


def test_inputs_lie_side_by_side_and_training_swaps_about_half():
    task, given = Contrastive(), batch(400)
    tokens, domain, mask = task.inputs(given)
    np.testing.assert_array_equal(tokens[:4], np.arange(12).reshape(4, 3))
    np.testing.assert_array_equal(domain[:6], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(mask[:2], [[True, True, False], [True, True, True]])
    (swapped, domains, masks), target = task.prepare(given, jax.random.key(0))
    turned = np.asarray(swapped[::2, 0] > swapped[1::2, 0])
    assert target is None and 0.4 < turned.mean() < 0.6
    np.testing.assert_array_equal(masks.sum(1).reshape(-1, 2)[:, 0], np.where(turned, 3, 2))
    np.testing.assert_array_equal(np.sort(swapped.reshape(400, -1)), tokens.reshape(400, -1))
    np.testing.assert_array_equal(domains, domain)


def test_metrics_leave_filler_out_as_question_and_as_candidate():
    task = Contrastive("mnr", 0.5, False)
    mask = np.array([1, 1, 1, 0, 0], np.float32)
    out = task.summarize(jax.device_get(task.sums(jnp.asarray(OUT), batch(mask=jnp.asarray(mask)))))
    a, b = A[:3], B[:3]
    cosine = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    np.testing.assert_allclose(out["accuracy"], ((a @ b.T).argmax(1) == np.arange(3)).mean(), rtol=1e-6)
    np.testing.assert_allclose(out["loss"], nll(a @ b.T / 0.5, np.arange(3)).mean(), rtol=1e-5)
    np.testing.assert_allclose(out["positive"], np.diag(cosine).mean(), rtol=1e-5)
    np.testing.assert_allclose(out["negative"], cosine[~np.eye(3, dtype=bool)].mean(), rtol=1e-5)
    assert task.measure(jnp.asarray(np.repeat(np.eye(5, 4)[:4], 2, 0)), batch(4))["accuracy"] == 1


def test_filler_that_is_all_zeros_is_finite():
    task = Contrastive("symmetric", 0.05, True)
    grad = jax.grad(lambda out: task.loss(out))(jnp.zeros((6, 4)))
    sums = task.sums(jnp.zeros((6, 4)), batch(3, mask=jnp.array([1.0, 0.0, 0.0])))
    assert np.isfinite(grad).all() and all(np.isfinite(v) for v in sums.values())


def test_distilling_from_oneself_moves_nothing():
    task, out = Contrastive("mnr", 0.5, True), jnp.asarray(OUT)
    assert np.abs(jax.grad(lambda x: task.distill(x, out))(out)).max() < 1e-6
    assert not np.any(jax.grad(lambda t: task.distill(out, t))(out * 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [(("npair",), "loss='npair'; valid: mnr, symmetric, mnr_plus"), (("mnr", 0.0), "temperature=0.0; valid")],
)
def test_bad_options(fields, message):
    with pytest.raises(UserError, match=message):
        Contrastive(*fields)
