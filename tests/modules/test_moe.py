"""The mixture of experts as a module: families, groups, statistics, losses, and its sub-networks."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.modules.axes import Init
from research.modules.mixers.base import Call
from research.modules.moe import OBSERVED, MoeFfn
from research.modules.moe_options import FAMILIES, Moe
from research.modules.state import merge, split
from research.ops.expert_dispatch import combine_matrix, every_expert
from research.ops.expert_routing import hashed, top_k_choice
from tests.models.twins import fast_jit
from tests.ops.compare import assert_agree

BATCH, LENGTH, WIDTH = 3, 8, 12


def module(spec, seed=0):
    return MoeFfn(spec, WIDTH, ("embed", "layer/mlp"), "layer", Init(jax.random.key(seed)))


def small(family, **more):
    spec = FAMILIES[family]
    sizes = dict(
        num_experts=8,
        num_experts_per_tok=min(spec.num_experts_per_tok, 2),
        ffn_dim=8,
        num_expert_groups=min(spec.num_expert_groups, 4),
        topk_groups=min(spec.topk_groups, 2),
    )
    return dataclasses.replace(spec, **(sizes | more)).resolve(16)


def tokens(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32)


def run(ffn, x, call):
    """Returns (output, statistics afterwards) by path."""
    graphdef, params, stats, _ = split(ffn)

    def apply(params, stats, x):
        live = merge(graphdef, params, stats)
        y = live(x, call)
        return y, split(live)[2]

    return fast_jit(apply)(params, stats, x)


def calls(mode="eval"):
    ids = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)
    return Call(mode, jax.random.key(5) if mode == "train" else None, tokens=ids, domain=jnp.arange(BATCH) % 8)


@pytest.mark.slow_unless(
    "eval-expert_choice",
    "eval-gshard",
    "eval-mixtral",
    "eval-st_moe",
    "eval-v_moe",
    "train-deepseek",
    "train-deepseek_v3",
    "train-domain",
    "train-hash",
    "train-jamba",
    "train-qwen3",
    "train-soft",
    "train-switch",
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_every_family_runs_and_has_gradients(family, mode):
    ffn, x = module(small(family)), tokens()
    graphdef, params, stats, _ = split(ffn)

    def loss(params):
        live = merge(graphdef, params, stats)
        y = live(x, calls(mode))
        return (y**2).sum() + split(live)[2]["aux_loss"], y

    (_, y), grads = fast_jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert all(np.isfinite(g).all() for g in grads.values())
    learns = (
        {"up", "down"}
        | ({"router"} if "router" in params else set())
        | ({"slots", "slot_scale"} if "slots" in params else set())
    )
    assert all(np.asarray(grads[name]).any() for name in learns)


@pytest.mark.slow_unless("qwen3")
@pytest.mark.parametrize("family", ["mixtral", "qwen3", "jamba", "deepseek", "deepseek_v3"])
def test_dropless_families_are_the_weighted_sum(family):
    spec = small(family)
    ffn, x = module(spec), tokens()
    y, _ = run(ffn, x, calls())
    rows = x.reshape(-1, WIDTH)
    routed = top_k_choice(
        rows @ ffn.router[...], 2, scoring_func=spec.scoring_func, renormalize=spec.renormalize,
        scale=spec.routed_scaling_factor, num_expert_groups=spec.num_expert_groups, topk_groups=spec.topk_groups,
    )  # fmt: skip
    expected = every_expert(rows, combine_matrix(routed.experts, routed.weights, 8), ffn.kernels)
    if ffn.shared is not None:
        expected = expected + ffn.shared(rows)
    assert_agree(y.reshape(-1, WIDTH), expected, 1e-5)


@pytest.mark.slow_unless("v_moe")
@pytest.mark.parametrize("family", ["switch", "gshard", "st_moe", "v_moe"])
def test_places_for_all_are_dropless(family):
    spec = small(family, capacity_factor=16.0, eval_capacity_factor=0.0)
    free = dataclasses.replace(spec, capacity="none")
    assert_agree(run(module(spec), tokens(), calls())[0], run(module(free), tokens(), calls())[0], 1e-5)


def test_groups_compete_apart():
    """With few places a sequence alone gives what it gives beside others when each is a group; with one group it does
    not."""
    x = tokens()
    for group, same in ((1, True), (0, False)):
        spec = small("switch", capacity="megablocks", capacity_factor=0.7, eval_capacity_factor=0.0, group_size=group)
        together, alone = run(module(spec), x, calls())[0][:1], run(module(spec), x[:1], calls())[0]
        assert np.allclose(together, alone, atol=1e-6) == same


def test_hash_and_domain_send_where_they_should():
    x = tokens()
    ffn = module(small("domain"))
    y, _ = run(ffn, x, calls())
    for b in range(BATCH):
        one = {name: kernel[b : b + 1] for name, kernel in ffn.kernels.items()}
        assert_agree(y[b], every_expert(x[b], jnp.ones((LENGTH, 1)), one), 1e-5)
    ffn, experts = module(small("hash")), hashed(calls().tokens, 8)
    assert len(np.unique(experts)) > 4
    expected = every_expert(x.reshape(-1, WIDTH), jax.nn.one_hot(experts.reshape(-1), 8), ffn.kernels)
    assert_agree(run(ffn, x, calls())[0].reshape(-1, WIDTH), expected, 1e-5)


@pytest.mark.parametrize("family, needs", [("hash", "token ids"), ("domain", "the domain of each example")])
def test_what_an_enforced_router_lacks_is_told(family, needs):
    with pytest.raises(UserError, match=f"router='{family}' needs {needs}"):
        module(small(family))(tokens(), Call())


def test_training_stores_load_losses_and_numbers_and_evaluation_does_not():
    ffn = module(small("mixtral", balance_loss_coef=0.01, z_loss_coef=1e-3))
    _, after = run(ffn, tokens(), calls("train"))
    assert after["load"].sum() == pytest.approx(2, rel=1e-5) and after["aux_loss"] > 0.01
    observed = dict(zip(OBSERVED, np.asarray(after["observed"]).tolist(), strict=True))
    assert 0 < observed["entropy"] <= np.log(8) and observed["max_load"] >= 1 and observed["dropped"] == 0
    _, before = run(ffn, tokens(), calls("eval"))
    assert not any(np.asarray(value).any() for value in before.values())


def test_dropped_share_is_what_finds_no_place():
    spec = small("switch", capacity="megablocks", capacity_factor=1.0, group_size=0)
    _, after = run(module(spec), tokens(), calls("train"))
    counts = np.round(np.asarray(after["load"]) * BATCH * LENGTH)
    expected = 1 - np.minimum(counts, 3).sum() / (BATCH * LENGTH)
    assert expected > 0 and after["observed"][OBSERVED.index("dropped")] == pytest.approx(expected, abs=1e-6)


def test_bias_moves_once_an_update_by_the_load_of_all_its_calls_and_has_no_gradient():
    spec = small("deepseek_v3")
    ffn, load = module(spec), 0
    for seed in (0, 1):
        ffn(tokens(seed), calls("train"))
        load = load + np.round(np.asarray(ffn.load[...]) * BATCH * LENGTH)
        assert not np.any(ffn.bias[...]), "a call moves nothing that a later one of the same update reads"
        np.testing.assert_array_equal(ffn.chosen[...], load)
    ffn.after_update()
    np.testing.assert_allclose(ffn.bias[...], 1e-3 * np.sign(load.mean() - load), rtol=1e-6)
    assert not np.any(ffn.chosen[...]) and "bias" not in split(ffn)[1]


def test_noise_needs_training_and_repeats_under_its_key():
    ffn, x = module(small("v_moe", noise_std=50.0)), tokens()
    assert np.array_equal(run(ffn, x, calls("train"))[0], run(ffn, x, calls("train"))[0])
    assert not np.allclose(run(ffn, x, calls("train"))[0], run(ffn, x, calls())[0])
    other = dataclasses.replace(calls(), key=jax.random.key(1))
    assert np.array_equal(run(ffn, x, other)[0], run(ffn, x, calls())[0])


def test_router_is_wide_under_reduced_precision():
    """Indices under bfloat16 activations are those of float32 wherever the logits differ by more than 1e-2."""
    ffn, x = module(small("mixtral")), tokens().astype(jnp.bfloat16)
    logits = ffn._logits(x, Call())[0]
    assert logits.dtype == jnp.float32
    exact = x.astype(jnp.float32) @ ffn.router[...]
    assert_agree(logits, exact, 1e-6)


def test_soft_slots_mix_within_a_sequence_alone():
    ffn, x = module(small("soft")), tokens()
    assert_agree(run(ffn, x, calls())[0][:1], run(ffn, x[:1], calls())[0], 1e-5)


def test_a_later_token_changes_nothing_before_it_in_causal_routers_alone():
    x = tokens()
    changed = x.at[:, -1].add(1.0)
    for family, causal in {
        "mixtral": True,
        "deepseek_v3": True,
        "switch": True,
        "expert_choice": False,
        "soft": False,
    }.items():
        more = dict(capacity="megablocks", capacity_factor=1.0, eval_capacity_factor=0.0) if family == "switch" else {}
        ffn = module(small(family, **more))
        same = np.allclose(run(ffn, x, calls())[0][:, :-1], run(ffn, changed, calls())[0][:, :-1], atol=1e-6)
        assert same == causal, family


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_experts=4, num_experts_per_tok=5), "moe: num_experts_per_tok=5; valid: 1 to the 4 experts"),
        (dict(num_experts=0), "moe: num_experts=0; valid: whole numbers from 1"),
        (dict(router="best"), "moe: router='best'; valid: top_k, expert_choice, soft, hash, domain"),
        (dict(expert="tanh"), "moe: expert='tanh'; valid: glu, geglu, mlp, relu"),
        (dict(capacity="gshard"), "moe: capacity='gshard'; valid: none, mesh"),
        (dict(num_expert_groups=3), "moe: num_expert_groups=3; valid: divisors of num_experts=8"),
        (
            dict(num_expert_groups=4, topk_groups=1, num_experts_per_tok=3),
            "moe: num_experts_per_tok=3; valid: 1 to the 2 experts that a token can reach",
        ),
        (dict(router="hash"), "moe: num_experts_per_tok=2; valid: 1 with router=hash"),
    ],
)
def test_options_that_do_not_fit_are_told(options, message):
    with pytest.raises(UserError, match=message):
        Moe(**options).resolve(64)


def test_smaller_selves():
    spec = Moe(num_experts=8, num_experts_per_tok=2, ffn_dim=64).resolve(128)
    small = spec.shrink(0.5, 1.0, 0.5, 1)
    assert (small.num_experts, small.num_experts_per_tok, small.ffn_dim) == (4, 1, 32)
    assert spec.shrink(1.0, 1.0, 1, None).num_experts_per_tok == 1
    assert spec.shrink(1.0, 1.0, None, None) == spec
    with pytest.raises(UserError, match="experts=9"):
        spec.shrink(1.0, 1.0, 9, None)


@pytest.mark.slow
def test_on_eight_devices_it_is_the_same_and_experts_stay_where_they_are():
    """Outputs, gradients, losses and statistics, experts over 2 to 8 devices, beside data, fsdp and tensor axes. 16
    experts of 32 x 24."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.modules.expert_meshes"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 14
    for name, found in results.items():
        assert found["deviation"] < 1e-5 and "expert" in found["split"], name
        kernels = [shape for shape in found["gathered"] if "32,24" in shape or "24,32" in shape]
        if "fsdp" in name:  # the two halves of its own 8 experts, and no more
            assert kernels and all(shape.startswith("f32[8,") for shape in kernels), (name, kernels)
        else:
            assert not kernels, (name, kernels)
        assert not [shape for shape in found["gathered"] if shape.startswith("f32[16,4,16]")], (
            name,
            "all logits are gathered",
        )
        assert bool(found["all_to_all"]) != name.startswith("dropless"), name
        whole = [shape for shape in found["gathered"] if shape.startswith(("f32[16,16,", "f32[16,4,32]"))]
        assert not whole, (name, "tokens of all devices are gathered", whole)
