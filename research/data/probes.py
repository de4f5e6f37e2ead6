"""Synthetic probes of recall and copying: token sequences made on demand, each a pure function of (seed, split, index).

`mqar` is multi-query associative recall (Arora et al. 2023, Zoology, arXiv 2312.04927), `selective_copying` and
`induction_heads` are the tasks of Mamba (Gu and Dao 2023, arXiv 2312.00752, section 4.1), `mad_recall` and
`mad_selective_copying` those of MAD (Poli et al. 2024, arXiv 2403.17844, section 3). A label sits at the position whose
output is read: the model does not shift.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from research.data import digests
from research.data.keyed_random import KeyedRandom
from research.data.kinds import TOKENS
from research.data.registry import register
from research.data.source import Source
from research.errors import UserError
from research.values import fit, fit_options

NOT_SCORED = -1
"""The label of a position whose output nobody reads."""

Block = tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]
SPLITS = {"train": 0, "validation": 1, "test": 2}
"""The streams of the splits: no two share an example."""


class Rule(Protocol):
    """How the sequences of one probe are made."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def length(self) -> int: ...

    def generate(self, random: KeyedRandom) -> Block:
        """Tokens and labels of a block of examples."""
        ...


def require(ok: bool, message: str) -> None:
    """Raises a UserError with the message unless `ok`."""
    if not ok:
        raise UserError(message)


