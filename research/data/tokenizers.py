"""Tokenizers that need no training: bytes, the characters of a text, and integers that another program made.

Each is plain data (`to_json`), so that a run can store its vocabulary and generate text without the corpus.
"""

import codecs
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from jaxtyping import Integer, Shaped

from research.errors import UserError
from research.files import printable

_CODE_POINTS = 0x110000


class Decoder(Protocol):
    """Text of tokens as they come, in symbols: all that it returns, joined by the tokenizer's `joint`, is `decode` of
    all tokens."""

    def feed(self, token: int) -> Sequence[str]:
        """The symbols that are complete after this token: characters (a string), or numbers of tokens. UserError as
        `decode`."""
        ...

    def flush(self) -> Sequence[str]:
        """What is left at the end of the tokens."""
        ...


class Tokenizer(Protocol):
    """A mapping between text and integers in 0..vocab_size - 1.

    `joint` stands between symbols: nothing between characters, a space between numbers. `eot`: tokens that end a text,
    () for none.
    """

    joint: ClassVar[str]

    @property
    def eot(self) -> tuple[int, ...]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def token_bytes(self) -> tuple[int, ...] | None:
        """The number of UTF-8 bytes of every token, for bits per byte; None when unknown."""
        ...

    def encode(self, text: str) -> Shaped[np.ndarray, " N"]:
        """The tokens of a text, in the smallest unsigned type that holds the vocabulary. UserError for what it
        lacks."""
        ...

    def decode(self, tokens: Integer[np.ndarray, " N"]) -> str:
        """The text of tokens. UserError for a token outside the vocabulary."""
        ...

    def decoder(self) -> Decoder:
        """Decodes tokens as they come."""
        ...

    def symbols(self, text: str) -> Sequence[str]:
        """The symbols of a text, as the decoder gives them."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Plain data of which `tokenizer_from_json` makes the same tokenizer."""
        ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """The 256 bytes of UTF-8. Bytes that are not UTF-8, as a model may write them, decode to U+FFFD."""

    eot: tuple[int, ...] = ()
    joint: ClassVar[str] = ""

    def __post_init__(self) -> None:
        _check_eot(self.eot, self.vocab_size)

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

    def decode(self, tokens: Integer[np.ndarray, " N"]) -> str:
        return _checked(tokens, 256).astype(np.uint8).tobytes().decode(errors="replace")

    def decoder(self) -> "ByteDecoder":
        return ByteDecoder()

    def symbols(self, text: str) -> str:
        return text

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bytes", **_eot_json(self.eot)}


class ByteDecoder:
    """Holds the bytes of a character back until it is complete, or can become none."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._utf8.decode(bytes([int(_checked(token, 256))]))

    def flush(self) -> str:
        return self._utf8.decode(b"", True)


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """The characters `itos`, each once and in ascending order; token i is `itos[i]` (as nanoGPT's character data
    sets)."""

    itos: str
    eot: tuple[int, ...] = ()
    joint: ClassVar[str] = ""

    def __post_init__(self) -> None:
        _check_eot(self.eot, self.vocab_size)
        if (
            not self.itos
            or list(self.itos) != sorted(set(self.itos))
            or any("\ud800" <= character <= "\udfff" for character in self.itos)
        ):
            raise UserError(
                f"The vocabulary {printable(self.itos, 40)!r} is not a sorted list of different characters; "
                "give ''.join(sorted(set(text)))."
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
    def _tokens_of_code_points(self) -> Integer[np.ndarray, " 1114112"]:
        table = np.full(_CODE_POINTS, -1, np.int32)
        table[_code_points(self.itos)] = np.arange(len(self.itos))
        return table

    def encode(self, text: str) -> Shaped[np.ndarray, " N"]:
        tokens = self._tokens_of_code_points[_code_points(text)]
        if tokens.min(initial=0) < 0:
            raise _outside(
                text, int(np.argmin(tokens)), f"the vocabulary of {self.vocab_size} characters {self.itos[:100]!r}"
            )
        smallest: np.ndarray = tokens.astype(np.min_scalar_type(self.vocab_size - 1))
        return smallest

    def decode(self, tokens: Integer[np.ndarray, " N"]) -> str:
        characters = _code_points(self.itos)[_checked(tokens, self.vocab_size)]
        return str(characters.tobytes(), "utf-32-le", "surrogatepass")

    def decoder(self) -> "TokenDecoder":
        return TokenDecoder(self.itos)

    def symbols(self, text: str) -> str:
        return text

    def to_json(self) -> dict[str, Any]:
        return {"kind": "chars", "itos": self.itos, **_eot_json(self.eot)}


@dataclasses.dataclass(frozen=True)
class TokenDecoder:
    """Of vocabularies in which every token is one symbol: entry `token` of `itos`, or without one the number itself."""

    itos: str = ""
    vocab_size: int = 0

    def feed(self, token: int) -> str | tuple[str, ...]:
        token = int(_checked(token, len(self.itos) or self.vocab_size))
        return self.itos[token] if self.itos else (str(token),)

    def flush(self) -> str | tuple[str, ...]:
        return "" if self.itos else ()


@dataclasses.dataclass(frozen=True)
class IntegerTokenizer:
    """Tokens of another program's making, whose text is their numbers: '17 4 0'."""

    vocab_size: int
    eot: tuple[int, ...] = ()
    joint: ClassVar[str] = " "

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size < 2**31:
            raise UserError(f"vocab_size={printable(self.vocab_size)} must be at least 1 and below 2**31.")
        _check_eot(self.eot, self.vocab_size)

    @property
    def token_bytes(self) -> None:
        return None

    def encode(self, text: str) -> Shaped[np.ndarray, " N"]:
        try:
            tokens = np.array([int(word) for word in text.split()], np.int64)
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"These tokens have no text: give numbers in 0..{self.vocab_size - 1} between spaces, "
                f"not {text[:40]!r}."
            ) from error
        return _checked(tokens, self.vocab_size).astype(np.min_scalar_type(self.vocab_size - 1))

    def decode(self, tokens: Integer[np.ndarray, " N"]) -> str:
        return " ".join(map(str, _checked(tokens, self.vocab_size).tolist()))

    def decoder(self) -> TokenDecoder:
        return TokenDecoder(vocab_size=self.vocab_size)

    def symbols(self, text: str) -> tuple[str, ...]:
        return tuple(map(str, self.encode(text).tolist()))

    def to_json(self) -> dict[str, Any]:
        return {"kind": "integers", "vocab_size": self.vocab_size, **_eot_json(self.eot)}


