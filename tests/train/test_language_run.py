"""A language model through the whole loop: training, early end, state carried in evaluation, generation, extraction."""

import json

import jax
import numpy as np
import pytest

from launch import config as recipe
from research.data.tokenizer_files import load_tokenizer
from research.decode import text
from research.errors import UserError
from research.interop import safetensors_io
from research.modules.state import apply
from research.report import run_card
from research.train import loop
from research.train.carried import carried_metrics
from research.train.extraction import Trained, load_models
from research.train.loop import train
from tests.train.reporter import Lines

LINE = "the cat sat on the mat; the dog sat on the log; "


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(LINE * 200)
    return str(folder / "text.txt")


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lm") / "run"
    lines = Lines()
    report = train(recipe.load("tests/tiny_lm.py", {"data.dir": corpus}), str(workdir), lines)
    return workdir, report, lines


@pytest.fixture(scope="module")
def trained(run):
    opened = Trained(run[0])
    yield opened
    opened.programs.close()


def test_it_learns_and_reports_its_loss(run):
    workdir, report, lines = run
    assert report["metric"] == "test loss" and report["subnets"][0]["value"] < 1.2 < np.log(20)
    assert len(report["training_data_sha256"]) == 64
    assert report["subnets"][0]["state"] == 2 * (32 + 2 * 32)
    assert any("tokens/s" in line for line in lines.steps)
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"validation/perplexity/full", "validation/bits_per_byte/full"} <= {k for m in metrics for k in m}
    assert report["programs"] <= report["programs_bound"]


def test_vocabulary_lies_beside_the_run(run):
    tokenizer = load_tokenizer(run[0])
    assert tokenizer.decode(tokenizer.encode(LINE)) == LINE
    with pytest.raises(UserError, match="outside the vocabulary|not in"):
        tokenizer.encode("Q")
    with pytest.raises(UserError, match=r"holds no tokenizer.json.*--prompt_ids"):
        load_tokenizer(run[0] / "checkpoints")


@pytest.mark.slow
def test_carried_state_equals_one_long_window(trained):
    config, params, stats = trained.model("full")
    source, task = trained.setup.splits["validation"], trained.setup.task
    found = carried_metrics((config, params, stats), source, task, piece=37)
    tokens = np.asarray(source.tokens, np.int32)
    logits = apply(config, params, stats, tokens[None, :-1])[0]
    whole = task.summarize(jax.device_get(task.sums(logits, {"labels": tokens[None, 1:]})))
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    fresh = trained.evaluator(["full"], trained.weights, "validation")["full"]
    assert found["loss"] < fresh["loss"]


def test_a_split_without_examples_is_told(trained):
    import copy
    import dataclasses

    data = copy.copy(trained.setup.data)
    data.facts = dataclasses.replace(data.facts, examples={**data.facts.examples, "test": 0})
    evaluator = type(trained.evaluator)(dataclasses.replace(trained.setup, data=data), trained.programs)
    with pytest.raises(UserError, match="text has no test split; valid: train, validation"):
        evaluator(["full"], trained.weights, "test")


