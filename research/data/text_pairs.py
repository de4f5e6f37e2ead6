"""Pairs of texts that belong together, from several domains: what sentence encoders are trained on.

Texts are cut into the words of prose and of code alike, `readBlock_2` into read, block and 2, and each word is a token
by its hash, so no vocabulary is fitted or stored. Every text begins with a place for the token of its domain.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from research.data.kinds import PAIRS
from research.data.registry import register
from research.data.source import Source, keyed_permutation
from research.data.splits import SPLITS
from research.data.text_files import read_file
from research.errors import UserError
from research.files import parse_json, printable, user_path

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_]+")
_ORDER_STREAM = 0x7A15


class Pair(NamedTuple):
    """Two texts that belong together and the index of their domain."""

    a: str
    b: str
    domain: int


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case; identifiers are cut at underscores, digits and changes of case."""
    return [word.lower() for word in _WORD.findall(text)]


def hashed(text: str, vocab_size: int, length: int) -> Integer[np.ndarray, " n"]:
    """Returns the tokens of a text: 0, the place of the domain's token, then 1 + CRC-32 of each word modulo (vocab_size
    - 1) (feature hashing, Weinberger et al. 2009, arXiv 0902.2206); at most `length` in all."""
    return np.array(
        [0, *(1 + zlib.crc32(word.encode()) % (vocab_size - 1) for word in words(text)[: length - 1])], np.int32
    )


@dataclasses.dataclass(frozen=True)
class PairSource(Source):
    """Pairs in memory.

    Attributes:
      texts: the pairs themselves.
      tokens: [N, 2, T], zeros behind the end of a text.
      lengths: [N, 2], tokens of each text, the place of the domain's token among them.
      domain: [N].
      domains: names of the domains.
    """

    name: str
    texts: tuple[Pair, ...]
    tokens: Integer[np.ndarray, "N 2 T"]
    lengths: Integer[np.ndarray, "N 2"]
    domain: Integer[np.ndarray, " N"]
    domains: tuple[str, ...]
    vocab_size: int

    def __len__(self) -> int:
        return len(self.tokens)

    def facts(self) -> Mapping[str, Any]:
        return {"vocab_size": self.vocab_size, "domains": self.domains}

    @property
    def digest(self) -> str:
        """SHA-256 of the texts in their order."""
        lines = "\n".join(repr(tuple(pair)) for pair in self.texts)
        return hashlib.sha256(lines.encode("utf-8", "backslashreplace")).hexdigest()

    def encode(self, text: str) -> tuple[Integer[np.ndarray, " T"], int]:
        """Returns the tokens of a text as the source holds them, and their number."""
        row = hashed(text, self.vocab_size, self.tokens.shape[2])
        return np.pad(row, (0, self.tokens.shape[2] - len(row))), len(row)

    def gather(
        self, indices: Integer[np.ndarray, " B"], epochs: Integer[np.ndarray, " B"] | None = None
    ) -> dict[str, np.ndarray]:
        return {"pairs": self.tokens[indices], "lengths": self.lengths[indices], "domain": self.domain[indices]}


def pair_sources(
    name: str, pairs: Mapping[str, Sequence[Pair]], domains: Sequence[str], *, length: int, vocab_size: int
) -> dict[str, PairSource]:
    """Returns the sources of the splits, each in an order of chance (one for all time), so that any batch mixes the
    domains.

    Raises:
      UserError: sizes that cannot be, a domain that is not among `domains`, or no pair to train on.
    """
    for option, value, least in (("length", length, 2), ("vocab_size", vocab_size, 2)):
        if value < least:
            raise UserError(f"{name}: {option}={value}; valid: whole numbers from {least}")
    sources = {}
    for split in SPLITS:
        given = pairs.get(split, ())
        texts = tuple(given[i] for i in keyed_permutation(len(given), _ORDER_STREAM))
        domain = np.array([pair.domain for pair in texts], np.int32).reshape(-1)
        for label in domain[(domain < 0) | (domain >= len(domains))]:
            raise UserError(f"{name}/{split}: domain label {label} that no expert has; valid: 0..{len(domains) - 1}")
        tokens, lengths = np.zeros((len(texts), 2, length), np.int32), np.zeros((len(texts), 2), np.int32)
        for i, pair in enumerate(texts):
            for side, text in enumerate((pair.a, pair.b)):
                row = hashed(text, vocab_size, length)
                tokens[i, side, : len(row)], lengths[i, side] = row, len(row)
        sources[split] = PairSource(f"{name}/{split}", texts, tokens, lengths, domain, tuple(domains), vocab_size)
    if not len(sources["train"]):
        raise UserError(f"{name}: there is no pair to train on")
    return sources


@register("text_pairs", PAIRS)
def load_text_pairs(
    *, data_dir: str | os.PathLike[str] | None = None, length: int = 64, vocab_size: int = 8192
) -> dict[str, PairSource]:
    """The files train.jsonl, validation.jsonl and test.jsonl of a folder: one {"a": TEXT, "b": TEXT, "domain": NAME} a
    line.

    The domains are those of the training file, sorted; a missing file is an empty split.

    Args:
      data_dir: the folder.
      length: tokens of a text; longer ones are cut.
      vocab_size: number of tokens, the place of the domain's included.

    Raises:
      UserError: no such folder, a line that is no pair, or a domain that is not in the training file.
    """
    if data_dir is None:
        raise UserError(
            "Data set 'text_pairs' needs data_dir: a folder with train.jsonl, validation.jsonl and test.jsonl."
        )
    folder = user_path(data_dir)
    if not os.path.lexists(folder / "train.jsonl"):
        raise UserError(f"There is no {folder / 'train.jsonl'}.")
    rows = {split: _read_lines(folder / f"{split}.jsonl") for split in SPLITS}
    domains = sorted({row["domain"] for row in rows["train"]})
    pairs = {}
    for split, lines in rows.items():
        for row in lines:
            if row["domain"] not in domains:
                raise UserError(
                    f"{folder / split}.jsonl, line {row['line']}: "
                    f"domain {printable(row['domain'])!r} that no expert has; "
                    f"valid: {printable(', '.join(domains), 200)}"
                )
        pairs[split] = [Pair(row["a"], row["b"], domains.index(row["domain"])) for row in lines]
    return pair_sources(f"text_pairs:{folder.name}", pairs, domains, length=length, vocab_size=vocab_size)


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a file of one a line; lines of spaces hold none. A missing file is empty."""
    if not os.path.lexists(path):
        return []
    rows, bad = [], []
    for number, line in enumerate(
        read_file(path, remedy="convert it to UTF-8").split("\n"), 1
    ):  # not splitlines: a string of JSON may hold other ends of lines
        if not line.strip():
            continue
        try:
            row = parse_json(line, "line")
        except UserError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("a", "b", "domain")):
            bad.append((number, line))
        else:
            rows.append(row | {"line": number})
    if bad:
        (number, line), more = bad[0], f"; so are {len(bad) - 1} more lines" if len(bad) > 1 else ""
        raise UserError(
            f'{path}, line {number} is not {{"a": TEXT, "b": TEXT, "domain": NAME}}: {printable(line, 60)}{more}'
        )
    return rows
