"""From tokens to text as they come: only whole characters, context from the prompt, nothing of a stop text before it is
sure to be none.

A text is a sequence of symbols, which no stop text cuts: the characters of text, or the numbers of tokens that have no
text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer

from research.data.tokenizers import Tokenizer
from research.errors import UserError


@dataclass(frozen=True)
class Stops:
    """Where continuations end: at tokens, and at texts in what is decoded.

    Attributes:
      ids: tokens.
      texts: stop texts, as symbols.
      sequences: the tokens of each stop text, for searches that must know on the way.
    """

    ids: tuple[int, ...] = ()
    texts: tuple[Sequence[str], ...] = ()
    sequences: tuple[tuple[int, ...], ...] = ()


def make_stops(
    tokenizer: Tokenizer, vocab_size: int, texts: Sequence[str] = (), ids: Sequence[int] = (), ignore_eot: bool = False
) -> Stops:
    """Returns the stops that a user asks for, with the tokenizer's end-of-text tokens unless these are to be ignored.

    Raises:
      UserError: an empty text, one that the vocabulary cannot write, or a token outside the model's vocabulary.
    """
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if wrong:
        raise UserError(f"stop token {wrong[0]} is outside the vocabulary; valid: 0..{vocab_size - 1}")
    if not all(texts):
        raise UserError("a stop text is empty; valid: at least one character")
    sequences = []
    for text in texts:
        try:
            sequences.append(tuple(int(token) for token in tokenizer.encode(text)))
        except UserError as error:
            raise UserError(f"the stop text {text!r} can never come: {error}") from None
    ended = () if ignore_eot else tuple(i for i in tokenizer.eot if i < vocab_size)
    unique = tuple(dict.fromkeys((*ids, *ended)))
    return Stops(unique, tuple(map(tokenizer.symbols, texts)), tuple(sequences))


class Reader:
    """A continuation, token by token.

    Attributes:
      prompt: the text of the prompt, as far as its characters are complete.
      tokens: those taken so far, the one that ended the text included.
      text: what is safe to show of the continuation; after `finish` all of it, without the stop text.
      end: "length" until it ends at a "stop text" or a "stop token".
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Integer[np.ndarray, " t"] | Sequence[int] = (), stops: Stops = Stops()
    ):
        self._decoder, self._joint, self._ids = tokenizer.decoder(), tokenizer.joint, frozenset(stops.ids)
        self._texts = StopStrings(stops.texts)
        self.prompt = self._joint.join(symbol for token in prompt for symbol in self._decoder.feed(int(token)))
        self.tokens: list[int] = []
        self.text, self.end = "", "length"

    @property
    def ended(self) -> bool:
        return self.end != "length"

    def feed(self, token: int) -> str:
        """Takes the next token, unless the text has ended, and returns the text that is safe to show after it."""
        if self.ended:
            return ""
        self.tokens.append(int(token))
        if token in self._ids:
            self.end = "stop token"
            return self.finish()
        return self._show(self._texts.feed(self._decoder.feed(int(token))))

    def finish(self) -> str:
        """Returns what was held back, at the end of the text."""
        shown = self._show(self._texts.feed(self._decoder.flush()))
        return shown + self._show(self._texts.flush())

    def _show(self, symbols: Sequence[str]) -> str:
        if self._texts.stopped and not self.ended:
            self.end = "stop text"
        piece = self._joint.join(symbols)
        piece = self._joint + piece if self.text and piece else piece
        self.text += piece
        return piece


def read(
    tokenizer: Tokenizer,
    prompt: Integer[np.ndarray, " t"] | Sequence[int],
    tokens: Sequence[int],
    stops: Stops = Stops(),
) -> Reader:
    """Returns the finished reader of tokens that are all there."""
    reader = Reader(tokenizer, prompt, stops)
    for token in tokens:
        reader.feed(token)
    reader.finish()
    return reader


class StopStrings:
    """Ends a text, which comes in pieces, at a string: the first one that is complete, the longest of those complete at
    once.

    The result is the same however the text is cut into pieces. What could be the beginning of a stop string is held
    back. Strings and pieces may be tuples of symbols as well.

    Attributes:
      stopped: True once a string was met.
    """

    def __init__(self, strings: Sequence[Sequence[str]]):
        """Raises UserError for an empty string, or a bare one."""
        if isinstance(strings, str) or not all(strings):
            raise UserError(f"stop strings {strings!r}; valid: a list of strings that are not empty")
        self.strings = tuple(strings)
        self.stopped = False
        self._held: Any = None

    def feed(self, piece: Any) -> Any:
        """Returns the text that is safe to show after this piece; nothing after a stop."""
        if self.stopped:
            return piece[:0]
        text = piece if self._held is None else self._held + piece
        found = [(at + len(s), at) for s in self.strings if (at := _find(text, s)) >= 0]
        if found:
            self.stopped, self._held = True, text[:0]
            return text[: min(found)[1]]
        held = max((n for s in self.strings for n in range(1, len(s)) if text[-n:] == s[:n]), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> Any:
        """Returns what was held back, at the end of the text."""
        text, self._held = self._held, None
        return "" if text is None else text


def _find(text: Any, part: Any) -> int:
    if isinstance(text, str):
        return text.find(part)
    return next((i for i in range(len(text) - len(part) + 1) if text[i : i + len(part)] == part), -1)
