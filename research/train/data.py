"""A run's data: what is known of them without reading them, and whether they are still those that the run was trained
on.

`data.json` in the run's directory holds both, so that whatever needs the model alone opens a run without its data.
"""

import functools
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.data.kinds import Transform
from research.data.registry import find
from research.data.source import Source, Told
from research.data.sources import load_splits
from research.data.splits import SPLITS
from research.data.tokenizer_files import FILE as TOKENIZER
from research.data.tokenizer_files import load_tokenizer, save_tokenizer
from research.data.tokenizers import Tokenizer
from research.errors import UserError
from research.files import dump_json, printable, read_json, write_json
from research.train import processes
from research.train.sections import RunConfig

FILE = "data.json"
VOCABULARY = "the vocabulary"


@dataclass(frozen=True)
class Facts:
    """What model, task and schedule need to know of a data set; no example is among it.

    Attributes:
      examples: split -> how many there are.
      sample: what a prepared one holds -> (its shape, its type).
      attributes: what the training examples tell, see `research.data.source.Source.facts`; "name" is among them.
      digests: split, and `VOCABULARY` -> SHA-256; None where they were not asked for.
    """

    examples: Mapping[str, int]
    sample: Mapping[str, tuple[tuple[int, ...], str]]
    attributes: Mapping[str, Any]
    digests: Mapping[str, str] | None = None

    @property
    def source(self) -> Told:
        """The source of the training examples as tasks know it."""
        return Told(self.attributes)

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a prepared batch of one example."""
        return {name: jax.ShapeDtypeStruct((1, *shape), np.dtype(kind)) for name, (shape, kind) in self.sample.items()}


class Data:
    """The splits of a config: loaded when they are asked for, at once where nothing is known of them.

    Args:
      config: of the run.
      known: facts of them, from `read`; None where the data tell.
      say: called with a line where they are not those of `known`.
    """

    def __init__(self, config: RunConfig, known: Facts | None = None, say: Callable[[str], None] = lambda _: None):
        self._config, self._known, self._say = config, known, say
        self.name: str = config.data.name
        self.transform: Transform = find(self.name)[0].examples.transform(config.data.augment)
        self.facts = known or self._facts()

    @functools.cached_property
    def splits(self) -> dict[str, Source]:
        """The sources, by the name of the split.

        Raises:
          UserError: they cannot be loaded, or their vocabulary is not that of the run.
        """
        data = self._config.data
        options = {"seed": 0, **data.options}
        splits = load_splits(
            data.name, data_dir=data.dir or None, validation_fraction=data.validation_fraction, **options
        )
        if (
            self._known is not None
            and self._known.digests is not None
            and (found := differences(self._known, _described(self, splits)))
        ):
            if VOCABULARY in found[-1]:
                raise UserError(
                    f"data {self.name} are not those that the run was trained on: {found[-1]}; restore them"
                )
            self._say(f"data {self.name} are not those that the run was trained on: {'; '.join(found)}")
        return splits

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The vocabulary of a text, None of other data."""
        return self.splits["train"].vocabulary()

    def _facts(self) -> Facts:
        source = self.splits["train"]
        sample = self.transform.evaluate(source.gather(np.arange(1)))
        told = {**source.facts(), "name": source.name}
        return Facts(
            {split: len(own) for split, own in self.splits.items()},
            {name: (array.shape[1:], array.dtype.str) for name, array in sample.items()},
            {name: _plain(value, f"{source.name}: the fact {name}") for name, value in told.items()},
        )


def _described(data: Data, splits: Mapping[str, Source]) -> Facts:
    """Facts with digests of the splits, and of the vocabulary where there is one."""
    digests = {split: source.digest for split, source in splits.items() if len(source)}
    if (tokenizer := splits["train"].vocabulary()) is not None:
        digests[VOCABULARY] = hashlib.sha256(dump_json(tokenizer.to_json()).encode()).hexdigest()
    known = data.facts
    return Facts({split: len(source) for split, source in splits.items()}, known.sample, known.attributes, digests)