@pytest.mark.slow
def test_documents_reset_the_carried_state_even_between_pieces(trained):
    import dataclasses

    model, source, task = trained.model("full"), trained.setup.splits["validation"], trained.setup.task
    cut = dataclasses.replace(source, documents=np.array([0, 64]))
    parts = [dataclasses.replace(source, tokens=source.tokens[a:b]) for a, b in ((0, 64), (64, None))]
    alone = [carried_metrics(model, part, task, piece=32) for part in parts]
    counts = [part.num_tokens - 1 for part in parts]
    expected = np.average([a["loss"] for a in alone], weights=counts)
    assert carried_metrics(model, cut, task, piece=32)["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_sampled_text_does_not_depend_on_its_neighbours(run):
    (model,) = load_models(run[0], ["full"])
    tokenizer = load_tokenizer(run[0])
    prompts = [tokenizer.encode(p) for p in ("the c", "the dog sat")]
    request = text.Request(num_tokens=12, temperature=0.8, seed=3)
    together = text.write(model, prompts, request)
    alone = text.write(model, prompts[:1], request)
    np.testing.assert_array_equal(together.tokens[0][0], alone.tokens[0][0])
    assert alone.speed["tokens_per_second"] > 0


@pytest.mark.slow
def test_greedy_text_is_that_of_full_recomputation_and_of_speculation(run):
    full, small = load_models(run[0], ["full", "s"])
    prompt = load_tokenizer(run[0]).encode("the do")
    request = text.Request(num_tokens=16, temperature=0.0, lookahead=3)
    written = text.write(full, [prompt], request).tokens[0][0]
    tokens = list(prompt)
    forward = jax.jit(lambda t: apply(*full, t)[0])
    for _ in range(16):
        window = np.zeros((1, 24), np.int32)
        window[0, : len(tokens)] = tokens
        tokens.append(int(forward(window)[0, len(tokens) - 1].argmax()))
    np.testing.assert_array_equal(written, tokens[len(prompt) :])
    result = text.speculate(full, small, prompt, request)
    np.testing.assert_array_equal(result.tokens[0][0], written)
    assert result.speed["equal_to_greedy"] == 1 and result.speed["passes_of_the_full_model"] < 16
    beams = text.search(full, [prompt], text.Request(num_tokens=8, beams=4, groups=2))
    assert len(beams.tokens[0]) == 4 and beams.scores[0] == sorted(beams.scores[0], reverse=True)


def test_prompts_that_cannot_be_continued(run):
    (model,) = load_models(run[0], ["full"])
    with pytest.raises(UserError, match="prompt is empty"):
        text.write(model, [np.zeros(0, np.int32)], text.Request(num_tokens=2))
    with pytest.raises(UserError, match=r"token 99 .* valid: 0..\d+"):
        text.read_ids("1,99", 20)
    with pytest.raises(UserError, match="no list of tokens"):
        text.read_ids("a b", 20)
    from research.decode import models
    from research.models import registry

    with pytest.raises(UserError, match="more than the context of 256 that attention"):
        models.check(registry.entry("attention_small").config, 257)
    with pytest.raises(UserError, match="no language model"):
        models.check(registry.entry("resnet18").config, 3)


def test_extracted_network_stands_alone(run, trained, tmp_path):
    config, params, stats = trained.model("s")
    safetensors_io.save_folder(tmp_path, config, params, stats, {"test": True})
    again, own, _ = safetensors_io.load_folder(tmp_path)
    assert again == config and again.hgrn.d_inner == 16
    np.testing.assert_array_equal(own["embedding/table"], params["embedding/table"])


@pytest.mark.slow
def test_a_run_ends_when_its_goal_is_reached_and_stays_ended(corpus, tmp_path):
    config = recipe.load("tests/tiny_lm.py:full", {"data.dir": corpus, "eval.every": "4", "eval.stop_at": "2.5"})
    lines = Lines()
    report = train(config, str(tmp_path / "run"), lines)
    assert report["updates"] < 40 and any("is reached at step" in line for line in lines.said)
    again = train(config, str(tmp_path / "run"), Lines())
    assert again["updates"] == report["updates"] and again["subnets"][0]["value"] == report["subnets"][0]["value"]
    drawn = run_card.against({"a": [str(tmp_path / "run")]}, "state", out=tmp_path)
    assert drawn["rows"][0]["state"] == report["subnets"][0]["state"] and (tmp_path / "against.png").exists()
    assert (
        run_card.against([str(tmp_path / "run")], "data.options.length", out=tmp_path)["rows"][0]["data.options.length"]
        == 24
    )
    with pytest.raises(UserError, match="has no number 'stat'; valid: .*state"):
        run_card.against([str(tmp_path / "run")], "stat", out=tmp_path)


@pytest.mark.parametrize("interrupted", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_stopped_inside_an_evaluation_ends_as_if_nothing_had_happened(corpus, tmp_path, monkeypatch, interrupted):
    """The first evaluation is the one that reaches the goal, the second the last: both are done again, at the step they
    belong to."""
    config = recipe.load(
        "tests/tiny_lm.py:full", {"data.dir": corpus, "train.duration": "6", "eval.every": "4", "eval.stop_at": "9.9"}
    )
    evaluate, calls = loop.Run._evaluate, []

    def stopped_once(run, final=False):
        calls.append(run.step)
        if len(calls) == interrupted:
            raise loop.Preempted(run.step)
        evaluate(run, final)

    monkeypatch.setattr(loop.Run, "_evaluate", stopped_once)
    with pytest.raises(loop.Preempted):
        train(config, str(tmp_path / "run"), Lines())
    report = train(config, str(tmp_path / "run"), Lines())
    assert report["updates"] == 4 and calls == [4] * 3


@pytest.mark.slow
def test_a_sequence_classifier_reads_digits_pixel_by_pixel(tmp_path):
    """Images become sequences in the data, the sequence model takes its sizes and its pooling from them."""
    overrides = {"model.dim": "32", "train.duration": "4ep", "eval.every": "0", "checkpoint.every": "0"}
    report = train(recipe.load("configs/pixel_sequences.py", overrides), str(tmp_path / "run"), Lines())
    assert report["metric"] == "test accuracy" and report["subnets"][0]["value"] > 0.3
    wrong = recipe.load("configs/pixel_sequences.py", {**overrides, "model.length": "63"})
    with pytest.raises(UserError, match=r"takes vectors of \(63, 1\), the data gives \(64, 1\)"):
        train(wrong, str(tmp_path / "wrong"), Lines())
