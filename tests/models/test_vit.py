"""ViT and DeiT against a reference implementation written head by head, in outputs and gradients; drop path,
distillation, mistakes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import registry
from research.models.vit import ViTConfig
from research.modules.moe_options import FAMILIES
from research.modules.state import abstract, apply
from research.train.costs import forward_flops
from tests.models.twins import fast_jit, images, random_arrays

CONFIG = ViTConfig(
    dim=24, depth=2, num_heads=3, head_dim=5, mlp_dim=40, patch_size=3, image_size=6, num_classes=7, distilled=True
)


def naive_norm(x, scale, bias):
    mean = sum(x[..., i] for i in range(x.shape[-1])) / x.shape[-1]
    var = sum((x[..., i] - mean) ** 2 for i in range(x.shape[-1])) / x.shape[-1]
    return (x - mean[..., None]) / jnp.sqrt(var[..., None] + 1e-6) * scale + bias


def naive_attention(p, x, heads, head_dim):
    """One head at a time, one query at a time, on one example [T, D]."""
    y = p["out/bias"]
    for h in range(heads):
        q, k, v = (x @ p[f"{n}/kernel"][:, h] + p[f"{n}/bias"][h] for n in ("query", "key", "value"))
        rows = []
        for t in range(x.shape[0]):
            logits = k @ q[t] / head_dim**0.5
            weights = jnp.exp(logits - logits.max())
            rows.append(weights / weights.sum() @ v)
        y = y + jnp.stack(rows) @ p["out/kernel"][h]
    return y


def naive_vit(params, image, config):
    """Returns (class logits, distillation logits) of one image [H, W, C]."""
    n = config.patch_size
    patches = [
        image[i : i + n, j : j + n].reshape(-1)
        for i in range(0, config.image_size, n)
        for j in range(0, config.image_size, n)
    ]
    kernel = params["patches/kernel"].reshape(-1, config.dim)
    tokens = [params["cls_token"], params["dist_token"]] + [p @ kernel + params["patches/bias"] for p in patches]
    x = jnp.stack(tokens) + params["positions"]
    for i in range(config.depth):
        prefix = "blocks/layer/"
        p = {k.removeprefix(prefix): v[i] for k, v in params.items() if k.startswith(prefix)}
        attention = {k.removeprefix("attention/"): v for k, v in p.items() if k.startswith("attention/")}
        x = x + naive_attention(
            attention, naive_norm(x, p["norm1/scale"], p["norm1/bias"]), config.num_heads, config.head_dim
        )
        h = naive_norm(x, p["norm2/scale"], p["norm2/bias"]) @ p["mlp/up/kernel"] + p["mlp/up/bias"]
        h = h * (1 + jax.lax.erf(h / 2**0.5)) / 2
        x = x + h @ p["mlp/down/kernel"] + p["mlp/down/bias"]
    x = naive_norm(x, params["norm/scale"], params["norm/bias"])
    return tuple(
        x[t] @ params[f"{head}/kernel"] + params[f"{head}/bias"] for t, head in enumerate(("head", "dist_head"))
    )


@pytest.mark.slow
def test_agrees_with_the_naive_twin_in_outputs_and_gradients():
    with jax.enable_x64(True):
        params, _ = random_arrays(CONFIG, dtype=np.float64)
        x = images(CONFIG, 2, dtype=np.float64)
        weights = jnp.cos(jnp.arange(28.0)).reshape(2, 2, 7)
        ours = lambda p, x: jnp.stack(apply(CONFIG, p, {}, x, method="both_heads")[0])
        naive = lambda p, x: jnp.stack([jnp.stack(naive_vit(p, image, CONFIG)) for image in x], 1)

        def total(f, p, x):
            y = f(p, x)
            return (y * weights).sum(), y

        results = []
        for f in (ours, naive):
            grad = jax.value_and_grad(functools.partial(total, f), argnums=(0, 1), has_aux=True)
            (value, y), grads = fast_jit(grad)(params, x)
            results.append((value, y, grads))
        np.testing.assert_allclose(results[0][1], results[1][1], rtol=0, atol=1e-12)
        for a, b in zip(*(jax.tree.leaves(r[2]) for r in results), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)
        logits = fast_jit(functools.partial(apply, CONFIG))(params, {}, x)[0]
        np.testing.assert_allclose(logits, results[1][1].mean(0), rtol=0, atol=1e-12)


def test_drop_path_needs_training_and_a_key_and_keeps_examples_apart():
    config = ViTConfig(
        dim=16, depth=4, num_heads=2, head_dim=8, patch_size=4, image_size=8, num_classes=5, drop_path_rate=0.9
    )
    params, _ = random_arrays(config)
    x = jnp.broadcast_to(images(config, 1), (16, 8, 8, 3))
    run = lambda mode, key: np.asarray(fast_jit(functools.partial(apply, config, mode=mode))(params, {}, x, key=key)[0])
    calm = run("eval", jax.random.key(0))
    np.testing.assert_allclose(calm, np.broadcast_to(calm[:1], calm.shape), rtol=1e-5)
    np.testing.assert_array_equal(run("train", None), calm)
    dropped = run("train", jax.random.key(0))
    assert np.abs(dropped - dropped[:1]).max() > 0.1
    np.testing.assert_array_equal(run("train", jax.random.key(0)), dropped)
    assert np.abs(run("train", jax.random.key(1)) - dropped).max() > 0.1


def test_bfloat16_runs_and_stays_near_float32():
    params, _ = random_arrays(CONFIG)
    x = images(CONFIG)
    y = fast_jit(functools.partial(apply, CONFIG))(params, {}, x)[0]
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    z = fast_jit(functools.partial(apply, CONFIG))(low[0], {}, low[1])[0]
    assert z.dtype == jnp.bfloat16 and np.abs(z.astype(jnp.float32) - y).max() < 0.05 * np.abs(y).max()


def test_shapes_of_the_parameters():
    shapes = abstract(registry.entry("deit_tiny_distilled_patch16_224").config)
    assert shapes.params["blocks/layer/attention/query/kernel"].shape == (12, 192, 3, 64)
    assert shapes.axes["blocks/layer/attention/query/kernel"] == ("layers", "embed", "layer/heads", "layer/qk/head_dim")
    assert shapes.axes["blocks/layer/attention/out/kernel"] == ("layers", "layer/heads", "layer/v/head_dim", "embed")
    assert shapes.params["positions"].shape == (198, 192) and shapes.axes["positions"] == ("tokens", "embed")
    assert shapes.params["patches/kernel"].shape == (16, 16, 3, 192) and shapes.params["cls_token"].shape == (192,)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"image_size": 225}, r"image_size=225 is no multiple of patch_size=16; valid patch sizes: \[3, 5, 9"),
        ({"num_heads": 0}, "num_heads=0; valid: whole numbers from 1"),
        ({"kept_layers": (0, 1)}, "one entry for each of 12 repetitions"),
    ],
)
def test_bad_configs_are_refused_in_one_line(bad, message):
    with pytest.raises(UserError, match=message) as error:
        registry.model_config("vit_tiny_patch16_224", **bad)
    assert "\n" not in str(error.value)


MIXED = dataclasses.replace(
    CONFIG, distilled=False, depth=6, kept_layers=(), dense_blocks=2, ffn="mlp moe",
    moe=dataclasses.replace(FAMILIES["v_moe"], num_experts=4, ffn_dim=20, capacity="none"),
)  # fmt: skip


@pytest.mark.slow
def test_mixtures_stand_in_every_second_block_of_the_last_ones():
    """Blocks 3 and 5 have mixtures, all in their order: with a mixture's output at zero, its block is one without
    FFN."""
    params, stats = random_arrays(MIXED)
    assert MIXED.layer_places() == (
        ("dense_blocks/layer", 0), ("dense_blocks/layer", 1), ("blocks/layer/blocks/0", 0),
        ("blocks/layer/blocks/1", 0), ("blocks/layer/blocks/0", 1), ("blocks/layer/blocks/1", 1),
    )  # fmt: skip
    assert (
        params["blocks/layer/blocks/1/mlp/up"].shape == (2, 4, 24, 20) and "blocks/layer/blocks/0/mlp/up" not in params
    )
    silent = {k: jnp.zeros_like(v) if "blocks/1/mlp/down" in k else v for k, v in params.items()}
    plain = dataclasses.replace(MIXED, ffn="mlp", dense_blocks=0, kept_layers=(), kept_dense=())
    stacked = {}
    for name, shape in abstract(plain).params.items():
        suffix = name.removeprefix("blocks/layer/")
        if suffix == name:
            stacked[name] = silent[name]
            continue
        empty = jnp.zeros(shape.shape[1:])
        stacked[name] = jnp.stack(
            [silent[f"{p}/{suffix}"][i] if f"{p}/{suffix}" in silent else empty for p, i in MIXED.layer_places()]
        )
    image = images(MIXED, 2)
    mixed = fast_jit(lambda x: apply(MIXED, silent, stats, x)[0])(image)
    np.testing.assert_allclose(mixed, fast_jit(lambda x: apply(plain, stacked, {}, x)[0])(image), rtol=0, atol=1e-5)
    # The same branches drop, at the same rates, under the same key.
    deep = [dataclasses.replace(config, drop_path_rate=0.6) for config in (MIXED, plain)]
    run = lambda config, arrays, s: fast_jit(lambda x, key: apply(config, arrays, s, x, mode="train", key=key)[0])(
        image, jax.random.key(2)
    )
    dropped = run(deep[0], silent, stats)
    np.testing.assert_allclose(dropped, run(deep[1], stacked, {}), rtol=0, atol=1e-5)
    assert np.abs(np.asarray(dropped - mixed)).max() > 1e-3
    heard = fast_jit(lambda x: apply(MIXED, params, stats, x)[0])(image)
    assert np.abs(np.asarray(heard - mixed)).max() > 1e-3


def test_smaller_selves_of_mixed_depths():
    small = MIXED.shrink(depth=0.5, experts=2, active=1, ffn=0.5)
    assert (small.depth, small.dense_blocks, small.kept_layers, small.kept_dense) == (3, 1, (0,), (0,))
    assert (small.mixture.num_experts, small.mixture.num_experts_per_tok, small.mixture.ffn_dim) == (2, 1, 8)
    assert MIXED.shrink(depth=3).depth == 3
    with pytest.raises(UserError, match="give a fraction"):
        MIXED.shrink(depth=4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"ffn": "glu"}, "valid: mlp and moe"),
        ({"dense_blocks": 3}, "no multiple of the FFNs"),
        ({"moe": dataclasses.replace(FAMILIES["v_moe"], num_experts_per_tok=9)}, "moe: num_experts_per_tok=9"),
        ({"moe": FAMILIES["hash"]}, "tokens of a vocabulary"),
    ],
)
def test_mixtures_that_do_not_fit_are_told(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(MIXED, kept_layers=(), **fields)


def test_flops_are_those_of_a_whole_group():
    """Places are rounded up once for the tokens of a group, not for those of each image."""
    moe = dataclasses.replace(FAMILIES["v_moe"], num_experts=4, ffn_dim=20, eval_capacity_factor=0.0)
    grouped, alone = (
        forward_flops(dataclasses.replace(MIXED, kept_layers=(), moe=dataclasses.replace(moe, group_size=g)))
        for g in (8, 1)
    )
    # A group of 8 images has 40 tokens: 21 places by the rule, 24 by its rounding; one image has 5 tokens: 3, rounded
    # to 4.
    assert alone - grouped == 2 * 2 * 4 * 24 * 20 * 2 * (4 * 8 - 24) // 8