def differences(old: Facts, new: Facts) -> list[str]:
    """Returns a line for each split of which number or content differ, and for the vocabulary, last."""
    lines = []
    for split in SPLITS:
        if old.examples.get(split, 0) != new.examples.get(split, 0):
            lines.append(f"{split} has {new.examples.get(split, 0):,} examples, not {old.examples.get(split, 0):,}")
    before, after = old.digests or {}, new.digests or {}
    for name in (*SPLITS, VOCABULARY):
        if name in before and name in after and before[name] != after[name]:
            lines.append(f"the content of {name} differs (SHA-256 {after[name][:8]}..., not {before[name][:8]}...)")
    return lines


def _refusal(found: Facts, tokenizer: Any, folder: Path) -> str:
    """Why data are not those that the run in a folder was trained on, "" where they are."""
    try:
        known = read(folder)
        before = load_tokenizer(folder, required=False) if tokenizer is not None else None
    except UserError as error:
        return str(error)
    changed = differences(known, found) if known is not None else []
    if not changed and before is not None and before.to_json() != tokenizer.to_json():
        changed = [f"their vocabulary is not that of {TOKENIZER}"]
    if not changed:
        return ""
    count = len(changed) - 1
    more = f" (and {count} other difference{'s' if count > 1 else ''})" if count else ""
    return f"{folder} was trained on other data: {changed[0]}{more}; restore them, or use another --workdir"


def keep(data: Data, folder: Path, trained: bool) -> None:
    """Writes what is known of a run's data, and its vocabulary, into its folder; each of several processes compares its
    own, the first writes.

    Args:
      data: loaded.
      folder: the run's.
      trained: whether a checkpoint is there: then the data must be those that it was trained on.

    Raises:
      UserError: they are others, in some process; raised in all of them.
    """
    found = _described(data, data.splits)
    tokenizer = data.tokenizer
    refusals = processes.texts(_refusal(found, tokenizer, folder) if trained else "")
    if refusal := next(filter(None, refusals), ""):
        raise UserError(refusal)
    if not processes.is_first():
        return
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    values = {
        "name": data.name,
        "examples": dict(found.examples),
        "sha256": found.digests,
        "sample": {name: [list(shape), kind] for name, (shape, kind) in found.sample.items()},
        "attributes": dict(found.attributes),
    }
    write_json(folder / FILE, {**values, "checksum": _checksum(values)})


def _checksum(values: Mapping[str, Any]) -> str:
    """SHA-256 of what `data.json` tells, by which other values are not believed."""
    return hashlib.sha256(dump_json(values).encode()).hexdigest()


def _plain(value: Any, what: str) -> Any:
    """Returns a value of a source as it is read again from JSON: numbers of NumPy are Python's, sequences tuples.

    Args:
      value: finite number, text, None, or a sequence or mapping of them.
      what: what messages call it.

    Raises:
      UserError: a value of another type.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return tuple(_plain(item, what) for item in value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, what) for key, item in value.items()}
    raise UserError(
        f"{what} is {printable(repr(value), 80)}; valid: finite numbers, texts, None, and sequences or mappings of them"
    )


def read(folder: str | os.PathLike[str]) -> Facts | None:
    """Returns what a run's `data.json` tells; None for runs of before there was one.

    Raises:
      UserError: the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    remedy = "remove it: the data are read then"
    found = read_json(path, ("examples", "sha256", "sample", "attributes", "checksum"), remedy)
    if found.pop("checksum") != _checksum(found):
        raise UserError(f"{path} is damaged: it does not hold what was written; {remedy}")
    try:
        sample = {name: (tuple(map(int, shape)), np.dtype(kind).str) for name, (shape, kind) in found["sample"].items()}
        attributes = {name: _plain(value, name) for name, value in found["attributes"].items()}
        examples = {name: int(count) for name, count in found["examples"].items()}
        return Facts(examples, sample, attributes, dict(found["sha256"]))
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}; remove it: the data are read then") from None
