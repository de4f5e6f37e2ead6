"""One update: accumulated as whole, logged as a whole, undone as a whole; who teaches; what moves once an update."""

import jax
import numpy as np
import pytest

from launch import config as recipe
from research.errors import UserError
from research.nested.draws import Draw
from research.train import method_registry
from research.train.finish import bound
from research.train.setup import make_setup
from research.train.supervised import Supervised

SGD = {
    "optim.name": "sgd",
    "optim.lr": "1",
    "optim.momentum": "0",
    "optim.weight_decay": "0",
    "optim.warmup": "0",
    "eval.every": "0",
}
LM = {"name": "sequence", "pattern": "attention", "ffn": "glu", "dim": 16, "depth": 1, "attention": {"num_heads": 2}}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "scoring_func": "sigmoid",
    "bias_update_rate": 0.1,
    "balance_loss_coef": 0.0,
}


def language(scheme="full", model=LM, **overrides):
    """The recipe of a language model on made sequences, none of them labelled alike (see `unequal`)."""
    fields = {
        "data.options.train_examples": "16",
        "data.options.test_examples": "8",
        "data.batch_size": "8",
        "methods": "" if scheme == "full" else scheme,
        **SGD,
    }
    given = fields | {k.replace("__", "."): str(v) for k, v in overrides.items()}
    config = recipe.load("tests/tiny_lm.py:probe", given)
    config["model"] = dict(model)
    config["nested"] = {**config["nested"], "points": {} if scheme == "full" else config["nested"]["points"]}
    return config


def unequal(batch):
    """Documents of very different length: the first half of every part has many labels, the second few."""
    labels = np.array(batch["tokens"], np.int32)
    labels[2:4, 3:], labels[4:6, 9:], labels[6:, 1:] = -1, -1, -1
    return {**batch, "labels": labels}


def updates(config, count=1, change=unequal):
    """Returns (state before, state after, the records of the updates, programs compiled)."""
    learner = Supervised(make_setup(config))
    try:
        state, batches, lines = learner.initial(print), learner.batches(0), []
        before = jax.device_get(state)
        for step in range(count):
            batch = {name: change(own) for name, own in next(batches).items()}
            state, numbers = learner.update(step, state, batch)
            lines.append(learner.read(step, jax.device_get(numbers)).record())
        assert not any(np.any(g) for g in jax.tree.leaves(jax.device_get(learner._grads)))
        programs = learner.programs
        return before, jax.device_get(state), lines, (len(programs.compiler.seconds), bound(programs))
    finally:
        learner.close()


@pytest.mark.parametrize(
    ("scheme", "fields"),
    [
        ("full", {}),
        ("sandwich", {"method__sandwich__count": 2, "method__sandwich__distill": 0.5}),
        ("sorted", {"method__sorted__count": 2}),
    ],
)
def test_an_accumulated_update_is_that_of_the_whole_batch(scheme, fields):
    """Parameters and the logged line, where microbatches hold 31 and 5 labels and distillation is half of the loss."""
    found = {}
    for accumulate in (1, 2):
        config = language(scheme, train__accumulate=accumulate, **fields)
        before, after, (line,), (compiled, bound) = updates(config)
        found[accumulate] = {k: after.params[k] - before.params[k] for k in after.params}, line
        assert compiled <= bound
    (whole, logged), (parts, logged_parts) = found[1], found[2]
    for k, step in whole.items():
        np.testing.assert_allclose(parts[k], step, atol=1e-6 * max(np.abs(step).max(), 1e-2), err_msg=k)
    assert logged.keys() == logged_parts.keys() and {"loss", "accuracy", "loss/full"} & logged.keys()
    for key, value in logged.items():
        np.testing.assert_allclose(logged_parts[key], value, rtol=2e-6, err_msg=key)


