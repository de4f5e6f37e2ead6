"""Cross-scan and cross-merge against the index arithmetic of their definition; the one is the other's transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.cross_scan import cross_merge, cross_scan
from tests.ops.compare import draw

SHAPES = [(2, 3, 4, 5), (1, 5, 2, 1), (3, 1, 4, 2), (1, 1, 1, 1)]


def place(direction, step, height, width):
    """Row and column of a step: an independent statement of the order."""
    if direction >= 2:
        step = height * width - 1 - step
    return divmod(step, width) if direction % 2 == 0 else divmod(step, height)[::-1]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_is_where_the_definition_says(shape):
    batch, height, width, channels = shape
    x = draw(shape, 0)
    walks = np.asarray(cross_scan(jnp.asarray(x)))
    assert walks.shape == (4, batch, height * width, channels)
    merged = np.zeros(shape, np.float32)
    y = draw(walks.shape, 1)
    for direction in range(4):
        for step in range(height * width):
            i, j = place(direction, step, height, width)
            np.testing.assert_array_equal(walks[direction, :, step], x[:, i, j])
            merged[:, i, j] += y[direction, :, step]
    np.testing.assert_allclose(cross_merge(jnp.asarray(y), height, width), merged, rtol=0, atol=1e-6)


def test_the_four_orders_of_a_small_map():
    walks = np.asarray(cross_scan(jnp.arange(6.0).reshape(1, 2, 3, 1)))[:, 0, :, 0]
    np.testing.assert_array_equal(
        walks, [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_merge_of_scan_is_four_times_the_map_and_the_transpose(shape):
    x = jnp.asarray(draw(shape, 2))
    np.testing.assert_array_equal(cross_merge(cross_scan(x), *shape[1:3]), 4 * x)
    y = jnp.asarray(draw((4, shape[0], shape[1] * shape[2], shape[3]), 3))
    np.testing.assert_array_equal(jax.vjp(cross_scan, x)[1](y)[0], cross_merge(y, *shape[1:3]))
    np.testing.assert_array_equal(jax.vjp(lambda y: cross_merge(y, *shape[1:3]), y)[1](x)[0], cross_scan(x))


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"cross_scan: x has shape \(2, 3, 4\); expected \[B H W C\]"):
        cross_scan(jnp.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"cross_merge: y has shape \(4, 1, 7, 2\); expected \[4 B 6 C\]"):
        cross_merge(jnp.zeros((4, 1, 7, 2)), 2, 3)
    with pytest.raises(ValueError, match=r"cross_merge: y has shape \(2, 1, 6, 2\)"):
        cross_merge(jnp.zeros((2, 1, 6, 2)), 2, 3)
