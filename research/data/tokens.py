"""Windows of one long array of tokens, addressed by index: the source of language modelling."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Integer, Shaped

from research.data.source import Source
from research.data.tokenizers import Tokenizer
from research.errors import UserError

TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32")

_UINT64 = (1 << 64) - 1
# A word of the Philox counter, so that no other use of (seed, epoch) draws from the same place.
_SHIFT_STREAM = 0x7031
_CHUNK = 1 << 24


def window_shift(length: int, seed: int, epoch: int) -> int:
    """By how many tokens (0..length - 1) the windows of an epoch are moved: the raw word of Philox for (seed,
    epoch)."""
    words = np.array([seed & _UINT64, epoch & _UINT64], np.uint64)
    counter = np.array([0, 0, 0, _SHIFT_STREAM], np.uint64)
    return int(np.random.Philox(key=words, counter=counter).random_raw()) % length


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSource(Source):
    """Windows of `length` tokens and the tokens that follow them, over N tokens in a row.

    Example i starts at token `i * length + s`. Without `shift` s is 0 and the examples cover everything: each token
    but the first is a label exactly once, and the last window, where shorter, is filled up. With `shift` s is drawn
    for each epoch, and the `N // length - 1` examples are the most that are whole windows whatever s is.

    Attributes:
      name: for messages and run cards.
      tokens: one-dimensional, in memory or memory-mapped; uint8, uint16, uint32 or int32 in 0..vocab_size - 1.
      length: T, the tokens of an example.
      tokenizer: the vocabulary.
      documents: the place of the first token of each document, ascending from 0; None where documents are unknown.
      shift: whether the windows differ between epochs, as they should in training. Evaluate with it off.
      seed: keys the shifts together with the epoch.

    Raises:
      UserError: a length below 1, or tokens or documents that are not as described.
    """

    name: str
    tokens: Shaped[np.ndarray, " N"]
    length: int
    tokenizer: Tokenizer
    documents: Integer[np.ndarray, " D"] | None = None
    shift: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"{self.name}: length={self.length} must be at least 1.")
        if self.tokens.ndim != 1 or self.tokens.dtype not in TOKEN_DTYPES:
            shape = list(self.tokens.shape)
            raise UserError(
                f"{self.name}: tokens are {self.tokens.dtype}{shape}; "
                f"wanted one dimension of {', '.join(TOKEN_DTYPES)}."
            )
        if self.documents is None or self.documents.size == self.tokens.size == 0:
            return
        places = np.append(self.documents, self.num_tokens)
        if places[0] != 0 or (np.diff(places) <= 0).any():
            raise UserError(
                f"{self.name}: documents must start at 0 and ascend, each with a token, "
                f"within {self.num_tokens} tokens."
            )

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def token_bytes(self) -> tuple[int, ...] | None:
        """The number of UTF-8 bytes of every token; None when unknown."""
        return self.tokenizer.token_bytes

    def facts(self) -> Mapping[str, Any]:
        return {"vocab_size": self.vocab_size, "token_bytes": self.token_bytes}

    def vocabulary(self) -> Tokenizer:
        return self.tokenizer

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the tokens as they are stored: of a `.bin` file, or a text in bytes, that of the file itself."""
        sha = hashlib.sha256()
        for start in range(0, self.num_tokens, _CHUNK):
            sha.update(np.ascontiguousarray(self.tokens[start : start + _CHUNK]).data)
        return sha.hexdigest()

    def encode(self, text: str) -> Shaped[np.ndarray, " n"]:
        return self.tokenizer.encode(text)

    def decode(self, tokens: Integer[np.ndarray, " n"]) -> str:
        return self.tokenizer.decode(tokens)

    def __len__(self) -> int:
        return max(self.num_tokens // self.length - 1 if self.shift else -(-(self.num_tokens - 1) // self.length), 0)

    def gather(
        self, indices: Integer[np.ndarray, " B"], epochs: Integer[np.ndarray, " B"] | None = None
    ) -> dict[str, np.ndarray]:
        """The windows at `indices`, moved by the shift of the epoch each belongs to; not moved without `epochs`.

        Returns:
          `{"tokens": int32 [B, T], "labels": int32 [B, T]}`; a label is the next token, or -1 (ignored) at the end of a
          document and in what fills up the last window, whose tokens are 0. Where documents are known also
          `"segment_ids": int32 [B, T]`, which count the documents of each window from 0; the filling is one of its own.
          Of a source whose last window is filled up (no `shift`) also `"lengths": int32 [B]`, tokens that are not
          filling.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"{self.name} has the examples 0..{len(self) - 1}, not {indices.min()}..{indices.max()}.")
        starts = indices * self.length + self._shifts(epochs)
        windows = self._windows(starts)
        block = {"tokens": np.maximum(windows[:, :-1], 0), "labels": windows[:, 1:].copy()}
        if self.documents is not None:
            begins = self._begins(self.documents, starts)
            block["labels"][begins[:, 1:]] = -1
            block["segment_ids"] = np.cumsum(begins[:, :-1], axis=1, dtype=np.int32)
        if not self.shift:
            block["lengths"] = np.minimum(self.num_tokens - starts, self.length).astype(np.int32)
        return block

    def _shifts(self, epochs: Integer[np.ndarray, " B"] | None) -> Integer[np.ndarray, " B"] | int:
        if epochs is None or not self.shift:
            return 0
        distinct, inverse = np.unique(epochs, return_inverse=True)
        return np.array([window_shift(self.length, self.seed, int(epoch)) for epoch in distinct], np.int64)[inverse]

    def _windows(self, starts: Integer[np.ndarray, " B"]) -> Integer[np.ndarray, "B W"]:
        """The tokens from each start on; -1 past the end."""
        width = self.length + 1
        windows = np.full((len(starts), width), -1, np.int32)
        whole = starts + width <= self.num_tokens
        if whole.any():
            windows[whole] = np.lib.stride_tricks.sliding_window_view(self.tokens, width)[starts[whole]]
        for row in np.flatnonzero(~whole):
            rest = self.tokens[starts[row] :]
            windows[row, : len(rest)] = rest
        return windows

    def _begins(
        self, documents: Integer[np.ndarray, " D"], starts: Integer[np.ndarray, " B"]
    ) -> Shaped[np.ndarray, "B W"]:
        """Whether another document than that of the window's first token (or the filling) begins at a place of a
        window."""
        begins = np.zeros((len(starts), self.length + 1), bool)
        first, last = (np.searchsorted(documents, places, "right") for places in (starts, starts + self.length))
        counts = last - first
        rows = np.repeat(np.arange(len(starts)), counts)
        # Document number `first[row] + k` for k in 0..counts[row] - 1, of all rows in a row.
        numbers = np.arange(len(rows)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        begins[rows, documents[numbers] - starts[rows]] = True
        ends = self.num_tokens - starts
        short = np.flatnonzero(ends <= self.length)
        begins[short, ends[short]] = True
        return begins


def check_trainable(source: TokenSource) -> None:
    """Raises UserError for a source that is too short for a single example."""
    if not len(source):
        least = 2 * source.length if source.shift else 2
        raise UserError(
            f"{source.name}: {source.num_tokens} tokens are too few for length={source.length}; "
            f"it needs at least {least}."
        )
