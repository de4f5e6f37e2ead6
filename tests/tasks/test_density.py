"""Counting: weights of the seven maps, the mask, the local counting loss against a loop, metrics with padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.tasks.density import WEIGHTS, DensityCounting, density_loss, local_counting_loss, mask_loss

RNG = np.random.default_rng(0)


def batch_and_outputs(size=3, side=48):
    density = np.zeros((size, side, side), np.float32)
    for i in range(size):
        density[i, RNG.integers(0, side, 4 + i), RNG.integers(0, side, 4 + i)] += 1
    outputs = RNG.normal(size=(size, side, side, 8)).astype(np.float32)
    return {"image": jnp.zeros((size, side, side, 1)), "density": jnp.asarray(density)}, jnp.asarray(outputs)


def test_each_map_counts_with_its_weight():
    assert WEIGHTS == (1, 1, 1, 2, 2, 2, 4)
    target = jnp.asarray(RNG.random((2, 4, 4, 1)), jnp.float32)
    for j, weight in enumerate((1, 1, 1, 2, 2, 2, 4)):
        maps = jnp.tile(target, (1, 1, 1, 7)).at[..., j].add(0.5)
        assert float(density_loss(maps, target)) == pytest.approx(weight * 0.25 * 16, rel=1e-5)


def test_loss_by_hand():
    batch, outputs = batch_and_outputs()
    _, target = DensityCounting().prepare(batch, jax.random.key(0))
    np.testing.assert_allclose(target, 100 * batch["density"])
    o, t = np.asarray(outputs, np.float64), np.asarray(target, np.float64)
    squares = sum(w * ((o[..., j] - t) ** 2).sum() for j, w in enumerate([1, 1, 1, 2, 2, 2, 4])) / 3
    p = 1 / (1 + np.exp(-o[..., 7]))
    entropy = -np.where(t > 1e-3, np.log(p), np.log(1 - p)).sum() / 3  # of pixels, per image, as the squares are
    np.testing.assert_allclose(mask_loss(outputs[..., 7], (target > 1e-3) * 1.0), entropy, rtol=1e-5)
    np.testing.assert_allclose(DensityCounting().loss(outputs, target), squares + entropy, rtol=1e-5)
    local = DensityCounting(local=0.5).loss(outputs, target) - DensityCounting().loss(outputs, target)
    np.testing.assert_allclose(local, 0.5 * naive_local(o, t), rtol=1e-2)


def naive_local(maps, target, side=16):
    total = 0.0
    for image, true in zip(maps, target, strict=True):
        corners = [(y, x) for y in range(0, len(true), side) for x in range(0, len(true), side)]
        cut = lambda a, y, x: a[y : y + side, x : x + side]
        for j in range(7):
            rows = [
                (
                    ((cut(image, y, x)[..., j] - cut(true, y, x)) ** 2).sum(),
                    cut(image, y, x)[..., j].sum(),
                    cut(true, y, x).sum(),
                )
                for y, x in corners
            ]
            hard = sorted(rows, key=lambda r: -r[0])[:9]
            p = [r[1] for r in sorted(hard, key=lambda r: -r[2])]
            d = [(p[i] - p[i + 3], p[i] - p[i + 6]) for i in range(3)]
            ranks = sum(max(-d1, 0) + max(-d2, 0) + max(d1 - d2, 0) for d1, d2 in d)
            total += 2 ** (j // 3) * (ranks + sum(r[0] for r in hard))
    return total / len(maps)


def test_local_counting_loss_agrees_with_a_loop_and_orders_regions():
    maps, target = (RNG.random(shape).astype(np.float32) for shape in ((2, 64, 64, 7), (2, 64, 64)))
    np.testing.assert_allclose(
        local_counting_loss(jnp.asarray(maps), jnp.asarray(target)), naive_local(maps, target), rtol=1e-4
    )
    perfect = jnp.tile(jnp.asarray(target)[..., None], 7)
    assert float(local_counting_loss(perfect, jnp.asarray(target))) < 1e-6
    with pytest.raises(ValueError, match="fewer than three regions"):
        local_counting_loss(jnp.zeros((1, 16, 32, 7)), jnp.zeros((1, 16, 32)))


def test_local_counting_loss_moves_counts_by_their_order_alone():
    """Every pixel of a region has one slope, and the squared errors, which are there, have none (released code)."""
    maps, target = (jnp.asarray(RNG.random(shape), jnp.float32) for shape in ((1, 48, 48, 7), (1, 48, 48)))
    slope = np.asarray(jax.grad(local_counting_loss)(maps, target))[0]
    blocks = slope.reshape(3, 16, 3, 16, 7)
    assert np.ptp(blocks, axis=(1, 3)).max() == 0 and np.abs(slope).max() > 0


def test_metrics_leave_padding_out():
    batch, outputs = batch_and_outputs()
    task = DensityCounting(mean_count=5.0)
    true, found = np.array([4.0, 5, 6]), np.asarray(outputs[..., 6]).sum((1, 2)) / 100
    sums = task.sums(outputs, {**batch, "mask": jnp.array([1.0, 1, 0])})
    got = task.summarize({k: float(v) for k, v in sums.items()})
    errors = (found - np.asarray(batch["density"]).sum((1, 2)))[:2]
    np.testing.assert_allclose([got["mae"], got["rmse"]], [np.abs(errors).mean(), (errors**2).mean() ** 0.5], rtol=1e-4)
    assert got["mae_of_mean"] == pytest.approx(np.abs(5 - true)[:2].mean())
    whole = task.summarize(task.sums(outputs, batch))["loss"]
    np.testing.assert_allclose(whole, task.loss(outputs, task.prepare(batch, jax.random.key(0))[1]), rtol=1e-4)
    np.testing.assert_allclose(
        task.measure(outputs, batch)["mae"], np.abs(found - np.asarray(batch["density"]).sum((1, 2))).mean(), rtol=1e-4
    )
    assert not task.higher_is_better


def test_a_network_that_agrees_with_its_teacher_has_the_least_loss():
    _, outputs = batch_and_outputs()
    task = DensityCounting()
    slope = jax.grad(lambda o: task.distill(o, outputs, None))(outputs)
    assert np.abs(slope).max() < 1e-6
    assert float(task.distill(outputs + 0.1, outputs, None)) > float(task.distill(outputs, outputs, None)) + 1
    assert (jax.grad(lambda t: task.distill(outputs, t, None))(outputs + 0.1) == 0).all()
