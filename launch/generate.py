"""Continues text with a trained language model, token by token, and tells the tokens per second.

    python -m launch.generate --workdir=runs/shakespeare --prompt="ROMEO:" --num_tokens=300 --temperature=0.8 \\
        --top_p=0.95
    python -m launch.generate --workdir=runs/shakespeare --prompt=A --prompt=B --seed=1            # a batch of prompts
    # a sub-network drafts
    python -m launch.generate --workdir=runs/sorted --prompt="ROMEO:" --draft=w50 --temperature=0
    python -m launch.generate --workdir=runs/shakespeare --prompt="ROMEO:" --beams=8 --groups=4 --diversity=0.5

DIR is a run, or a folder that convert or extract wrote; without a tokenizer in it, give --prompt_ids=1,2,3 and read
ids. Texts end at --stop, at --stop_ids and at the tokens that tokenizer.json lists as "eot", whether sampled, drafted
or searched for.
"""

import io
import sys

from absl import flags

from launch import common, outputs

_WORKDIR = common.path_flag("workdir", None, "Directory of a run, or of a stand-alone model.")
_SUBNET = flags.DEFINE_string("subnet", "full", "Sub-network that writes: a name or choices such as width=0.5.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue. Repeatable: a batch.")
_PROMPT_IDS = flags.DEFINE_multi_string("prompt_ids", [], "Tokens to continue, as numbers: 1,2,3. Repeatable.")
_NUM_TOKENS = flags.DEFINE_integer("num_tokens", 200, "How many tokens to add.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Only the k likeliest tokens; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the likeliest tokens that make up this probability.")
_STOP = flags.DEFINE_multi_string(
    "stop", [], "Text at which to end, which is not shown; of token-id runs their numbers: '2 4'. Repeatable."
)
_STOP_IDS = flags.DEFINE_multi_string("stop_ids", [], "Tokens at which to end, as numbers: 0,2. Repeatable.")
_IGNORE_EOT = flags.DEFINE_bool("ignore_eot", False, "Continue after tokens that, as the tokenizer says, end a text.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws; a row's text depends on it and on its own prompt alone.")
_DRAFT = flags.DEFINE_string("draft", None, "Sub-network that drafts for --subnet: speculative decoding of one prompt.")
_LOOKAHEAD = flags.DEFINE_integer("lookahead", 4, "Tokens drafted at a time.", lower_bound=1)
_BEAMS = flags.DEFINE_integer("beams", 0, "Beam search with so many beams; 0: sampling.", lower_bound=0)
_GROUPS = flags.DEFINE_integer("groups", 1, "Groups of beams that avoid each other's tokens.", lower_bound=1)
_DIVERSITY = flags.DEFINE_float("diversity", 0.5, "How strongly they do, in nats.")
_ALPHA = flags.DEFINE_float("alpha", 0.0, "How much beam search favours length.")
_OUT = outputs.output_flag("out", outputs.Place.FILE, "JSON file for prompts, texts and speed.", reads=[_WORKDIR])


