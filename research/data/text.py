"""Text as a source of tokens: files and folders, tiny Shakespeare, TFDS; cut into training, validation and test.

`load_*` give `{"train", "validation", "test"}`, where test is an empty source if the data has but two parts. Texts are
read into memory; for what does not fit, write token files (`token_files.py`).
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from research.data import idx, tfds_prepare, tfds_source
from research.data.kinds import TOKENS
from research.data.registry import register
from research.data.splits import SPLITS, contiguous_split, path_split, split_bounds
from research.data.text_files import decode_text, list_files, read_file, read_files, say_left_out
from research.data.tfds_builder import DEFAULT_DIR, open_builder
from research.data.tokenizers import make_tokenizer
from research.data.tokens import TokenSource, check_trainable
from research.errors import UserError
from research.files import printable, user_path

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_SHAKESPEARE_FILES = ("tinyshakespeare.txt", "input.txt")
_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def text_sources(
    name: str,
    texts: Mapping[str, Sequence[str]],
    *,
    length: int,
    tokenizer: str,
    documents: bool,
    shift: bool = True,
    seed: int = 0,
) -> dict[str, TokenSource]:
    """Sources over the texts of each split, in a row; empty texts are left out.

    Args:
      name: of the data set, for messages.
      texts: the documents of 'train', 'validation' and 'test'; a split that is missing is empty.
      length: tokens of an example.
      tokenizer: 'bytes', or 'chars' for the characters of all splits together.
      documents: whether the texts are separate documents, whose borders no example may look across.
      shift: whether the training windows differ between epochs.
      seed: keys these shifts.

    Raises:
      UserError: no text at all, too little training text for one example, an unknown tokenizer.
    """
    kept = {split: [text for text in texts.get(split, ()) if text] for split in SPLITS}
    if not any(kept.values()):
        raise UserError(f"{name}: there is no text in it.")
    made = make_tokenizer(tokenizer, (text for split in SPLITS for text in kept[split]))
    sources = {}
    for split, split_texts in kept.items():
        pieces = [np.empty(0, np.min_scalar_type(made.vocab_size - 1)), *map(made.encode, split_texts)]
        starts = np.cumsum([len(piece) for piece in pieces[:-1]], dtype=np.int64)
        moved = shift and split == "train"
        sources[split] = TokenSource(
            f"{name}/{split}",
            np.concatenate(pieces),
            length,
            made,
            starts if documents else None,
            shift=moved,
            seed=seed,
        )
    check_trainable(sources["train"])
    return sources


@register("text", TOKENS)
def load_text(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    length: int = 256,
    tokenizer: str = "bytes",
    pattern: str = "",
    encoding: str = "utf-8",
    split: str | tuple[float, ...] = "0.9,0.05",
    shift: bool = True,
    seed: int = 0,
) -> dict[str, TokenSource]:
    """A text file, or the files of a folder as documents.

    Args:
      data_dir: the file or the folder. Hidden files and folders, and empty files, are left out, which a `Notice` says.
      length: tokens of an example.
      tokenizer: 'bytes' or 'chars'.
      pattern: which files of a folder: shell patterns of their names, such as '*.txt,*.md'; '' for all.
      encoding: of the files; one that is not in it is an error. A byte order mark is no part of a text, line ends stay
        as they are.
      split: the parts of training and validation; the rest is test. A single file is cut at characters, in this order;
        each file of a folder belongs to one split, by a hash of its relative path.
      shift: whether the training windows differ between epochs, see `TokenSource`.
      seed: keys these shifts.

    Raises:
      UserError: no such file, files that are not text in this encoding, no text, or no file of the folder belongs to
        training, or to a validation that is to be there.
    """
    if data_dir is None:
        raise UserError("Data set 'text' needs data_dir: a text file, or a folder of text files.")
    path = user_path(data_dir)
    sources = functools.partial(
        text_sources, f"text:{path.name}", length=length, tokenizer=tokenizer, shift=shift, seed=seed
    )
    if not path.is_dir():
        if not os.path.lexists(path):
            raise UserError(f"There is no file or folder {printable(path, 300)}.")
        texts = {name: [part] for name, part in contiguous_split(read_file(path, encoding), split).items()}
        return sources(texts, documents=False)
    names = list_files(path, pattern)
    read = dict(zip(names, read_files((path / name for name in names), path, encoding), strict=True))
    say_left_out(f"text:{path.name}", {"empty": [name for name, text in read.items() if not text]})
    texts = {name: [] for name in SPLITS}
    for relative, text in read.items():
        texts[path_split(relative, split)].append(text)
    if not any(map(any, texts.values())):
        raise UserError(
            f"{path} holds no text: none of its files{f' that match {pattern}' if pattern else ''} has any."
        )
    first, second = split_bounds(split)
    for name, wanted in (("train", True), ("validation", first < second)):
        if wanted and not any(texts[name]):
            count = sum(map(len, texts.values()))
            raise UserError(
                f"{path}: none of its {count} files falls into {name} with split={split}; give it a larger part, "
                "or one file."
            )
    return sources(texts, documents=True)


@register("tiny_shakespeare", TOKENS)
def load_tiny_shakespeare(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    length: int = 256,
    tokenizer: str = "chars",
    shift: bool = True,
    seed: int = 0,
) -> dict[str, TokenSource]:
    """Tiny Shakespeare (Karpathy 2015): 1,115,394 characters, 65 different ones, split as nanoGPT does.

    The first int(0.9 N) characters are training, the others validation; test is empty. The file `tinyshakespeare.txt`
    or `input.txt` or the TFDS set `tiny_shakespeare` is looked for in `data_dir` (which may be the file itself), and
    without one in `data/`, in $NESTAX_DATA and among the prepared TFDS sets; options as in `load_text`.

    Raises:
      UserError: no such file, or another text than the one of this SHA-256.
    """
    text = _find_shakespeare(data_dir)
    texts = {name: [part] for name, part in contiguous_split(text, (0.9, 0.1)).items()}
    return text_sources(
        "tiny_shakespeare", texts, length=length, tokenizer=tokenizer, documents=False, shift=shift, seed=seed
    )


@register("tfds_text:", TOKENS, prepare=tfds_prepare.prepare)
def load_tfds_text(
    name: str,
    *,
    data_dir: str | None = None,
    length: int = 256,
    tokenizer: str = "bytes",
    text_key: str = "text",
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    shift: bool = True,
    seed: int = 0,
) -> dict[str, TokenSource]:
    """A prepared TFDS data set in array_record format, whose examples are documents.

    Args:
      name: 'NAME', 'NAME/CONFIG' or 'NAME:VERSION'.
      data_dir: where it is prepared; TFDS's own folder if not given.
      length, tokenizer, shift, seed: as in `load_text`.
      text_key: the feature that holds the text.
      train_split, validation_split, test_split: TFDS splits, slices such as 'train[:90%]' included. Those not given are
        'train', 'validation' and 'test'; without a 'validation' the last 5 % of 'train' are held out, without a 'test'
        it is empty.

    Raises:
      UserError: not prepared, no such split or feature.
    """
    builder = open_builder(name, data_dir)
    known = list(builder.info.splits)
    if text_key not in builder.info.features:
        raise UserError(
            f"tfds:{name} has no feature {text_key!r}; set text_key to one of {', '.join(builder.info.features)}."
        )
    if validation_split is None and "validation" not in known and train_split is None:
        train_split, validation_split = "train[:95%]", "train[95%:]"
    chosen = {"train": train_split or "train", "validation": validation_split or "validation", "test": test_split}
    if test_split is None and "test" in known:
        chosen["test"] = "test"
    texts = {}
    for part, tfds_split in chosen.items():
        if tfds_split is None:
            continue
        if tfds_split.split("[")[0] not in known:
            raise UserError(f"tfds:{name} has no split {tfds_split!r}; set {part}_split. Valid: {', '.join(known)}.")
        texts[part] = _decoded(
            f"tfds:{name}/{tfds_split}", tfds_source.read_records(builder, name, tfds_split), text_key
        )
    return text_sources(
        f"tfds_text:{name}", texts, length=length, tokenizer=tokenizer, documents=True, shift=shift, seed=seed
    )


def _find_shakespeare(data_dir: str | os.PathLike[str] | None) -> str:
    usual = ["data", os.environ.get("NESTAX_DATA"), *idx.usual_folders("tiny_shakespeare")]
    folders = [data_dir] if data_dir else usual  # a place that was given is not replaced by another in silence
    places = [user_path(folder) for folder in folders if folder]
    for place in places:
        for path in [place, *(place / name for name in _SHAKESPEARE_FILES)]:
            if path.is_file():
                return _checked_shakespeare(str(path), read_file(path))
    prepared = [data_dir or DEFAULT_DIR]
    for folder in map(user_path, prepared):
        if (folder / "tiny_shakespeare").is_dir():
            builder = open_builder("tiny_shakespeare", str(folder))
            # TFDS cuts the same text into 90 %, 5 % and 5 %, one example each.
            parts = [
                _decoded(f"tiny_shakespeare/{s}", tfds_source.read_records(builder, "tiny_shakespeare", s), "text")
                for s in SPLITS
            ]
            text = "".join(text for part in parts for text in part)
            return _checked_shakespeare(str(folder / "tiny_shakespeare"), text)
    raise UserError(
        f"tiny_shakespeare: there is no {' or '.join(_SHAKESPEARE_FILES)} in {', '.join(map(str, places))}, "
        "nor the TFDS set in "
        f"{' or '.join(map(str, prepared))}.\nGet {_SHAKESPEARE_URL} (1.1 MB) and set data_dir to it, "
        "or prepare tfds:tiny_shakespeare."
    )


def _checked_shakespeare(place: str, text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise UserError(
            f"{place} is not tiny Shakespeare: its SHA-256 is {digest}, not {SHAKESPEARE_SHA256}.\n"
            f"Get {_SHAKESPEARE_URL}, or load another text with the data set 'text'."
        )
    return text


def _decoded(name: str, examples: Iterable[Mapping[str, object]], key: str) -> list[str]:
    """The texts of a TFDS split; names those that are none, up to three, and their number."""
    texts, bad = [], []
    for number, example in enumerate(examples):
        value = example[key]
        if not isinstance(value, bytes | str):
            raise UserError(
                f"{name} holds {type(value).__name__} where text is wanted; "
                "set text_key to the feature that holds the text."
            )
        try:
            texts.append(value if isinstance(value, str) else decode_text(value))
        except UserError as error:
            bad.append(f"example {number} ({error})")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"{name}: {len(bad)} of {len(texts) + len(bad)} texts are damaged: {', '.join(bad[:3])}{more}; "
            "prepare it anew"
        )
    return texts