_KINDS: dict[str, type[ByteTokenizer | CharTokenizer | IntegerTokenizer]] = {
    "bytes": ByteTokenizer,
    "chars": CharTokenizer,
    "integers": IntegerTokenizer,
}


def tokenizer_from_json(data: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `to_json` wrote. Raises UserError for anything else."""
    fields = dict(data) if isinstance(data, Mapping) else {}
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UserError(f"A tokenizer's kind is {printable(repr(kind))}. Valid: {', '.join(_KINDS)}.")
    eot = fields.pop("eot", [])
    if not isinstance(eot, list) or not all(type(token) is int for token in eot):
        raise UserError(f"A tokenizer's eot is {printable(eot)!r}; wanted a list of tokens that end a text.")
    wanted = {field.name: field.type for field in dataclasses.fields(_KINDS[kind]) if field.name != "eot"}
    if fields.keys() != wanted.keys() or not all(type(fields[key]) is wanted[key] for key in wanted):
        raise UserError(
            f"A tokenizer of kind {kind!r} has the fields {printable(fields)}; wanted {', '.join(wanted) or 'none'}."
        )
    return _KINDS[kind](**fields, eot=tuple(eot))


def make_tokenizer(kind: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer 'bytes', or the tokenizer 'chars' of all `texts` together."""
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "chars":
        return CharTokenizer.of_texts(texts)
    raise UserError(f"Unknown tokenizer {kind!r}. Valid: bytes, chars.")


def _code_points(text: str) -> Integer[np.ndarray, " N"]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _eot_json(eot: tuple[int, ...]) -> dict[str, Any]:
    return {"eot": list(eot)} if eot else {}


def _check_eot(eot: tuple[int, ...], vocab_size: int) -> None:
    if wrong := [token for token in eot if not 0 <= token < vocab_size]:
        raise UserError(f"The end-of-text token {wrong[0]} is not in the vocabulary, which is 0..{vocab_size - 1}.")


def _outside(text: str, place: int, what: str) -> UserError:
    character = text[place]
    return UserError(
        f"The character {character!r} (U+{ord(character):04X}) at place {place} of the text is not in {what}."
    )


def _checked(tokens: Integer[np.ndarray, "*N"] | int, vocab_size: int) -> Integer[np.ndarray, "*N"]:
    tokens = np.asarray(tokens)
    bad = (tokens < 0) | (tokens >= vocab_size)
    if bad.any():
        raise UserError(f"Token {tokens[bad][0]} is not in the vocabulary, which is 0..{vocab_size - 1}.")
    return tokens
