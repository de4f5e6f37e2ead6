"""What `launch.generate` does: prompts in, tokens and their speed out, by sampling, speculation or beam search."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from research import seeds
from research.decode import beam, models, speculative
from research.decode.generate import StopStrings, generate, stream
from research.errors import UserError
from research.models.forms import on_cpu
from research.models.sequence import SequenceConfig, take_batch
from research.modules.state import Arrays

Model = tuple[SequenceConfig, Arrays, Arrays]
PAD, TEXT = 0, 1  # segment ids


@dataclass(frozen=True)
class Request:
    """How to continue; the fields are the flags of `launch.generate`."""

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


@dataclass
class Result:
    """Continuations, tokens[prompt][beam]; scores likewise, or empty; speed is what is measured."""

    tokens: list[list[Int[np.ndarray, " N"]]]
    speed: dict[str, float]
    scores: list[list[float]] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line for people."""
        parts = [f"{key.replace('_', ' ')} {value:,.4g}" for key, value in self.speed.items()]
        return ", ".join(parts)


def read_ids(text: str, vocab_size: int) -> Int[np.ndarray, " T"]:
    """Reads "1,2,3".

    Raises:
      UserError: no numbers, or one outside the vocabulary.
    """
    try:
        ids = np.array([int(part) for part in text.split(",")], np.int32)
    except ValueError:
        raise UserError(f"prompt {text!r} is no list of tokens; write numbers joined by commas: 1,2,3") from None
    wrong = [int(i) for i in ids if not 0 <= i < vocab_size]
    if wrong:
        raise UserError(f"token {wrong[0]} of the prompt is outside the vocabulary; valid: 0..{vocab_size - 1}")
    return ids


