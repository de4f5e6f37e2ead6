"""Products whose order or exponent is read off are exact on accelerators too: what is lowered for cuda and tpu asks for
the highest precision."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.modules.axes import Init
from research.modules.embedding import Embedding
from research.modules.gaussian_mixture import GaussianMixtureHead
from research.modules.mixers.base import Call
from research.modules.mixers.gla import GatedLinearAttention
from research.modules.mixers.mamba import Mamba
from research.modules.mixers.mamba2 import Mamba2
from research.modules.moe import MoeFfn
from research.modules.moe_options import FAMILIES
from research.modules.routed_conv import ImageRouter
from research.modules.state import merge, split
from research.ops import routing_attention
from research.tasks.contrastive import Contrastive
from tests.modules.test_moe import WIDTH, small

EXPERTS = 7
"""A size that nothing else has, by which products with the router's outputs are found."""
INIT = Init(jax.random.key(0))


def products(function, *args):
    """(result type, whether it is exact) of every product and convolution of the function and its gradient, lowered for
    cuda and tpu."""
    loss = lambda *args: sum(jnp.sin(y).sum() for y in jax.tree.leaves(function(*args)))
    traced = jax.jit(jax.value_and_grad(loss)).trace(*args)
    found = []
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        lines = [line for line in text.splitlines() if "dot_general" in line or "stablehlo.convolution" in line]
        found += [(line, line.count("HIGHEST") == 2) for line in lines]
    assert found
    return found


def with_size(found, size):
    """Those of which an operand or the result has axes of `size`; with "<" before it, no others before them."""
    return [
        (line, exact)
        for line, exact in found
        if re.search(rf"{size}x" if str(size).startswith("<") else rf"[<x]{size}x", line.partition(" : ")[2])
    ]


def of(module, *args):
    graphdef, params, stats, _ = split(module)
    return products(lambda params: merge(graphdef, params, stats)(*args), params)


@pytest.mark.parametrize("family", [name for name, spec in FAMILIES.items() if spec.router not in ("hash", "domain")])
def test_routers_are_exact_on_accelerators(family):
    """Of experts whose own products are batched or grouped, those with E outputs are the router's (and the noise's, the
    slots')."""
    spec = small(
        family,
        num_experts=EXPERTS,
        num_expert_groups=1,
        topk_groups=1,
        learned_noise=family == "v_moe",
        balance_loss_coef=0.01,
    )
    ffn = MoeFfn(spec, WIDTH, ("embed", "layer/mlp"), "layer", INIT)
    found = with_size(of(ffn, jnp.ones((2, 5, WIDTH)), Call("train", jax.random.key(0))), f"<{WIDTH}x{EXPERTS}")
    assert len(found) >= (4 if family == "v_moe" else 2)
    assert all(exact for _, exact in found), found


def contrastive(name):
    task = Contrastive(name)
    return lambda x: (task.loss(x), task.distill(x, x + 1), task.sums(x, {}))


TEXTS, HEADS = np.ones((6, 4), np.float32), np.ones((1, 5, 2, 4), np.float32)
CASES = {
    "contrastive": lambda: products(contrastive("mnr"), TEXTS),
    "contrastive, targets of the batch": lambda: products(contrastive("mnr_plus"), TEXTS),
    "mixture of Gaussians": lambda: of(
        GaussianMixtureHead((4, 3, 2, 5), ("embed", "input"), "policy", INIT), TEXTS, TEXTS[:, :3]
    ),
    "router of images": lambda: of(ImageRouter(3, (4, 6), (1, 1), 3, INIT), jnp.ones((2, 8, 8, 3)), "train"),
    "embedding": lambda: of(Embedding(9, 4, INIT), jnp.zeros(3, jnp.int32)),
    "k-means": lambda: products(lambda x: routing_attention.commitment_loss(x, jnp.ones((2, 3, 4))), HEADS),
    "steps of Mamba": lambda: with_size(
        of(Mamba(dt_rank=3).resolve(16).build(16, 8, "layer", INIT, "naive"), jnp.ones((1, 4, 16)), Call()), "3x32"
    ),
    "steps of Mamba-2": lambda: with_size(
        of(
            Mamba2(d_state=4, head_dim=4).resolve(14).build(14, 8, "layer", INIT, "naive"), jnp.ones((1, 4, 14)), Call()
        ),
        "<14x7",
    ),
    "decays of gated linear attention": lambda: with_size(
        of(
            GatedLinearAttention(num_heads=2, gate_low_rank_dim=3).resolve(16).build(16, 8, "layer", INIT, "naive"),
            jnp.ones((1, 4, 16)),
            Call(),
        ),
        3,
    ),
}


@pytest.mark.slow_unless("embedding", "mixture of Gaussians", "steps of Mamba")
@pytest.mark.parametrize("name", CASES)
def test_what_must_not_be_rounded_is_not(name):
    found = CASES[name]()
    assert found and all(exact for _, exact in found), [line for line, exact in found if not exact]
