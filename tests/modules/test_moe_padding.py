"""Mixtures of experts do not see what is not real: padding, the filler of an evaluation batch, what fills up a
group."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.modules.axes import Init
from research.modules.mixers.base import Call
from research.modules.moe import OBSERVED, MoeFfn
from research.modules.moe_options import FAMILIES
from research.modules.state import merge, split
from tests.models.twins import fast_jit
from tests.modules.test_moe import WIDTH, small
from tests.ops.compare import assert_agree

TIGHT = dict(capacity_factor=0.7, eval_capacity_factor=0.5)
"""So few places that tokens are dropped where there is a capacity."""
TEXT = np.random.default_rng(0).normal(0.7, size=(2, 9, WIDTH)).astype(np.float32)
IDS = np.arange(18, dtype=np.int32).reshape(2, 9) * 7


def padded(total):
    """(x [3, total, D], which tokens are real, ids): the texts padded on the right and on the left, then an example of
    filler."""
    x = 3 * np.random.default_rng(total).normal(size=(3, total, WIDTH)).astype(np.float32)
    real, ids = np.zeros((3, total), bool), np.full((3, total), 3, np.int32)
    for row, here in enumerate((slice(0, 9), slice(total - 9, total))):
        x[row, here], real[row, here], ids[row, here] = TEXT[row], True, IDS[row]
    return x, real, ids


def scaled(spec):
    """(graphdef, params, stats), the kernels so large that outputs are about 1 and routers prefer some experts."""
    ffn = MoeFfn(spec, WIDTH, ("embed", "layer/mlp"), "layer", Init(jax.random.key(0)), "grouped_matmul=naive")
    graphdef, params, stats, _ = split(ffn)
    return graphdef, {k: v if k == "slot_scale" else 20 * v for k, v in params.items()}, stats


def run(spec, x, real, ids):
    """(outputs of real tokens, statistics, gradients) of their squares and the losses; there is no key, so there is no
    noise."""
    graphdef, params, stats = scaled(spec)
    counted = np.ones(x.shape[:2], bool) if real is None else np.broadcast_to(real.reshape(len(x), -1), x.shape[:2])

    def loss(params, x):
        live = merge(graphdef, params, stats)
        y = live(x, Call("train", tokens=ids, domain=jnp.arange(len(x)) % 8, real=real))
        after = split(live)[2]
        return jnp.square(jnp.where(counted[..., None], y, 0)).sum() + after["aux_loss"], (y, after)

    (_, (y, after)), grads = fast_jit(jax.value_and_grad(loss, has_aux=True))(params, x)
    return np.asarray(y)[counted], after, grads


def same(actual, expected):
    """Outputs and statistics to 1e-6 of the largest, gradients, sums over all tokens, to 1e-5."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_agree(a, b, 1e-5 if i == 2 else 1e-6, floor=1)


@pytest.mark.slow_unless("domain", "expert_choice", "gshard", "qwen3", "soft", "st_moe")
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_filler_are_nothing(family):
    """Outputs of real tokens, losses, loads, what is observed and gradients: padded to 64 beside filler, and as they
    are."""
    more = TIGHT if FAMILIES[family].capacity != "none" else {}
    spec = small(family, z_loss_coef=1e-3, balance_loss_coef=0.01, **more)
    found = run(spec, *padded(64))
    same(found, run(spec, TEXT, None, IDS))
    assert np.abs(found[0]).max() > 0.1
    assert spec.router == "soft" or (found[1]["load"].sum() > 0.5 and found[1]["observed"].any())
    assert spec.capacity == "none" or found[1]["observed"][OBSERVED.index("dropped")] > 0.05


def test_texts_of_several_lengths_do_not_depend_on_the_padding():
    spec = small("v_moe", z_loss_coef=1e-3, balance_loss_coef=0.01, balance_groups=True, group_size=2, **TIGHT)
    found = []
    for total in (16, 64):
        x, real, ids = padded(total)
        found.append(run(spec, x, real & (np.cumsum(real, 1) <= np.array([[9], [5], [0]])), ids))
    same(*found)


@pytest.mark.parametrize("mode", ["told", "cut"])
def test_a_group_that_does_not_divide_the_batch_keeps_its_size(mode):
    """Five sequences in groups of two are two groups and a rest of one, not five groups."""
    spec, x = small("switch", group_size=2, **TIGHT), np.concatenate([TEXT, TEXT[::-1, ::-1], 2 * TEXT[:1]])
    real = np.ones(5, bool) if mode == "told" else None
    together = run(spec, x, real, None)[0].reshape(x.shape)
    for rows in (slice(0, 2), slice(4, 5)):
        same([together[rows].reshape(-1, WIDTH)], run(spec, x[rows], None, None)[:1])


def test_what_continues_from_a_state_is_never_dropped():
    spec = small("switch", group_size=0, **TIGHT)
    ffn, free = (merge(*scaled(s)) for s in (spec, dataclasses.replace(spec, capacity="none")))
    carried = ffn(TEXT, Call(carried=True))
    same([carried], [free(TEXT, Call())])
    same([carried[:, 3]], [ffn(TEXT[:, 3], Call(carried=True))])
    assert np.abs(carried - ffn(TEXT, Call())).max() > 1e-3