def pad(prompts: Sequence[Int[np.ndarray, " t"]]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"] | None]:
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


def cut(text: str, stops: Sequence[str]) -> str:
    """Returns the text up to the first stop string."""
    stopper = StopStrings(list(stops))
    return stopper.feed(text) + stopper.flush()


def _chosen(config: SequenceConfig) -> SequenceConfig:
    """On a CPU the forms are chosen at once."""
    return dataclasses.replace(config, form=on_cpu(config.form)) if jax.default_backend() == "cpu" else config


class _Bound:
    """A model whose calls are compiled with its weights as arguments."""

    def __init__(self, model: Model, batch: int, length: int):
        config, self.params, self.stats = _chosen(model[0]), model[1], model[2]
        models.check(config, length)
        self.config, self.batch, self.length = config, batch, length
        call = lambda name, params, stats, *args: getattr(models.bind(config, params, stats, batch, length), name)(*args)  # noqa: E731
        self._extend = jax.jit(functools.partial(call, "extend"))
        self._step = jax.jit(functools.partial(call, "step"), donate_argnums=(2,))

    def state(self) -> Any:
        return models.bind(self.config, self.params, self.stats, self.batch, self.length).state

    def extend(self, state: Any, tokens: Any, ids: Any = None) -> Any:
        return self._extend(self.params, self.stats, state, tokens, ids)

    def step(self, state: Any, token: Any) -> Any:
        return self._step(self.params, self.stats, state, token)


def write(
    model: Model,
    prompts: Sequence[Int[np.ndarray, " t"]],
    request: Request,
    decode: Callable[[Any], str] | None = None,
    stops: Sequence[str] = (),
    show: Callable[[str], None] | None = None,
) -> Result:
    """Samples a continuation of each prompt.

    Args:
      model: config, params and stats.
      prompts: tokens of each.
      request: how to.
      decode: tokens to text, for `stops` and `show`.
      stops: strings at which to end.
      show: called with the pieces of the first row's text as they come.

    Raises:
      UserError: a number out of range, an empty prompt, or more tokens than the model reaches.
    """
    tokens, ids = pad(prompts)
    bound = _Bound(model, len(prompts), tokens.shape[1] + request.num_tokens)
    start = time.perf_counter()
    logits, state = bound.extend(bound.state(), tokens, ids)
    jax.block_until_ready(logits)
    compiled = time.perf_counter()
    logits, state = jax.block_until_ready(bound.extend(bound.state(), tokens, ids))
    prefill = time.perf_counter() - compiled
    options = dict(temperature=request.temperature, top_k=request.top_k, top_p=request.top_p, key=seeds.key(request.seed))
    ready = lambda *_: (logits, state)  # noqa: E731
    stoppers = [StopStrings(list(stops)) for _ in prompts]
    columns: list[Any] = []
    marks = []
    for column in stream(ready, bound.step, state, tokens, ids, num_tokens=request.num_tokens, **options):
        columns.append(column)
        marks.append(time.perf_counter())
        if decode is not None:
            pieces = [stopper.feed(decode(column[i : i + 1])) for i, stopper in enumerate(stoppers)]
            if show is not None:
                show(pieces[0])
            if all(stopper.stopped for stopper in stoppers):
                break
    if show is not None:
        show(stoppers[0].flush())
    # The first steps compile and settle; the rest are the rate.
    settled = marks[2:] if len(marks) > 4 else marks
    seconds = (settled[-1] - settled[0]) / max(len(settled) - 1, 1)
    written = np.stack(columns, 1)
    speed = {
        "tokens_per_second": len(prompts) / seconds if seconds else 0.0,
        "prompt_tokens_per_second": tokens.size / prefill,
        "seconds_to_first_token": marks[0] - start,
        "tokens": float(written.size),
    }
    return Result([[row] for row in written], speed)


def speculate(full: Model, draft: Model, prompt: Int[np.ndarray, " t"], request: Request) -> Result:
    """Continues one prompt with the full model's text, drafted by a smaller one; timed beside the full model alone.

    Raises:
      UserError: as `write`.
    """
    tokens, _ = pad([prompt])
    length = tokens.shape[1] + request.num_tokens + request.lookahead
    configs = [_chosen(full[0]), _chosen(draft[0])]
    for config in configs:
        models.check(config, length)
    key = seeds.key(request.seed)
    sampling = dict(temperature=request.temperature, top_k=request.top_k, top_p=request.top_p, key=key)

    def run(arrays, tokens):
        one, two = (models.bind(c, *a, 1, length) for c, a in zip(configs, arrays, strict=True))
        return speculative.speculate(
            models.full_of(one), models.draft_of(two), one.state, two.state, tokens,
            num_tokens=request.num_tokens, lookahead=request.lookahead, **sampling,
        )  # fmt: skip

    def alone(arrays, tokens):
        one = models.bind(configs[0], *arrays[0], 1, length)
        return generate(one.extend, one.step, one.state, tokens, num_tokens=request.num_tokens, **sampling)

    arrays = (full[1:], draft[1:])
    result, seconds = _timed(run, arrays, tokens)
    (plain, _), plain_seconds = _timed(alone, arrays, tokens)
    same = float((np.asarray(plain) == np.asarray(result.tokens)).all())
    speed = {
        "tokens_per_second": request.num_tokens / seconds,
        "tokens_per_second_alone": request.num_tokens / plain_seconds,
        "acceptance": float(result.acceptance[0]),
        "passes_of_the_full_model": float(result.rounds[0]) + 1,
        "tokens": float(request.num_tokens),
    }
    if request.temperature == 0:
        speed["equal_to_greedy"] = same
    return Result([[np.asarray(result.tokens[0])]], speed)


def search(model: Model, prompts: Sequence[Int[np.ndarray, " t"]], request: Request) -> Result:
    """Continues each prompt by beam search, diverse where there are several groups.

    Raises:
      UserError: as `write`, or beams that groups do not divide.
    """
    tokens, ids = pad(prompts)
    config, batch = _chosen(model[0]), len(prompts)
    length = tokens.shape[1] + request.num_tokens
    models.check(config, length)

    def run(arrays, tokens, ids):
        functions = models.bind(config, *arrays, batch, length)
        return beam.beam_search(
            functions.extend, functions.step, functions.state, tokens, ids, beam_width=request.beams, num_tokens=request.num_tokens,
            groups=request.groups, diversity=request.diversity if request.groups > 1 else 0.0, alpha=request.alpha, take_batch=take_batch,
        )  # fmt: skip

    beams, seconds = _timed(run, model[1:], tokens, ids)
    texts = [[np.asarray(beams.tokens[i, j]) for j in range(request.beams)] for i in range(batch)]
    speed = {"tokens_per_second": batch * request.num_tokens / seconds, "tokens": float(batch * request.num_tokens)}
    return Result(texts, speed, np.asarray(beams.scores).tolist())


def _timed(run: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Returns (result, seconds of a call after the first)."""
    compiled = jax.jit(run)
    jax.block_until_ready(compiled(*args))
    start = time.perf_counter()
    return jax.block_until_ready(compiled(*args)), time.perf_counter() - start
