"""What `launch.generate` does: prompts in, tokens and their speed out, by sampling, speculation or beam search."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Integer

from research import seeds
from research.data.tokenizers import IntegerTokenizer, Tokenizer
from research.decode import beam, models, speculative
from research.decode.detokenize import Reader, Stops, make_stops, read
from research.decode.generate import check_length, check_sampled, generate, stream
from research.decode.sampling import check
from research.errors import UserError
from research.files import printable
from research.models.sequence import SequenceConfig, take_batch
from research.modules.state import Arrays

Model = tuple[SequenceConfig, Arrays, Arrays]
PAD, TEXT = 0, 1  # segment ids


@dataclass(frozen=True)
class Request:
    """How to continue; the fields are the flags of `launch.generate`. Texts end at `stop` texts, at the tokens
    `stop_ids` and, unless `ignore_eot`, at those that the tokenizer says end a text."""

    num_tokens: int = 200
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    lookahead: int = 4
    beams: int = 0
    groups: int = 1
    diversity: float = 0.5
    alpha: float = 0.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eot: bool = False


@dataclass
class Result:
    """Continuations; of a list of lists the entry [prompt][beam].

    Attributes:
      prompts: their texts.
      texts: of the continuations, without what ended them.
      tokens: of the continuations, the stop included.
      ends: "length", "stop text" or "stop token".
      speed: what is measured.
      scores: of beams.
    """

    prompts: list[str]
    texts: list[list[str]]
    tokens: list[list[Integer[np.ndarray, " N"]]]
    ends: list[list[str]]
    speed: dict[str, float]
    scores: list[list[float]] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line for people."""
        parts = [f"{key.replace('_', ' ')} {value:,.4g}" for key, value in self.speed.items()]
        return ", ".join(parts)


def _result(
    readers: Sequence[Sequence[Reader]], speed: dict[str, float], scores: Sequence[Sequence[float]] = ()
) -> Result:
    return Result(
        [row[0].prompt for row in readers],
        [[reader.text for reader in row] for row in readers],
        [[np.array(reader.tokens, np.int32) for reader in row] for row in readers],
        [[reader.end for reader in row] for row in readers],
        speed,
        [list(row) for row in scores],
    )


def _reading(model: Model, tokenizer: Tokenizer | None, request: Request) -> tuple[Tokenizer, Stops]:
    """Returns the tokenizer, of numbers where there is none, and the stops."""
    models.check(model[0], 1)
    vocab_size = model[0].vocab_size
    reads = IntegerTokenizer(vocab_size) if tokenizer is None else tokenizer
    return reads, make_stops(reads, vocab_size, request.stop, request.stop_ids, request.ignore_eot)


def read_ids(text: str, vocab_size: int, what: str = "prompt") -> Int[np.ndarray, " T"]:
    """Reads "1,2,3".

    Args:
      what: the message calls the text.

    Raises:
      UserError: no numbers, or one outside the vocabulary.
    """
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"{what} {printable(text)!r} is no list of tokens; write numbers joined by commas: 1,2,3"
        ) from None
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if wrong:
        raise UserError(
            f"token {printable(wrong[0])} of the {what} is outside the vocabulary; valid: 0..{vocab_size - 1}"
        )
    return np.array(ids, np.int32)


