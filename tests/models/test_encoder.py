"""The domain-routed encoder: what a domain chooses, the token at position 0, padding, extension of a dense one, counts,
errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import registry
from research.models.encoder import EncoderConfig
from research.modules.moe_options import Moe
from research.modules.state import abstract, apply, initialize
from research.nested.upcycle import upcycle
from research.train.costs import forward_flops, static_costs
from tests.models.twins import fast_jit, random_arrays, twin

TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 10, (6, 12)), jnp.int32)
DOMAIN = jnp.array([0, 1, 2, 3, 4, 2])


def tiny(name="domain_encoder_small", **fields):
    return twin(name, **{"num_domains": 5, **fields})


def arrays(config):
    params, _ = random_arrays(config)
    return params


@functools.lru_cache
def compiled(config, **kwargs):
    return fast_jit(functools.partial(apply, config, **kwargs))


def run(config, params, *args, **kwargs):
    stats = {k: jnp.zeros(s.shape) for k, s in abstract(config).stats.items()}
    return np.asarray(compiled(config, **kwargs)(params, stats, *args)[0])


@functools.lru_cache
def dense(domains: int):
    config = tiny("encoder_small", num_domains=domains)
    return config, arrays(config)


def extend(base, params, config):
    return upcycle(base, params, {}, config, jax.random.key(0))


@pytest.mark.slow
def test_extended_encoder_is_the_dense_one_for_every_domain():
    """Check 32 of the method: copies of one FFN under tokens that are alike are the base, whatever the
    domain."""
    base, params = dense(1)
    config = tiny()
    extended, stats = extend(base, params, config)
    assert {k: v.shape for k, v in extended.items()} == {k: s.shape for k, s in abstract(config).params.items()}
    assert set(stats) == set(abstract(config).stats)
    whole = run(base, params, TOKENS[:1])
    for domain in range(5):
        np.testing.assert_allclose(run(config, extended, TOKENS[:1], jnp.array([domain])), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_extension_takes_tokens_of_several_domains_and_single_experts():
    base, params = dense(5)
    extended, _ = extend(base, params, tiny())
    expected = run(base, params, TOKENS, DOMAIN)
    assert np.ptp(expected[:, 0]) > 0.1
    np.testing.assert_allclose(run(tiny(), extended, TOKENS, DOMAIN), expected, rtol=1e-5, atol=1e-6)
    one = tiny(num_domains=1)
    params = arrays(one)
    extended, _ = extend(one, params, tiny())
    np.testing.assert_allclose(run(tiny(), extended, TOKENS, DOMAIN), run(one, params, TOKENS), rtol=1e-5, atol=1e-6)


def test_an_expert_of_its_own_is_spliced_in():
    """The dense encoder with the chosen expert's weights is the oracle of each domain."""
    config = tiny()
    params = arrays(config)
    vectors, base = run(config, params, TOKENS, DOMAIN), tiny("encoder_small")
    for i, domain in enumerate(np.asarray(DOMAIN)):
        chosen = {k: v[:, domain] if "/ffn/" in k else v for k, v in params.items()}
        np.testing.assert_allclose(
            run(base, chosen, TOKENS[i : i + 1], DOMAIN[i : i + 1])[0], vectors[i], rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
def test_a_domain_gives_gradients_to_its_expert_alone():
    config = tiny()
    params, stats = random_arrays(config)
    loss = lambda p, domain: jnp.square(apply(config, p, stats, TOKENS[:2], domain, mode="train")[0]).sum()
    grads = fast_jit(jax.grad(loss))(params, jnp.array([3, 3]))
    for name in ("gate", "up", "down"):
        grad = np.abs(grads[f"blocks/layer/layers/0/ffn/{name}"]).max((2, 3))
        assert (grad[:, 3] > 1e-4).all()
        np.testing.assert_array_equal(np.delete(grad, 3, 1), 0)
    rows = np.abs(grads["domain_tokens"]).max(1)
    assert rows[3] > 1e-4 and not np.delete(rows, 3).any()


def test_position_0_holds_the_domain_s_token():
    config = tiny()
    params = arrays(config)
    embedded = run(config, params, TOKENS, DOMAIN, method="embed")
    np.testing.assert_array_equal(embedded[:, 0], np.asarray(params["domain_tokens"])[DOMAIN])
    np.testing.assert_allclose(embedded[:, 1:], np.asarray(params["embedding/table"])[TOKENS[:, 1:]], rtol=1e-6)
    other = TOKENS.at[:, 0].set(9 - TOKENS[:, 0])
    np.testing.assert_array_equal(run(config, params, TOKENS, DOMAIN), run(config, params, other, DOMAIN))


def test_domain_tokens_start_alike_and_experts_do_not():
    params, _ = fast_jit(functools.partial(initialize, tiny()))(jax.random.key(0))
    rows, experts = np.asarray(params["domain_tokens"]), np.asarray(params["blocks/layer/layers/0/ffn/up"])
    assert 0.005 < rows.std() < 0.04 and not np.ptp(rows, 0).any() and np.ptp(experts, 1).any()


@pytest.mark.slow
def test_padding_is_nothing():
    """What stands in the padding, and how much of it there is, does not move a sentence's vector."""
    config = tiny()
    params = arrays(config)
    lengths = jnp.array([5, 12, 1, 7, 3, 2])
    mask = jnp.arange(12) < lengths[:, None]
    vectors = run(config, params, TOKENS, DOMAIN, mask)
    np.testing.assert_allclose(
        run(config, params, jnp.where(mask, TOKENS, 4), DOMAIN, mask), vectors, rtol=1e-5, atol=1e-6
    )
    for i in (0, 2):
        length = int(lengths[i])
        alone = run(tiny(length=length), params, TOKENS[i : i + 1, :length], DOMAIN[i : i + 1])
        np.testing.assert_allclose(alone[0], vectors[i], rtol=1e-4, atol=1e-5)
    assert np.abs(run(config, params, TOKENS, DOMAIN, jnp.ones_like(mask)) - vectors)[0].max() > 0.01


def test_counts_and_costs():
    added = lambda **fields: (
        abstract(EncoderConfig(num_domains=5, **fields)).num_params()
        - abstract(EncoderConfig(num_domains=1, **fields)).num_params()
    )
    # ModernBERT-base: 22 gated parts of 2,654,208 without biases.
    modern = dict(vocab_size=50368, dim=768, depth=22, ffn_dim=1152, moe=Moe(0, 1, expert="geglu", router="domain"))
    assert added(**modern) == 4 * 22 * 2_654_208 + 4 * 768
    # BERT-base: the paper's 226,676,736, and four tokens more.
    bert = dict(vocab_size=30522, dim=768, depth=12, ffn_dim=3072, moe=Moe(0, 1, expert="mlp", router="domain"))
    assert added(**bert) - 4 * 768 == 226_676_736
    dense_costs, domain_costs = (
        static_costs(registry.entry(n).config) for n in ("encoder_small", "domain_encoder_small")
    )
    assert dense_costs["flops"] == domain_costs["flops"] > 0 and domain_costs["params"] > 1.5 * dense_costs["params"]
    assert "state" not in domain_costs
    assert forward_flops(tiny()) == forward_flops(tiny(num_domains=2))


def test_a_sub_network_keeps_domains_and_the_size_of_vectors():
    small = registry.entry("domain_encoder_small").config.shrink(width=0.5, depth=1)
    assert (small.dim, small.output_dim, small.num_domains, small.mixture.num_experts) == (64, 128, 5, 5)
    with pytest.raises(UserError, match="unknown sub-network dimension 'experts'"):
        from research.nested.space import shrink

        shrink(small, {"experts": 2})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_domains": 0}, "num_domains=0; valid: whole numbers from 1"),
        ({"pool": "last"}, "valid: pool=mean"),
        (
            {"moe": {"num_experts": 3}},
            "moe.num_experts=3 for num_domains=5: each domain has one expert; valid: 5, or 0",
        ),
        ({"moe": {"num_experts_per_tok": 2}}, "num_experts_per_tok=2; valid: 1 with router=domain"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(UserError, match=message):
        registry.model_config("domain_encoder_small", **fields)


@pytest.mark.parametrize("label", [5, -1])
def test_a_domain_that_no_expert_has(label):
    config = tiny()
    params, stats = random_arrays(config)
    with pytest.raises(UserError, match=f"domain label {label} that no expert has; valid: 0..4"):
        apply(config, params, stats, TOKENS[:2], jnp.array([0, label]))


def test_extensions_that_do_not_fit():
    base, params = dense(1)
    with pytest.raises(UserError, match=r"embedding/table needs \(11, 16\)"):
        extend(base, params, tiny(vocab_size=11))
    with pytest.raises(UserError, match="ffn/gate needs .*no such array"):
        mlp = tiny("encoder_small", num_domains=1, ffn="mlp")
        extend(mlp, arrays(mlp), tiny())
    with pytest.raises(UserError, match=r"ffn/gate, for which the mixture has no place"):
        extend(base, params, tiny(moe={"expert": "relu"}))
    with pytest.raises(UserError, match=r"domain_tokens needs \(5, 16\), the dense network has one of \(3, 16\)"):
        three, params = dense(3)
        extend(three, params, tiny())
