"""Tokenizers that need no training: bytes, the characters of a text, and integers that another program made.

Each is plain data (`to_json`), so that a run can store its vocabulary and generate text without the corpus.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, Shaped

from research.errors import UserError

_CODE_POINTS = 0x110000


class Tokenizer(Protocol):
    """A mapping between text and integers in 0..vocab_size - 1."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def token_bytes(self) -> tuple[int, ...] | None:
        """The number of UTF-8 bytes of every token, for bits per byte; None when unknown."""
        ...

    def encode(self, text: str) -> Shaped[np.ndarray, " N"]:
        """The tokens of a text, in the smallest unsigned type that holds the vocabulary. UserError for what it lacks."""
        ...

    def decode(self, tokens: Int[np.ndarray, " N"]) -> str:
        """The text of tokens. UserError for a token outside the vocabulary."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Plain data of which `tokenizer_from_json` makes the same tokenizer."""
        ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """The 256 bytes of UTF-8. Bytes that are not UTF-8, as a model may write them, decode to U+FFFD."""

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def token_bytes(self) -> tuple[int, ...]:
        return (1,) * 256

    def encode(self, text: str) -> Shaped[np.ndarray, " N"]:
        try:
            return np.frombuffer(text.encode(), np.uint8)
        except UnicodeEncodeError as error:
            raise _outside(text, error.start, "what UTF-8 can hold") from error

    def decode(self, tokens: Int[np.ndarray, " N"]) -> str:
        return _checked(tokens, 256).astype(np.uint8).tobytes().decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bytes"}


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """The characters `itos`, each once and in ascending order; token i is `itos[i]` (as nanoGPT's character data sets)."""

    itos: str

    def __post_init__(self):
        if not self.itos or list(self.itos) != sorted(set(self.itos)):
            raise UserError(
                f"The vocabulary {self.itos[:40]!r} is not a sorted list of different characters; give ''.join(sorted(set(text)))."
            )

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> "CharTokenizer":
        """The tokenizer of all characters that occur in `texts`."""
        return cls("".join(sorted(set().union(*texts))))

    @property
    def vocab_size(self) -> int:
        return len(self.itos)

    @property
    def stoi(self) -> dict[str, int]:
        """The token of each character."""
        return {character: token for token, character in enumerate(self.itos)}

    @property
    def token_bytes(self) -> tuple[int, ...]:
        return tuple(len(character.encode()) for character in self.itos)

    @functools.cached_property
    def _tokens_of_code_points(self) -> Int[np.ndarray, " 1114112"]:
        table = np.full(_CODE_POINTS, -1, np.int32)
        table[_code_points(self.itos)] = np.arange(len(self.itos))
        return table

    def encode(self, text: str) -> Shaped[np.ndarray, " N"]:
        tokens = self._tokens_of_code_points[_code_points(text)]
        if tokens.min(initial=0) < 0:
            raise _outside(text, int(np.argmin(tokens)), f"the vocabulary of {self.vocab_size} characters {self.itos[:100]!r}")
        return tokens.astype(np.min_scalar_type(self.vocab_size - 1))

    def decode(self, tokens: Int[np.ndarray, " N"]) -> str:
        characters = _code_points(self.itos)[_checked(tokens, self.vocab_size)]
        return characters.tobytes().decode("utf-32-le", "surrogatepass")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "chars", "itos": self.itos}


@dataclasses.dataclass(frozen=True)
class IntegerTokenizer:
    """Tokens of another program's making, whose text is their numbers: '17 4 0'."""

    vocab_size: int

    def __post_init__(self):
        if self.vocab_size < 1:
            raise UserError(f"vocab_size={self.vocab_size} must be at least 1.")

    @property
    def token_bytes(self) -> None:
        return None

    def encode(self, text: str) -> Shaped[np.ndarray, " N"]:
        try:
            tokens = np.array([int(word) for word in text.split()], np.int64)
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"These tokens have no text: give numbers in 0..{self.vocab_size - 1} between spaces, not {text[:40]!r}."
            ) from error
        return _checked(tokens, self.vocab_size).astype(np.min_scalar_type(self.vocab_size - 1))

    def decode(self, tokens: Int[np.ndarray, " N"]) -> str:
        return " ".join(map(str, _checked(tokens, self.vocab_size).tolist()))

    def to_json(self) -> dict[str, Any]:
        return {"kind": "integers", "vocab_size": self.vocab_size}


_KINDS = {"bytes": ByteTokenizer, "chars": CharTokenizer, "integers": IntegerTokenizer}


def tokenizer_from_json(data: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `to_json` wrote. Raises UserError for anything else."""
    fields = dict(data) if isinstance(data, Mapping) else {}
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UserError(f"A tokenizer's kind is {kind!r}. Valid: {', '.join(_KINDS)}.")
    wanted = {field.name: field.type for field in dataclasses.fields(_KINDS[kind])}
    if fields.keys() != wanted.keys() or not all(type(fields[key]) is wanted[key] for key in wanted):
        raise UserError(f"A tokenizer of kind {kind!r} has the fields {fields}; wanted {', '.join(wanted) or 'none'}.")
    return _KINDS[kind](**fields)


def make_tokenizer(kind: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer 'bytes', or the tokenizer 'chars' of all `texts` together."""
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "chars":
        return CharTokenizer.of_texts(texts)
    raise UserError(f"Unknown tokenizer {kind!r}. Valid: bytes, chars.")


def _code_points(text: str) -> Int[np.ndarray, " N"]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _outside(text: str, place: int, what: str) -> UserError:
    character = text[place]
    return UserError(f"The character {character!r} (U+{ord(character):04X}) at place {place} of the text is not in {what}.")


def _checked(tokens: Int[np.ndarray, " N"], vocab_size: int) -> Int[np.ndarray, " N"]:
    tokens = np.asarray(tokens)
    bad = (tokens < 0) | (tokens >= vocab_size)
    if bad.any():
        raise UserError(f"Token {tokens[bad][0]} is not in the vocabulary, which is 0..{vocab_size - 1}.")
    return tokens