def pad(prompts: Sequence[Integer[np.ndarray, " _"]]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"] | None]:
    """Pads prompts on the left to one length; returns (tokens, segment ids, None where all are equally long).

    Raises:
      UserError: an empty prompt.
    """
    if not all(len(p) for p in prompts):
        raise UserError("a prompt is empty; give at least one token to start from")
    longest = max(map(len, prompts))
    tokens = np.zeros((len(prompts), longest), np.int32)
    ids = np.full_like(tokens, PAD)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        ids[row, longest - len(prompt) :] = TEXT
    return tokens, None if (ids == TEXT).all() else ids


def _chosen(config: SequenceConfig) -> SequenceConfig:
    """On a CPU the implementations are chosen at once."""
    return config.on_cpu() if jax.default_backend() == "cpu" else config


class _Bound:
    """A model whose calls are compiled with its weights as arguments."""

    def __init__(self, model: Model, batch: int, length: int):
        config, self.params, self.stats = _chosen(model[0]), model[1], model[2]
        models.check(config, length)
        self.config, self.batch, self.length = config, batch, length

        def prefill(params, stats, *args):
            return models.bind(config, params, stats, batch, length).prefill(*args)

        def step(params, stats, *args):
            return models.bind(config, params, stats, batch, length).step(*args)

        self._prefill, self._step = jax.jit(prefill), jax.jit(step, donate_argnums=(2,))

    def state(self) -> Any:
        return models.bind(self.config, self.params, self.stats, self.batch, self.length).state

    def prefill(self, state: Any, tokens: Any, ids: Any = None) -> Any:
        return self._prefill(self.params, self.stats, state, tokens, ids)

    def read(self, tokens: Any, ids: Any) -> tuple[Any, Any, float]:
        """Returns the logits and the state after the prompts, and the seconds of a call after the first."""
        jax.block_until_ready(self.prefill(self.state(), tokens, ids))
        compiled = time.perf_counter()
        logits, state = jax.block_until_ready(self.prefill(self.state(), tokens, ids))
        return logits, state, time.perf_counter() - compiled

    def step(self, state: Any, token: Any) -> Any:
        return self._step(self.params, self.stats, state, token)


def write(
    model: Model,
    prompts: Sequence[Integer[np.ndarray, " _"]],
    request: Request,
    tokenizer: Tokenizer | None = None,
    show: Callable[[str], None] | None = None,
) -> Result:
    """Samples a continuation of each prompt.

    Args:
      model: config, params and stats.
      prompts: tokens of each.
      request: how to.
      tokenizer: makes text of tokens; None: their numbers.
      show: called with the pieces of the first row's text as they come; joined they are its text.

    Raises:
      UserError: a number out of range, an empty prompt, more tokens than the model reaches, a stop that cannot come, or
        logits that are no numbers.
    """
    tokenizer, stops = _reading(model, tokenizer, request)
    tokens, ids = pad(prompts)
    check_length(request.num_tokens)
    bound = _Bound(model, len(prompts), tokens.shape[1] + request.num_tokens)
    options: dict[str, Any] = dict(
        temperature=request.temperature, top_k=request.top_k, top_p=request.top_p, key=seeds.key(request.seed)
    )
    check(request.temperature, request.top_k, request.top_p)
    start = time.perf_counter()
    logits, state, prefill = bound.read(tokens, ids)
    ready = lambda *_: (logits, state)
    readers = [Reader(tokenizer, prompt, stops) for prompt in prompts]
    show = show or (lambda _: None)
    marks = []
    for column in stream(
        ready, bound.step, state, tokens, ids, num_tokens=request.num_tokens, stop=stops.ids, **options
    ):
        marks.append(time.perf_counter())
        pieces = [reader.feed(int(token)) for reader, token in zip(readers, column, strict=True)]
        show(pieces[0])
        if all(reader.ended for reader in readers):
            break
    pieces = [reader.finish() for reader in readers]
    show(pieces[0])
    # The first steps compile and settle; the rest are the rate.
    settled = marks[2:] if len(marks) > 4 else marks
    seconds = (settled[-1] - settled[0]) / max(len(settled) - 1, 1)
    speed = {
        "tokens_per_second": len(prompts) / seconds if seconds else 0.0,
        "prompt_tokens_per_second": tokens.size / prefill,
        "seconds_to_first_token": marks[0] - start,
        "tokens": float(sum(len(reader.tokens) for reader in readers)),
    }
    return _result([[reader] for reader in readers], speed)


def speculate(
    full: Model, draft: Model, prompt: Integer[np.ndarray, " t"], request: Request, tokenizer: Tokenizer | None = None
) -> Result:
    """Continues one prompt with the full model's text, drafted by a smaller one; timed beside the full model alone.

    Raises:
      UserError: as `write`, or models of different vocabularies.
    """
    tokenizer, stops = _reading(full, tokenizer, request)
    tokens, _ = pad([prompt])
    check_length(request.num_tokens)
    length = tokens.shape[1] + request.num_tokens
    lookahead = min(request.lookahead, request.num_tokens)  # no more than there is to write
    configs = [_chosen(full[0]), _chosen(draft[0])]
    for config in configs:
        models.check(config, length)
    if configs[0].vocab_size != configs[1].vocab_size:
        raise UserError(
            f"the draft has {configs[1].vocab_size} tokens, the model {configs[0].vocab_size}; valid: "
            "a draft of one vocabulary with it"
        )
    key = seeds.key(request.seed)
    sampling: dict[str, Any] = dict(
        temperature=request.temperature, top_k=request.top_k, top_p=request.top_p, key=key, stop=stops.ids
    )

    def run(arrays, tokens):
        one, two = (
            models.bind(config, params, stats, 1, length, ahead=lookahead)
            for config, (params, stats) in zip(configs, arrays, strict=True)
        )
        return speculative.speculate(
            models.full_of(one), models.draft_of(two), one.state, two.state, tokens,
            num_tokens=request.num_tokens, lookahead=lookahead, **sampling,
        )  # fmt: skip

    def alone(arrays, tokens):
        params, stats = arrays[0]
        one = models.bind(configs[0], params, stats, 1, length)
        return generate(one.prefill, one.step, one.state, tokens, num_tokens=request.num_tokens, **sampling)

    arrays = (full[1:], draft[1:])
    result, seconds = _timed(run, arrays, tokens)
    (plain, _), plain_seconds = _timed(alone, arrays, tokens)
    written = np.asarray(result.tokens)[:, : int(result.lengths[0]) + 1]
    check_sampled(written)
    same = float((np.asarray(plain) == np.asarray(result.tokens)).all())
    speed = {
        "tokens_per_second": written.size / seconds,
        "tokens_per_second_alone": written.size / plain_seconds,
        "acceptance": float(result.acceptance[0]),
        "passes_of_the_full_model": float(result.rounds[0]) + 1,
        "tokens": float(written.size),
    }
    if request.temperature == 0:
        speed["equal_to_greedy"] = same
    return _result([[read(tokenizer, prompt, written[0].tolist(), stops)]], speed)


def search(
    model: Model, prompts: Sequence[Integer[np.ndarray, " _"]], request: Request, tokenizer: Tokenizer | None = None
) -> Result:
    """Continues each prompt by beam search, diverse where there are several groups; texts that stop leave the beam, as
    the search ranks them.

    Raises:
      UserError: as `write`, or beams that groups do not divide.
    """
    tokenizer, stops = _reading(model, tokenizer, request)
    tokens, ids = pad(prompts)
    config, batch = _chosen(model[0]), len(prompts)
    length = tokens.shape[1] + request.num_tokens
    models.check(config, length)
    diversity = request.diversity if request.groups > 1 else 0.0
    beam.check(request.beams, request.num_tokens, request.groups, diversity, request.alpha)

    def run(arrays, tokens, ids):
        params, stats = arrays
        functions = models.bind(config, params, stats, batch, length)
        return beam.beam_search(
            functions.prefill, functions.step, functions.state, tokens, ids, beam_width=request.beams,
            num_tokens=request.num_tokens, groups=request.groups, diversity=diversity, alpha=request.alpha,
            stop=stops.ids, sequences=stops.sequences, take_batch=take_batch,
        )  # fmt: skip

    beams, seconds = _timed(run, model[1:], tokens, ids)
    scores, written = np.asarray(beams.scores), np.asarray(beams.tokens)
    if np.isnan(scores).any():
        check_sampled(np.array([-1]))
    found = [[j for j in range(request.beams) if np.isfinite(scores[i, j])] for i in range(batch)]
    readers = [
        [read(tokenizer, prompt, written[i, j].tolist(), stops) for j in found[i]] for i, prompt in enumerate(prompts)
    ]
    count = float(sum(max(len(reader.tokens) for reader in row) for row in readers))
    return _result(
        readers,
        {"tokens_per_second": count / seconds, "tokens": count},
        [scores[i, row].tolist() for i, row in enumerate(found)],
    )


def _timed(run: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Returns (result, seconds of a call after the first)."""
    compiled = jax.jit(run)
    jax.block_until_ready(compiled(*args))
    start = time.perf_counter()
    return jax.block_until_ready(compiled(*args)), time.perf_counter() - start