def test_a_batch_without_a_label_moves_nothing():
    before, after, _, _ = updates(
        language(train__accumulate=2), change=lambda batch: {**batch, "labels": np.full_like(batch["tokens"], -1)}
    )
    assert all(np.array_equal(after.params[k], before.params[k]) for k in before.params)


@pytest.mark.slow
def test_a_balancing_bias_moves_once_an_update_by_the_load_of_the_whole_batch():
    biases = []
    for accumulate in (1, 2):
        before, after, _, _ = updates(
            language(model={**LM, "ffn": "moe", "moe": MOE}, train__accumulate=accumulate), count=1
        )
        name = next(k for k in after.stats if k.endswith("/bias"))
        assert not np.any(before.stats[name]) and not np.any(after.stats[name.replace("/bias", "/chosen")])
        biases.append(after.stats[name])
    assert {f"{value:.6f}" for value in np.abs(biases[0]).flat} <= {"0.000000", "0.100000"} and np.any(biases[0])
    np.testing.assert_array_equal(biases[1], biases[0])


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_skipped_update_leaves_the_bits_of_everything(accumulate):
    """One image of NaN in the last microbatch: parameters, statistics, EMA and the optimizer's counts stay; the next
    update is a usual one."""
    fields = {
        "train.nan": "skip",
        "methods": "ema",
        "method.ema.decay": "0.9",
        "train.accumulate": str(accumulate),
        "data.batch_size": "8",
        "optim.warmup": "0",
    }
    config = recipe.load("tests/tiny.py:full", fields)

    def spoil(batch):
        image = np.array(batch["image"])
        image[-1] = np.nan
        return {**batch, "image": image}

    before, after, (line,), _ = updates(config, change=spoil)
    assert line["skipped"] == 1
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))
    _, moved, (line,), _ = updates(config, change=lambda batch: batch)
    assert "skipped" not in line and all(np.isfinite(a).all() for a in jax.tree.leaves(moved))
    assert not np.array_equal(
        moved.stats["stem/norm1/mean" if "stem/norm1/mean" in moved.stats else next(iter(moved.stats))], 0
    )


def test_a_method_of_ones_own_may_distil_in_some_updates_and_not_in_others(monkeypatch):
    from research.methods.sandwich import Sandwich

    class EveryOther(Sandwich):
        def draws(self, space, seed, step):
            return (Draw("full"), *(Draw(name, distill=step % 2 == 0) for name in space.order[1:]))

    monkeypatch.setitem(
        method_registry._METHODS, "every_other", type("EveryOther", (EveryOther,), {"name": "every_other"})
    )
    _, _after, lines, (compiled, most) = updates(language("every_other"), count=2)
    assert all(np.isfinite(line["loss/s"]) for line in lines) and compiled <= most
    _, _sandwich, (line,), _ = updates(language("sandwich"), count=1)
    np.testing.assert_allclose(lines[0]["loss/s"], line["loss/s"], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"train.accumulate": "2"},
            "train.accumulate=2 would change the loss: the wrong answers of a pair are the other texts .*; valid: 1",
        ),
        (
            {"nested.execution": "parallel", "methods": "sorted", "method.sorted.count": "2"},
            "nested.execution=parallel over 1 devices with 2 networks would change the loss",
        ),
    ],
)
def test_contrastive_batches_are_not_cut(fields, message, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"a": "one two", "b": "two three", "domain": "x"}\n' * 8)
    for split in ("validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"a": "one two", "b": "two three", "domain": "x"}\n' * 2)
    sizes = {
        "data.name": "text_pairs",
        "data.dir": str(tmp_path),
        "data.options.length": "6",
        "data.options.vocab_size": "40",
    }
    sizes |= {"data.batch_size": "4", "model.dim": "16", "model.depth": "1", "model.attention": "{'num_heads': 2}"}
    with pytest.raises(UserError, match=message):
        Supervised(make_setup(recipe.load("configs/domain_encoder.py:dense", {**sizes, **fields})))