@dataclasses.dataclass(frozen=True)
class MultiQueryRecall:
    """Multi-query associative recall: `pairs` keys and values, then every key once more, its value to be told on the
    spot.

    Keys are different tokens of 1..V/2 - 1, values of V/2..V - 1. Behind the 2D tokens of pairs come (T - 2D)/2 slots
    of two tokens; the D queries take slots drawn without replacement with probability proportional to n^(power_a - 1),
    n = 1 being the slot next to the pairs. The rest holds random tokens of the whole vocabulary, or 0 with
    random_non_queries=False.
    """

    vocab_size: int = 8192
    length: int = 64
    pairs: int = 4
    power_a: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self) -> None:
        require(self.pairs >= 1, f"mqar: pairs={self.pairs} must be at least 1.")
        require(self.length % 2 == 0, f"mqar: length={self.length} must be even.")
        limit = (
            f"mqar: pairs={self.pairs} need a length of at least {4 * self.pairs} (4 * pairs); length={self.length}."
        )
        require(4 * self.pairs <= self.length, limit)
        keys = self.vocab_size // 2 - 1
        require(
            self.pairs <= keys,
            f"mqar: vocab_size={self.vocab_size} has {keys} keys (vocab_size // 2 - 1) for pairs={self.pairs}.",
        )

    def generate(self, random: KeyedRandom) -> Block:
        pairs, start = self.pairs, 2 * self.pairs
        first_value = self.vocab_size // 2
        keys = 1 + random.distinct("keys", first_value - 1, pairs)
        values = first_value + random.distinct("values", self.vocab_size - first_value, pairs)
        weights = np.arange(1.0, (self.length - start) // 2 + 1) ** (self.power_a - 1)
        queries = start + 2 * random.weighted("slots", weights, pairs)
        tokens, labels = _blank(random, self.length)
        if self.random_non_queries:
            tokens[:, start:] = random.integers("filler", self.vocab_size, self.length - start)
        tokens[:, 0:start:2], tokens[:, 1:start:2] = keys, values
        np.put_along_axis(tokens, queries, keys, 1)
        np.put_along_axis(labels, queries, values, 1)
        return tokens, labels


@dataclasses.dataclass(frozen=True)
class SelectiveCopying:
    """Selective copying as S4's generator makes it: pick the tokens out of the noise, say them in order at the markers.

    `copies` tokens of 1..V - 2 lie in order at random places among zeros, then come as many markers V - 1, which are
    scored: length = noise + 2 * copies. Defaults are Mamba's; S4's own task has length 120, 10 tokens to copy and a
    vocabulary of 10.
    """

    vocab_size: int = 16
    length: int = 4096
    copies: int = 16

    def __post_init__(self) -> None:
        require(
            self.vocab_size >= 3,
            f"selective_copying: vocab_size={self.vocab_size} must be at least 3: noise, marker, tokens.",
        )
        limit = f"selective_copying: length={self.length} must be at least 2 * copies, copies={self.copies} at least 1."
        require(1 <= self.copies <= self.length // 2, limit)

    def generate(self, random: KeyedRandom) -> Block:
        start = self.length - self.copies
        copied = 1 + random.integers("tokens", self.vocab_size - 2, self.copies)
        places = np.sort(random.distinct("places", start, self.copies), axis=1)
        tokens, labels = _blank(random, self.length)
        np.put_along_axis(tokens, places, copied, 1)
        tokens[:, start:] = self.vocab_size - 1
        labels[:, start:] = copied
        return tokens, labels


@dataclasses.dataclass(frozen=True)
class MADSelectiveCopying:
    """Selective copying of MAD: tokens of 0..V - 3 with blanks (V - 2) between them, a copy token (V - 1), then blanks
    to fill.

    Each blank goes before one of the tokens, chosen at random, so the last token stands right before the copy token.
    The `copies` blanks at the end are scored.
    """

    vocab_size: int = 16
    length: int = 256
    copies: int = 16

    def __post_init__(self) -> None:
        require(self.vocab_size >= 3, f"mad_selective_copying: vocab_size={self.vocab_size} must be at least 3.")
        limit = (
            f"mad_selective_copying: length={self.length} must be above 2 * copies + 1, "
            f"copies={self.copies} at least 1."
        )
        require(self.copies >= 1 and 2 * self.copies + 1 < self.length, limit)

    def generate(self, random: KeyedRandom) -> Block:
        copies, blank = self.copies, self.vocab_size - 2
        copied = random.integers("tokens", self.vocab_size - 2, copies)
        before = random.integers("blanks", copies, self.length - 2 * copies - 1)
        blanks = (before[:, None, :] <= np.arange(copies)[:, None]).sum(-1)
        tokens, labels = _blank(random, self.length)
        tokens[:] = blank
        np.put_along_axis(tokens, blanks + np.arange(copies), copied, 1)
        tokens[:, -copies - 1] = self.vocab_size - 1
        labels[:, -copies:] = copied
        return tokens, labels


@dataclasses.dataclass(frozen=True)
class InductionHeads:
    """Induction heads: a special token (V - 1) occurs once, and again at the end; told is the token that followed it.

    All else is uniform on 0..V - 2; the first occurrence is uniform on the places that leave room for a follower.
    """

    vocab_size: int = 16
    length: int = 256

    def __post_init__(self) -> None:
        require(self.vocab_size >= 2, f"induction_heads: vocab_size={self.vocab_size} must be at least 2.")
        require(self.length >= 3, f"induction_heads: length={self.length} must be at least 3.")

    def generate(self, random: KeyedRandom) -> Block:
        tokens, labels = _blank(random, self.length)
        tokens[:] = random.integers("tokens", self.vocab_size - 1, self.length)
        rows, place = np.arange(len(random)), random.integers("place", self.length - 2)
        tokens[rows, place] = tokens[:, -1] = self.vocab_size - 1
        labels[:, -1] = tokens[rows, place + 1]
        return tokens, labels


@dataclasses.dataclass(frozen=True)
class MADRecall:
    """In-context recall of MAD: key, value, key, value, ...; a key that has occurred before has its value told at the
    key.

    Keys are drawn from the lower half of the tokens, each with one value from the upper half for the length of the
    sequence. With `noise` > 0 a pair is, with that probability, two of the `noise_vocab` highest tokens instead (MAD:
    vocab_size=32, noise=0.2, noise_vocab=16); one pair never is, and the last pair repeats an earlier key. MAD cuts off
    the last value; here it stays.

    With score_all=True every next token is a label, as MAD trains; `load_probe` does so for the training split only.
    """

    vocab_size: int = 16
    length: int = 128
    noise: float = 0.0
    noise_vocab: int = 0
    score_all: bool = False

    def __post_init__(self) -> None:
        require(
            self.length % 2 == 0 and self.length >= 4, f"mad_recall: length={self.length} must be even and at least 4."
        )
        require(0 <= self.noise < 1, f"mad_recall: noise={self.noise} is not in [0, 1).")
        require(
            self.noise == 0 or self.noise_vocab >= 1, f"mad_recall: noise={self.noise} needs noise_vocab of at least 1."
        )
        limit = (
            f"mad_recall: vocab_size={self.vocab_size} less noise_vocab={self.noise_vocab} must leave 2 tokens or more."
        )
        require(self.vocab_size - self.noise_vocab >= 2 and self.noise_vocab >= 0, limit)

    def generate(self, random: KeyedRandom) -> Block:
        pairs, rows = self.length // 2, np.arange(len(random))
        plain = self.vocab_size - self.noise_vocab
        num_keys = plain // 2
        values = num_keys + random.integers("values", plain - num_keys, num_keys)
        keys = random.integers("keys", num_keys, pairs)
        noisy = random.uniform("noisy", pairs) < self.noise
        noisy[rows, random.integers("plain", pairs - 1)] = noisy[:, -1] = False
        occurs = (keys[:, :, None] == np.arange(num_keys)) & ~noisy[:, :, None]
        # The last key is any that occurs before it, whatever it was drawn as.
        candidates = np.where(occurs[:, :-1].any(1), random.uniform("last", num_keys), -1)
        keys[:, -1] = candidates.argmax(1)
        occurs[:, -1] = keys[:, -1:] == np.arange(num_keys)
        times = np.take_along_axis(np.cumsum(occurs, 1, dtype=np.int32), keys[:, :, None], 2)[:, :, 0]
        told = np.take_along_axis(values, keys, 1)
        tokens, labels = _blank(random, self.length)
        tokens[:, 0::2], tokens[:, 1::2] = keys, told
        if self.noise:
            noise = plain + random.integers("noise", self.noise_vocab, self.length)
            tokens = np.where(np.repeat(noisy, 2, axis=1), noise, tokens).astype(np.int32)
        labels[:, 0::2] = np.where((times > 1) & ~noisy, told, NOT_SCORED)
        if self.score_all:
            labels[:, :-1] = tokens[:, 1:]
        return tokens, labels


KINDS: dict[str, type[Rule]] = {
    "mqar": MultiQueryRecall,
    "selective_copying": SelectiveCopying,
    "mad_selective_copying": MADSelectiveCopying,
    "induction_heads": InductionHeads,
    "mad_recall": MADRecall,
}


@dataclasses.dataclass(frozen=True)
class TokenProbe(Source):
    """A source of `examples` sequences made by a rule; nothing is stored.

    Example i is a function of (seed, stream, i), and of the epoch too when `fresh` and `gather` is told it: then no
    sequence is ever seen twice.
    """

    name: str
    rule: Rule
    examples: int
    seed: int
    stream: tuple[int, ...] = ()
    fresh: bool = False

    @property
    def vocab_size(self) -> int:
        return self.rule.vocab_size

    @property
    def length(self) -> int:
        return self.rule.length

    def facts(self) -> Mapping[str, Any]:
        return {"vocab_size": self.vocab_size, "token_bytes": None}

    @property
    def digest(self) -> str:
        return digests.of_examples(self)

    def __len__(self) -> int:
        return self.examples

    def gather(
        self, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"] | None = None
    ) -> dict[str, np.ndarray]:
        """The block {"tokens": int32 [B, T], "labels": int32 [B, T]}; the label -1 is not scored."""
        tokens, labels = self.rule.generate(
            KeyedRandom.of(self.seed, self.stream, indices, epochs if self.fresh else None)
        )
        return {"tokens": tokens, "labels": labels}


@dataclasses.dataclass(frozen=True)
class MixedProbe(Source):
    """Probes of several lengths one behind the other, filled up to the longest with token 0 and label -1 behind the
    sequence.

    A model that looks back only scores the same with and without the filling; `parts` evaluates each setting by itself.
    """

    name: str
    parts: tuple[TokenProbe, ...]

    @property
    def vocab_size(self) -> int:
        return max(part.vocab_size for part in self.parts)

    @property
    def length(self) -> int:
        return max(part.length for part in self.parts)

    def facts(self) -> Mapping[str, Any]:
        return {"vocab_size": self.vocab_size, "token_bytes": None}

    @property
    def digest(self) -> str:
        return digests.of_examples(self)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def gather(
        self, indices: Int[np.ndarray, " B"], epochs: Int[np.ndarray, " B"] | None = None
    ) -> dict[str, np.ndarray]:
        """The block {"tokens": int32 [B, T], "labels": int32 [B, T], "lengths": int32 [B]} with T of the longest
        part."""
        indices = np.asarray(indices)
        block: dict[str, np.ndarray] = {
            name: np.full((len(indices), self.length), fill, np.int32)
            for name, fill in (("tokens", 0), ("labels", NOT_SCORED))
        }
        block["lengths"] = np.zeros(len(indices), np.int32)
        start = 0
        for part in self.parts:
            here = (indices >= start) & (indices < start + len(part))
            if here.any():
                made = part.gather(indices[here] - start, None if epochs is None else np.asarray(epochs)[here])
                for name, array in made.items():
                    block[name][here, : part.length] = array
                block["lengths"][here] = part.length
            start += len(part)
        return block


@register("probe:", TOKENS)
def load_probe(
    kind: str,
    *,
    train_examples: int | None = None,
    test_examples: int | None = None,
    seed: int = 0,
    fresh: bool = False,
    test_options: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, TokenProbe | MixedProbe]:
    """The splits 'train', 'validation' and 'test' of a probe, with streams of their own.

    Args:
      kind: one of `KINDS`.
      train_examples: number of training examples.
      test_examples: number of validation examples, and of test examples.
      seed: keys every sequence.
      fresh: other training sequences in every epoch (where `gather` is told the epochs).
      test_options: options that are different for the test split, such as `{"length": 1024}`.
      **options: fields of the rule. For `mqar` also `mix`, a list of (length, pairs, examples): sequences of several
        lengths (Based, arXiv 2402.18668) in place of length, pairs and train_examples. Validation and test hold every
        part of the mix, `test_examples` of each, unless `test_options` says otherwise.

    Raises:
      UserError: an unknown kind or option, with the valid ones, or values that do not fit together.
    """
    test_options = test_options or {}
    mixed = kind == "mqar" and "mix" in options
    require(not mixed or train_examples is None, f"{kind}: the mix counts its examples; leave train_examples out.")
    counts = {"test_examples": test_examples} | ({} if mixed else {"train_examples": train_examples})
    sizes = check_counts(kind, counts)
    splits: dict[str, TokenProbe | MixedProbe] = {}
    for split, stream in SPLITS.items():
        chosen, count = dict(options), sizes.get("train_examples" if split == "train" else "test_examples", 0)
        if split != "train":
            chosen.pop("score_all", None)
        if split == "test" and test_options:
            chosen.pop("mix", None)
            chosen |= test_options
        mix = chosen.pop("mix", None) if kind == "mqar" else None
        settings = [(chosen, count)]
        if mix is not None:
            own_counts = split == "train" or (split == "test" and "mix" in test_options)
            settings = _mix_settings(mix, chosen, None if own_counts else count)
        probes = []
        for part, (fields, examples) in enumerate(settings):
            rule = find_rule("probe", kind, KINDS, fields, ("mix",) if kind == "mqar" else ())
            probes.append(
                TokenProbe(f"{kind}/{split}", rule, examples, seed, (stream, part), fresh and split == "train")
            )
        splits[split] = MixedProbe(f"{kind}/{split}", tuple(probes)) if mixed else probes[0]
    vocabularies = {split: source.vocab_size for split, source in splits.items()}
    require(
        len(set(vocabularies.values())) == 1,
        f"{kind}: vocab_size differs between splits: {vocabularies}; leave it out of test_options.",
    )
    return splits


def check_counts(kind: str, counts: Mapping[str, int | None]) -> dict[str, int]:
    """Returns numbers of examples. Raises a UserError that names one which is missing or below 1."""
    given = {}
    for name, count in counts.items():
        if count is None or count < 1:
            raise UserError(f"{kind}: {name}={count} must be a number of at least 1.")
        given[name] = count
    return given


def find_rule(
    what: str, kind: str, kinds: Mapping[str, type[Any]], options: dict[str, Any], also: tuple[str, ...] = ()
) -> Any:
    """The rule of that kind with those options; unknown ones are errors that list the valid ones, `also` among them."""
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"Unknown {what} {kind!r}.{hint} Valid: {', '.join(kinds)}.")
    valid = [field.name for field in dataclasses.fields(kinds[kind])]
    for option in options:
        require(option in valid, f"{kind} has no option {option!r}. Valid: {', '.join((*valid, *also)) or 'none'}.")
    return kinds[kind](**fit_options(options, kinds[kind], "data.options."))


def _mix_settings(mix: list[Any], options: dict[str, Any], examples: int | None) -> list[tuple[dict[str, Any], int]]:
    """Options and size of each part of a mix; `examples` takes the place of the mix's own counts."""
    fit(mix, tuple[tuple[int, ...], ...], "mqar: mix")
    fits = len(mix) > 0 and all(len(part) == 3 for part in mix)
    require(fits, f"mqar: mix={mix} must be a list of (length, pairs, examples).")
    require(not {"length", "pairs"} & options.keys(), "mqar: the mix gives length and pairs; leave them out.")
    check_counts("mqar", {f"examples of mix[{place}]": part[2] for place, part in enumerate(mix)})
    return [
        ({**options, "length": length, "pairs": pairs}, count if examples is None else examples)
        for length, pairs, count in mix
    ]


def _blank(random: KeyedRandom, length: int) -> Block:
    """Tokens of zeros and labels that score nothing."""
    shape = (len(random), length)
    return np.zeros(shape, np.int32), np.full(shape, NOT_SCORED, np.int32)
