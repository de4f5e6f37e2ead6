"""The backbone of sequence models: patterns, states across pieces, padding on the left, output heads, counts, bad
configs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import registry
from research.models.sequence import take_batch
from research.modules.state import abstract, apply
from tests.models.twins import fast_jit, images, random_arrays, twin

LENGTH = 12
RECURRENT = ("mamba2", "hgrn")


def tiny(pattern, **fields):
    depth = len(pattern.split()) * 2
    small = {kind: registry.entry(f"{kind}_small").tiny.get(kind, {}) for kind in set(pattern.split())}
    base = dict(vocab_size=10, length=LENGTH, dim=16, depth=depth, pattern=pattern)
    return registry.model_config("sequence", **{**base, **{k: v for k, v in small.items() if v}, **fields})


@functools.lru_cache
def hybrid():
    """Config, params, tokens and the logits of all tokens at once."""
    config = tiny("mamba2 hgrn attention", ffn="glu")
    params, _ = random_arrays(config)
    tokens = images(config)
    logits = fast_jit(lambda p, t: apply(config, p, {}, t)[0])(params, tokens)
    return config, params, tokens, logits


def run(config, method):
    return fast_jit(lambda p, *args: apply(config, p, {}, *args, method=method)[0])


def start(config, params, batch, capacity=16):
    return apply(config, params, {}, batch, capacity, method="init_state")[0]


@pytest.mark.slow
def test_pieces_and_steps_give_the_logits_of_the_whole():
    config, params, tokens, whole = hybrid()
    extend, step = run(config, "extend"), run(config, "step")
    first, state = extend(params, tokens[:, :7], start(config, params, 3))
    logits = [first]
    for t in range(7, LENGTH):
        one, state = step(params, tokens[:, t], state)
        logits.append(one[:, None])
    np.testing.assert_allclose(jnp.concatenate(logits, 1), whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())
    assert int(state["position"]) == LENGTH


def test_padding_on_the_left_does_not_change_a_row():
    config, params, tokens, whole = hybrid()
    padded = jnp.pad(tokens[:, : LENGTH - 3], ((0, 0), (3, 0)))
    ids = jnp.broadcast_to(jnp.arange(LENGTH) >= 3, padded.shape).astype(jnp.int32)
    logits, _ = run(config, "extend")(params, padded, start(config, params, 3), ids)
    np.testing.assert_allclose(logits[:, 3:], whole[:, : LENGTH - 3], rtol=1e-4, atol=1e-5 * np.abs(whole).max())


def test_rows_of_a_state_can_be_taken():
    config, params, tokens, _ = hybrid()
    _, state = run(config, "extend")(params, tokens[:, :7], start(config, params, 3))
    step = run(config, "step")
    rows = jnp.array([2, 2, 0])
    mixed, _ = step(params, tokens[rows, 7], take_batch(state, rows))
    plain, _ = step(params, tokens[:, 7], state)
    np.testing.assert_allclose(mixed, plain[rows], rtol=1e-5, atol=1e-6)
    assert np.abs(plain[0] - plain[2]).max() > 1e-3


def test_the_future_does_not_reach_back():
    config, params, tokens, whole = hybrid()
    moved = tokens.at[:, 8].set((tokens[:, 8] + 1) % 10)
    logits = fast_jit(lambda p, t: apply(config, p, {}, t)[0])(params, moved)
    np.testing.assert_allclose(logits[:, :8], whole[:, :8], rtol=1e-5, atol=1e-5)
    assert np.abs(logits[:, 8:] - whole[:, 8:]).max() > 1e-2


def test_vectors_in_numbers_out_and_pooling():
    config = registry.model_config(
        "sequence", vocab_size=0, input_dim=3, output_dim=2, length=6, dim=16, depth=1, pattern="hgrn"
    )
    params, _ = random_arrays(config)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)), jnp.float32)
    tokens = apply(config, params, {}, x)[0]
    assert tokens.shape == (2, 6, 2)
    for pool, reduce in (("last", lambda y: y[:, -1]), ("mean", None)):
        pooled = apply(registry.model_config("sequence", **{**vars(config), "pool": pool}), params, {}, x)[0]
        assert pooled.shape == (2, 2)
        if reduce:
            np.testing.assert_allclose(pooled, reduce(tokens), rtol=1e-5)


@pytest.mark.slow
def test_dropout_is_only_for_training_and_a_function_of_its_key():
    config = tiny("hgrn", dropout=0.5)
    params, _ = random_arrays(config)
    call = lambda mode, seed: apply(config, params, {}, images(config), mode=mode, key=jax.random.key(seed))[0]
    np.testing.assert_array_equal(call("eval", 0), call("eval", 1))
    np.testing.assert_array_equal(call("train", 0), call("train", 0))
    assert np.abs(call("train", 0) - call("train", 1)).max() > 1e-3


def test_wide_is_one_layer_with_the_heads_of_all():
    deep = registry.model_config("attention_small", dim=64, depth=4, attention={"num_heads": 2, "head_dim": 16})
    wide = registry.model_config("attention_small", dim=64, depth=1, attention={"num_heads": 8, "head_dim": 16})
    count = lambda config: {k: v for k, v in abstract(config).params.items() if "/mixer/" in k}
    size = lambda arrays: sum(int(np.prod(v.shape)) for v in arrays.values())
    assert size(count(deep)) == size(count(wide)) == 4 * 4 * 64 * 2 * 16
    assert abstract(wide).num_params() < abstract(deep).num_params()


def test_published_names_cover_both_mambas():
    assert len(registry.list_models("mamba_*b") + registry.list_models("mamba_*m")) == 5
    assert abstract(registry.entry("mamba2_130m").config).num_params() == 128_989_632
    assert twin("mamba_130m").mamba.d_state == 4


def test_shrinking_keeps_what_is_not_cut_derived():
    config = tiny("mamba gla")
    assert config.shrink() == config and config.shrink(depth=0.5).mamba == config.mamba
    small = config.shrink(width=0.5, state=2)
    assert small.mamba.d_inner == 16 and small.mamba.d_state == 2 and small.gla.d_state == 2


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pattern": "mamba gru"}, "names .'gru'.; valid: activator, attention"),
        ({"pattern": ""}, "names no mixer"),
        ({"pattern": "mamba attention", "depth": 3}, "no multiple of the 2 layers"),
        ({"ffn": "glu tree"}, "valid: none, mlp, glu, snnk, moe"),
        ({"vocab_size": 0}, "both input_dim and outputs"),
        ({"mamba": {"stat": 3}}, "no field mamba.stat; valid: d_state"),
        ({"implementation": "fft"}, "fft"),
        (
            {"pattern": "attention", "attention": {"causal": False}},
            "attention.causal=False looks at later tokens; valid where pool=none: True",
        ),
        ({"pattern": "window", "window": {"causal": False}}, "window: causal=False; valid: True"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(UserError, match=message):
        registry.model_config("sequence", **fields)


def crowded(group=0, **fields):
    """A model whose mixtures have so few places that tokens of the whole batch are dropped."""
    moe = dict(
        num_experts=4,
        num_experts_per_tok=1,
        expert="relu",
        ffn_dim=16,
        capacity="megablocks",
        capacity_factor=0.5,
        group_size=group,
    )
    return tiny("hgrn", ffn="moe", depth=1, moe=moe, **fields)


def test_a_batch_of_prompts_is_continued_as_each_prompt_alone():
    """Padded on the left, beside other prompts, through mixtures that drop tokens when they train."""
    config = crowded()
    params, stats = random_arrays(config)
    tokens, ids = images(config), (jnp.arange(LENGTH) >= jnp.array([[3], [5], [0]])).astype(jnp.int32)
    call = lambda method: fast_jit(lambda *args: apply(config, params, stats, *args, method=method)[0])
    extend, step = call("extend"), call("step")
    state = lambda batch: apply(config, params, stats, batch, 16, method="init_state")[0]
    logits, after = extend(tokens, state(3), ids)
    more, _ = step(tokens[:, 0], after)
    alone, own = extend(tokens[1:2, 5:], state(1))
    one, _ = step(tokens[1:2, 0], own)
    np.testing.assert_allclose(logits[1, 5:], alone[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(more[1:2], one, rtol=1e-5, atol=1e-5)
    dropping = fast_jit(lambda tokens: apply(config, params, stats, tokens)[0])(tokens)
    assert np.abs(dropping[2] - logits[2]).max() > 1e-2


@pytest.mark.parametrize("pool", ["none", "mean", "last"])
def test_filler_and_padding_are_nothing_to_mixtures_and_pooling(pool):
    config = crowded(pool=pool, output_dim=3)
    params, stats = random_arrays(config)
    model = fast_jit(lambda tokens, real: apply(config, params, stats, tokens, real=real)[0])
    tokens, real = images(config), jnp.arange(LENGTH) < jnp.array([[7], [0], [0]])
    beside = model(tokens, real)[0]
    alone = model(tokens[:1, :7], None)[0]
    np.testing.assert_allclose(beside[:7] if pool == "none" else beside, alone, rtol=1e-5, atol=1e-5)
