"""What launch.generate does: lengths that fit, memory of prompts, stops in every way of decoding, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data.tokenizer_files import save_tokenizer
from research.data.tokenizers import ByteTokenizer, IntegerTokenizer
from research.decode import models, text
from research.errors import UserError
from research.interop.safetensors_io import save_folder
from research.models import registry
from research.modules.state import abstract
from tests.interop.test_commands import command
from tests.models.twins import random_arrays, twin


def model(name, **fields):
    config = twin(name, **fields)
    return config, *random_arrays(config)


@pytest.fixture(scope="module")
def numbers():
    return model("hgrn_small")


PROMPT = np.array([1, 2, 3], np.int32)
GREEDY = dict(temperature=0.0, num_tokens=8)


@pytest.mark.parametrize("name", ["cosformer_small", "attention_small", "routing_small"])
def test_texts_up_to_the_length_of_the_model_and_not_one_token_more(name):
    full = model(name)
    assert full[0].length == 12
    assert len(text.write(full, [PROMPT], text.Request(temperature=0.0, num_tokens=9)).tokens[0][0]) == 9
    with pytest.raises(UserError, match="13 tokens, prompt included, .* valid: up to 12 of both together"):
        text.write(full, [PROMPT], text.Request(temperature=0.0, num_tokens=10))


def test_drafts_beyond_the_length_are_thrown_away():
    full = model("cosformer_small")
    request = text.Request(temperature=0.0, num_tokens=9, lookahead=4)
    written = text.write(full, [PROMPT], request).tokens[0][0]
    np.testing.assert_array_equal(text.speculate(full, full, PROMPT, request).tokens[0][0], written)


@pytest.mark.parametrize(
    "name", [name for name in registry.list_models("*_small") if registry.entry(name).config.family == "sequence"]
)
def test_what_reaches_beyond_the_length_says_so(name):
    config = registry.entry(name).config
    bounded = {"attention", "routing", "cosformer"} & set(config.kinds)
    assert models.longest(config) == (config.length if bounded else None)


def test_a_prompt_costs_the_logits_of_one_token():
    config = twin("hgrn_small", vocab_size=4096, depth=2)
    full = abstract(config)

    def run(params, stats, tokens):
        functions = models.bind(config, params, stats, 1, 4100)
        return functions.prefill(functions.state, tokens)[0]

    tokens = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    program = jax.jit(run).lower(dict(full.params), dict(full.stats), tokens).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4096 * 4096 * 4 / 8


@pytest.mark.slow
def test_every_way_of_decoding_ends_at_the_same_stops(numbers):
    whole = text.write(numbers, [PROMPT], text.Request(**GREEDY)).tokens[0][0].tolist()
    stop = whole[3]
    first = whole.index(stop)
    told = IntegerTokenizer(10, eot=(stop,))
    for more, tokenizer in ((dict(stop_ids=(stop,)), None), (dict(stop=(str(stop),)), None), (dict(), told)):
        request = text.Request(**GREEDY, **more)
        results = [
            text.write(numbers, [PROMPT], request, tokenizer),
            text.speculate(numbers, numbers, PROMPT, request, tokenizer),
        ]
        for result in results:
            assert result.tokens[0][0].tolist() == whole[: first + 1]
            assert result.texts == [[" ".join(map(str, whole[:first]))]] and result.prompts == ["1 2 3"]
            assert result.ends == [["stop text" if "stop" in more else "stop token"]]
    assert text.write(numbers, [PROMPT], text.Request(**GREEDY, ignore_eot=True), told).tokens[0][0].tolist() == whole


def test_beams_end_at_stop_texts_as_at_stop_tokens(numbers):
    request = dict(num_tokens=6, beams=4)
    by_token = text.search(numbers, [PROMPT], text.Request(**request, stop_ids=(4,)))
    by_text = text.search(numbers, [PROMPT], text.Request(**request, stop=("4",)))
    assert by_token.texts == by_text.texts and by_token.scores == by_text.scores and "stop text" in by_text.ends[0]
    longer = text.search(numbers, [PROMPT], text.Request(**request, stop=("4 4",)))
    assert all("4 4" not in found for found in longer.texts[0])


def test_a_batch_ends_row_by_row(numbers):
    prompts = [PROMPT, np.array([5], np.int32)]
    whole = text.write(numbers, prompts, text.Request(**GREEDY))
    stop = int(whole.tokens[0][0][2])
    result = text.write(numbers, prompts, text.Request(**GREEDY, stop=(str(stop),)))
    for ended, tokens in zip(result.tokens, whole.tokens, strict=True):
        row = tokens[0].tolist()
        assert ended[0].tolist() == row[: row.index(stop) + 1 if stop in row else 8]


def test_what_cannot_be_sampled_is_refused(numbers):
    config, params, stats = numbers
    nan = (config, {k: v * np.nan for k, v in params.items()}, stats)
    for decode in (text.write, text.search):
        with pytest.raises(UserError, match="logits after 0 new tokens are not finite"):
            decode(nan, [PROMPT], text.Request(num_tokens=3, beams=2))
    with pytest.raises(UserError, match="logits after 0 new tokens"):
        text.speculate(nan, numbers, PROMPT, text.Request(num_tokens=3))
    cases = {
        "temperature=nan": dict(temperature=float("nan")),
        "temperature=-1": dict(temperature=-1.0),
        "top_p=0": dict(top_p=0.0),
        "top_k=-1": dict(top_k=-1),
        "seed=": dict(seed=2**64),
        "num_tokens=1099511627776": dict(num_tokens=2**40),
    }
    for message, wrong in cases.items():
        with pytest.raises(UserError, match=message):
            text.write(numbers, [PROMPT], text.Request(**wrong))
    with pytest.raises(UserError, match="groups=3 do not share beam_width=4"):
        text.search(numbers, [PROMPT], text.Request(beams=4, groups=3))
    with pytest.raises(UserError, match="diversity=nan"):
        text.search(numbers, [PROMPT], text.Request(beams=4, groups=2, diversity=float("nan")))
    other = twin("hgrn_small", vocab_size=11)
    with pytest.raises(UserError, match="the draft has 11 tokens, the model 10"):
        text.speculate(numbers, (other, *random_arrays(other)), PROMPT, text.Request())
    with pytest.raises(UserError, match="no language model"):
        text.write((registry.entry("resnet18").config, {}, {}), [PROMPT], text.Request())


@pytest.mark.parametrize(
    ("ids", "message"),
    [("9" * 30, "token 9+ of the prompt is outside"), ("-1", "token -1"), ("1,,2", "no list"), ("", "no list")],
)
def test_ids_that_are_none(ids, message):
    with pytest.raises(UserError, match=message):
        text.read_ids(ids, 10)


@pytest.mark.slow
def test_the_command_separates_prompt_and_continuation(tmp_path):
    config, params, stats = model("hgrn_small", vocab_size=256)
    save_folder(tmp_path / "model", config, params, stats, {"source": "test"})
    save_tokenizer(ByteTokenizer(), tmp_path / "model")
    flags = (f"--workdir={tmp_path}/model", "--num_tokens=4", f"--out={tmp_path}/o.json", "--temperature=0")
    done = command("generate", *flags, "--prompt_ids=195,164,98")  # "äb" on a run with a tokenizer
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads((tmp_path / "o.json").read_text())
    assert told["prompts"] == ["äb"] and told["prompt_ids"] == [[195, 164, 98]] and len(told["ids"][0][0]) == 4
    assert done.stdout.startswith(f"--- prompt ---\näb\n--- continuation ---\n{told['texts'][0][0]}\n")
    done = command("generate", *flags, "--prompt=a", "--prompt=ü", "--stop=\x01\x01")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        "--- prompt 1 ---\na\n--- continuation 1 ---\n" in done.stdout
        and "--- prompt 2 ---\nü\n--- continuation 2 ---\n" in done.stdout
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beams=2", "--top_k=1"], "--top_k is not read here; it belongs to sampling, without --beams"),
        (["--alpha=1"], "--alpha is not read here; it belongs to --beams"),
        (["--lookahead=2"], "--lookahead is not read here; it belongs to --draft"),
    ],
)
def test_a_flag_of_another_way_of_decoding_is_refused(flags, message):
    done = command("generate", "--workdir=nowhere", "--prompt=a", *flags)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


def test_a_model_of_images_is_told_as_such_and_not_by_the_tokenizer_that_it_lacks(tmp_path):
    config, params, stats = model("lenet5")
    save_folder(tmp_path / "model", config, params, stats, {"source": "test"})
    done = command("generate", f"--workdir={tmp_path}/model", "--prompt=a")
    assert (
        done.returncode == 2
        and "tokenizer" not in done.stderr
        and "lenet" in done.stderr
        and done.stderr.count("\n") == 1
    )