def main() -> int:
    from research.errors import UserError

    if not _WORKDIR.value:
        raise UserError("--workdir is needed: the directory of a run, e.g. --workdir=runs/shakespeare")
    if bool(_PROMPT.value) == bool(_PROMPT_IDS.value):
        raise UserError("give --prompt (text) or --prompt_ids (numbers), at least once and only one kind")
    if _DRAFT.value and (_BEAMS.value or len(_PROMPT.value or _PROMPT_IDS.value) > 1):
        raise UserError("--draft works on one prompt, without --beams")
    unread = [_LOOKAHEAD] * (not _DRAFT.value) + (
        [_TEMPERATURE, _TOP_K, _TOP_P, _SEED] if _BEAMS.value else [_GROUPS, _DIVERSITY, _ALPHA]
    )
    given = next((flag for flag in unread if flag.present), None)
    if given is not None:
        needs = "--draft" if given is _LOOKAHEAD else "sampling, without --beams" if _BEAMS.value else "--beams"
        raise UserError(f"--{given.name} is not read here; it belongs to {needs}")

    import numpy as np

    from research.data import tokenizer_files
    from research.decode import text
    from research.decode.models import check
    from research.train.extraction import load_models

    names = [_SUBNET.value] + ([_DRAFT.value] if _DRAFT.value else [])
    models = load_models(_WORKDIR.value, names, say=print)
    check(models[0][0], 1)
    tokenizer = tokenizer_files.load_tokenizer(_WORKDIR.value, required=bool(_PROMPT.value))
    vocab_size = models[0][0].vocab_size
    if tokenizer and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer_files.FILE} in {_WORKDIR.value} has {tokenizer.vocab_size} tokens, the model {vocab_size}: "
            "it is another one's"
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character that a model writes
    if tokenizer and _PROMPT.value:
        prompts = [tokenizer.encode(p) for p in _PROMPT.value]
    else:
        prompts = [text.read_ids(p, vocab_size) for p in _PROMPT_IDS.value]
    request = _request(vocab_size)
    if _BEAMS.value:
        result = text.search(models[0], prompts, request, tokenizer)
    elif _DRAFT.value:
        result = text.speculate(models[0], models[1], prompts[0], request, tokenizer)
    else:
        result = _write(models[0], prompts, request, tokenizer)
    if _BEAMS.value or _DRAFT.value or len(prompts) > 1:
        _print_texts(result)
    print(f"\n{result.summary}")
    if _OUT.value:
        from research.files import write_json

        ids = [[row.tolist() for row in rows] for rows in result.tokens]
        content = {
            "prompts": result.prompts,
            "prompt_ids": [np.asarray(prompt).tolist() for prompt in prompts],
            "texts": result.texts,
            "ids": ids,
            "ends": result.ends,
            "scores": result.scores,
            **result.speed,
        }
        write_json(_OUT.value, content)
        print(f"written to {_OUT.value}")
    return 0


def _request(vocab_size: int):
    from research.decode import text

    return text.Request(
        num_tokens=_NUM_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
        lookahead=_LOOKAHEAD.value,
        beams=_BEAMS.value,
        groups=_GROUPS.value,
        diversity=_DIVERSITY.value,
        alpha=_ALPHA.value,
        stop=tuple(_STOP.value),
        stop_ids=tuple(int(i) for ids in _STOP_IDS.value for i in text.read_ids(ids, vocab_size, "--stop_ids")),
        ignore_eot=_IGNORE_EOT.value,
    )


def _write(model, prompts, request, tokenizer):
    """Samples; one prompt is shown as it is written, the texts of several would run into each other."""
    from research.data.tokenizers import IntegerTokenizer
    from research.decode import detokenize, text

    if len(prompts) > 1:
        return text.write(model, prompts, request, tokenizer)
    begun: list[bool] = []

    def show(piece):
        if not begun:  # not before the first token: what is refused prints nothing
            begun.append(True)
            reader = detokenize.Reader(tokenizer or IntegerTokenizer(model[0].vocab_size), prompts[0])
            print(f"--- prompt ---\n{reader.prompt}\n--- continuation ---")
        print(piece, end="", flush=True)

    result = text.write(model, prompts, request, tokenizer, show)
    print()
    return result


def _print_texts(result) -> None:
    several = len(result.texts) > 1
    for i, row in enumerate(result.texts):
        number = f" {i + 1}" if several else ""
        print(f"--- prompt{number} ---\n{result.prompts[i]}")
        for j, continuation in enumerate(row):
            beam = f", beam {j + 1}, log-probability {result.scores[i][j]:.2f}" if result.scores else ""
            print(f"--- continuation{number}{beam} ---\n{continuation}")


if __name__ == "__main__":
    common.run(main)
