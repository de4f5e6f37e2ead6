"""Memory-mapped files of tokens: `.bin` (raw, as nanoGPT's train.bin and val.bin) and `.npy`."""

import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Integer, Shaped

from research.data.kinds import TOKENS
from research.data.registry import register
from research.data.splits import contiguous_split
from research.data.tokenizers import IntegerTokenizer, Tokenizer, tokenizer_from_json
from research.data.tokens import TOKEN_DTYPES, TokenSource, check_trainable
from research.errors import UserError
from research.files import check_regular, printable, read_json, user_path

_SUFFIXES = (".bin", ".npy")
_STEMS = {"train": "train", "validation": "val", "test": "test"}
_CHUNK = 1 << 24
_LARGEST_VOCABULARY = 2**31 - 1


def write_token_file(path: str | os.PathLike[str], tokens: Integer[np.ndarray, " N"], dtype: str = "uint16") -> None:
    """Writes tokens as a `.bin` or `.npy` file, which is whole or not there: a temporary file beside it is renamed.

    Raises UserError for a token that `dtype` (uint8, uint16, uint32 or int32) cannot hold, and for other suffixes.
    """
    path, kind, tokens = pathlib.Path(path), _dtype(dtype), np.asarray(tokens)
    _check_suffix(path)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
        raise UserError(
            f"{path}: tokens are {tokens.dtype}{list(tokens.shape)}; wanted integers in one dimension, at least one."
        )
    _check_range(path, tokens, int(np.iinfo(kind).max) + 1, f"what {dtype} holds")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if path.suffix == ".npy":
                header = {"descr": kind.str, "fortran_order": False, "shape": tokens.shape}
                np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(tokens), _CHUNK):
                file.write(tokens[start : start + _CHUNK].astype(kind).tobytes())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_token_file(path: str | os.PathLike[str], vocab_size: int, dtype: str = "uint16") -> Shaped[np.ndarray, " N"]:
    """The tokens of a `.bin` file of `dtype`, or of a `.npy` file, memory-mapped; every one is checked, in chunks.

    Raises:
      UserError: no such file, an empty file, a broken one, or a token outside 0..vocab_size - 1.
    """
    path = pathlib.Path(path)
    _check_suffix(path)
    check_regular(path)
    try:
        tokens = np.lib.format.open_memmap(path, "r") if path.suffix == ".npy" else _map_raw(path, _dtype(dtype))
    except (ValueError, EOFError, OverflowError, SyntaxError) as error:
        raise UserError(
            f"{path} is not a whole .npy file of numbers: {printable(str(error).splitlines()[0], 160)}"
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    if tokens.ndim != 1 or tokens.dtype not in TOKEN_DTYPES:
        raise UserError(
            f"{path} holds {tokens.dtype}{list(tokens.shape)}; wanted one dimension of {', '.join(TOKEN_DTYPES)}."
        )
    if not len(tokens):
        raise UserError(f"{path} holds no tokens.")
    _check_range(path, tokens, vocab_size, "the vocabulary")
    return tokens


@register("token_file", TOKENS)
def load_token_file(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    length: int = 256,
    vocab_size: int | None = None,
    dtype: str | None = None,
    split: str | tuple[float, ...] = "0.9,0.05",
    shift: bool = True,
    seed: int = 0,
) -> dict[str, TokenSource]:
    """Tokens of another program's making, memory-mapped.

    Args:
      data_dir: a folder with `train.bin`, `val.bin`, perhaps `test.bin` and `meta.json`, or `.npy` in place of `.bin`;
        or one such file, which is cut by `split`. `meta.json` may hold `vocab_size`, `dtype` and `tokenizer` (the plain
        data of `Tokenizer.to_json`, with which prompts and samples are text).
      length: tokens of an example.
      vocab_size: needed where `meta.json` does not tell it.
      dtype: of a `.bin` file: uint8, uint16 (where nothing else is said), uint32 or int32.
      split: of a single file, the parts of training and validation, in this order; the rest is test.
      shift: whether the training windows differ between epochs, see `TokenSource`.
      seed: keys these shifts.

    Raises:
      UserError: missing or broken files, a token outside the vocabulary, options that `meta.json` contradicts.
    """
    if data_dir is None:
        raise UserError(
            "Data set 'token_file' needs data_dir: a folder with train.bin and val.bin (or .npy), or one such file."
        )
    path = user_path(data_dir)
    meta = _read_meta(path / "meta.json" if path.is_dir() else path.with_name("meta.json"))
    tokenizer = _tokenizer(path, meta, vocab_size)
    dtype = _agreed(path, "dtype", dtype, meta.get("dtype")) or "uint16"
    if path.is_dir():
        paths = {name: _find(path, stem) for name, stem in _STEMS.items()}
        arrays = {name: read_token_file(file, tokenizer.vocab_size, dtype) for name, file in paths.items() if file}
    else:
        arrays = contiguous_split(read_token_file(path, tokenizer.vocab_size, dtype), split)
    arrays = {name: arrays.get(name, np.empty(0, dtype)) for name in _STEMS}
    sources = {
        name: TokenSource(f"token_file/{name}", array, length, tokenizer, shift=shift and name == "train", seed=seed)
        for name, array in arrays.items()
    }
    check_trainable(sources["train"])
    return sources


def _find(folder: pathlib.Path, stem: str) -> pathlib.Path | None:
    for suffix in _SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    if stem == _STEMS["test"]:
        return None
    raise UserError(f"{folder} has no {stem}.bin and no {stem}.npy; it needs train and val, and may have test.")


def _read_meta(path: pathlib.Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {}
    meta = read_json(path)
    if not isinstance(meta, dict) or not _is_count(meta.get("vocab_size", 1)):
        raise UserError(f'{path} must hold an object such as {{"vocab_size": 50257, "dtype": "uint16"}}.')
    return meta


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_VOCABULARY


def _tokenizer(path: pathlib.Path, meta: dict[str, Any], vocab_size: int | None) -> Tokenizer:
    told = meta.get("vocab_size")
    if "tokenizer" in meta:
        tokenizer = tokenizer_from_json(meta["tokenizer"])
        told = _agreed(path, "vocab_size", tokenizer.vocab_size, told)
    vocab_size = _agreed(path, "vocab_size", vocab_size, told)
    if vocab_size is None:
        raise UserError(
            f"{path} does not tell its vocabulary: set vocab_size, or put it into meta.json beside the tokens."
        )
    return tokenizer if "tokenizer" in meta else IntegerTokenizer(vocab_size)


def _agreed(path: pathlib.Path, option: str, given: Any, told: Any) -> Any:
    if None not in (given, told) and given != told:
        raise UserError(
            f"{path}: {option}={given!r} is asked for, but its meta.json says {printable(repr(told))}; leave one out."
        )
    return told if given is None else given


def _dtype(name: str) -> np.dtype:
    if not isinstance(name, str) or name not in TOKEN_DTYPES:
        raise UserError(f"Tokens cannot be {printable(repr(name))}. Valid: {', '.join(TOKEN_DTYPES)}.")
    return np.dtype(name).newbyteorder("<")


def _map_raw(path: pathlib.Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise UserError(
            f"{path} has {size} bytes, not a positive multiple of {dtype.itemsize} as {dtype} needs: broken, "
            "or another dtype."
        )
    return np.memmap(path, dtype, "r")


def _check_suffix(path: pathlib.Path) -> None:
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path} ends in {path.suffix or 'nothing'}; token files end in {' or '.join(_SUFFIXES)}.")


def _check_range(path: pathlib.Path, tokens: Integer[np.ndarray, " N"], size: int, what: str) -> None:
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        if chunk.max() >= size or chunk.min() < 0:
            place = int(np.argmax((chunk >= size) | (chunk < 0)))
            raise UserError(
                f"{path}: token {chunk[place]} at place {start + place} is outside {what}, which is 0..{size - 1}."
            )
