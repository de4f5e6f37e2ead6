"""The smaller ops lower for cuda and tpu from a CPU, with their gradients; the large ones have the same test in files
of their own."""

import jax
import jax.numpy as jnp
import pytest

from research.ops import batch_norm, depthwise, feature_maps, gelu_grn, reparam_conv, segment_sums, unit_lower
from research.ops.spread import spread
from tests.ops.compare import assert_agree, assert_lowers_everywhere, draw

MAPS, CHANNEL = draw((2, 6, 5, 4), 0), draw((4,), 1)
KERNELS = draw((5, 5, 4), 2), draw((3, 3, 4), 3)
SCALES = draw((2, 4), 4)

CASES = {
    "batch_norm": (lambda x, s: batch_norm.batch_norm(x, s, s, 1e-5)[0], MAPS, CHANNEL),
    "gelu_grn": (lambda x, s: gelu_grn.gelu_grn(x, s, s, 1e-6), MAPS, CHANNEL),
    "reparam_conv": (
        lambda x, a, b, s: reparam_conv.reparam_conv(x, (a, b), (1, 2), s, s, 1e-5)[0],
        MAPS,
        *KERNELS,
        SCALES,
    ),
    "depthwise_conv2d_multi": (lambda x, a, b: depthwise.depthwise_conv2d_multi(x, (a, b), (1, 2)), MAPS, *KERNELS),
    "elu_plus_one": (feature_maps.elu_plus_one, MAPS),
    "taylor": (feature_maps.taylor, MAPS),
    "cos_reweighted": (lambda x: feature_maps.cos_reweighted(x, jnp.arange(5), 8), draw((2, 5, 1, 4), 5)),
    "segment_sum": (lambda x: jnp.exp(segment_sums.segment_sum(x)), -abs(draw((2, 9), 6))),
    "unit_lower_inverse": (unit_lower.unit_lower_inverse, draw((2, 8, 8), 7)),
    "spread": (lambda x: spread(x, -2, 3), draw((2, 1, 4), 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_lowers_for_accelerators(name):
    function, *args = CASES[name]
    assert_lowers_everywhere(function, *args)


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_spread_is_a_broadcast_with_a_sum_for_its_gradient(axis):
    shape = [2, 3, 4]
    shape[axis] = 1
    x, weights = draw(shape, 0), draw([5 if i == 3 + axis else n for i, n in enumerate(shape)], 1)
    loss = lambda f: lambda x: (f(x) * weights).sum()
    broadcast = lambda x: jnp.broadcast_to(x, weights.shape)
    assert_agree(spread(jnp.asarray(x), axis, 5), broadcast(x), 0.0)
    assert_agree(
        jax.grad(loss(lambda x: spread(x, axis, 5)))(jnp.asarray(x)), jax.grad(loss(broadcast))(jnp.asarray(x)), 1e-6
    )
