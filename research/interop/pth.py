"""Reads PyTorch checkpoints (`torch.save`, zip format) without PyTorch and without running any pickled code.

A `.pth` file is a zip of one pickle and one raw entry per storage. The unpickler here knows only the handful of names
that a state dict needs, as inert stand-ins; every other name is an error before anything is called. Tensors stay
descriptions until the state dict is chosen, so optimizer state is never read.
"""

import collections
import io
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from research.errors import UserError
from research.files import check_regular, printable

MAX_PICKLE_BYTES = 64 * 2**20
MAX_STEPS, STEPS_AN_ENTRY = 2**19, 256
"""Opcodes that a pickle may have, beside so many for each storage: each may leave an object behind. A tensor takes
about 30."""
MAX_SHARING = 8  # tied weights share storages; nothing honest shares more
NESTED_KEYS = ("model", "state_dict", "model_ema", "state_dict_ema")
"""Where training scripts put the state dict, in the order in which they are tried."""

STORAGE_DTYPES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


@dataclass(frozen=True)
class _Storage:
    entry: str
    dtype: np.dtype
    numel: int


@dataclass(frozen=True)
class _Tensor:
    """A strided view of a storage; `offset` and `stride` count elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Refused(Exception):
    """Why a pickle is refused; becomes a UserError that also names the file."""


def read_pth(path: str | os.PathLike, key: str | None = None) -> dict[str, np.ndarray]:
    """Returns the state dict in a `.pth` file as host arrays; no code from the file is run.

    Args:
      path: file written by `torch.save` (PyTorch 1.6 or later).
      key: which entry of the checkpoint holds the state dict; None takes the file itself if it is one, else the
        first of NESTED_KEYS that it has.

    Raises:
      UserError: not such a file, damaged, not a state dict, or one that needs anything but tensors to be built.
    """
    path = os.fspath(path)
    _check_magic(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _checked_entries(archive, path)
            root = _root(entries)
            order = entries.get(f"{root}/byteorder")
            if order is not None and archive.read(order).strip() != b"little":
                raise _Refused("its numbers are stored big-endian; save it again on a little-endian machine")
            pickled = entries[f"{root}/data.pkl"]
            if pickled.file_size > MAX_PICKLE_BYTES:
                raise _Refused(f"its data.pkl holds {pickled.file_size} bytes, more than {MAX_PICKLE_BYTES}")
            tree = _unpickle(archive.read(pickled), entries, root)
            described = _choose(tree, key)
            return _materialise(archive, entries, described)
    except _Refused as e:
        raise UserError(f"{printable(path, 300)}: {printable(e, 400)}") from None
    except (
        zipfile.BadZipFile,
        EOFError,
        OSError,
        NotImplementedError,
        RuntimeError,
        UnicodeDecodeError,
        struct.error,
    ) as e:
        raise UserError(
            f"{printable(path, 300)}: damaged or cut short ({printable(e, 160)}); fetch or save it again"
        ) from None


def _check_magic(path: str) -> None:
    check_regular(path)
    try:
        with open(path, "rb") as f:
            magic = f.read(4)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if magic != b"PK\x03\x04":
        raise UserError(
            f"{path} is not a zip-format PyTorch file (PyTorch 1.6 or later); "
            "load it in PyTorch and write it again with torch.save(state_dict, path)"
        )


def _checked_entries(archive: zipfile.ZipFile, path: str) -> dict[str, zipfile.ZipInfo]:
    """Entries by name, after the checks that make reading them cost no more memory than the file has bytes."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        parts, shown = re.split(r"[/\\]", info.filename), printable(info.filename)
        if ".." in parts or info.filename.startswith(("/", "\\")) or ":" in parts[0]:
            raise _Refused(f"zip entry {shown} points outside of the archive")
        if info.filename in entries:
            raise _Refused(f"zip entry {shown} occurs twice")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise _Refused(f"zip entry {shown} is compressed, which torch.save never does")
        entries[info.filename] = info
    total, size = sum(i.file_size for i in entries.values()), os.path.getsize(path)
    if total > size:
        raise _Refused(f"its zip entries claim {total} bytes in a file of {size}")
    return entries


def _root(entries: Mapping[str, Any]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise _Refused("a zip file without exactly one data.pkl is not written by torch.save")
    if f"{roots[0]}/constants.pkl" in entries:
        raise _Refused("a TorchScript archive; save its state_dict() instead")
    return roots[0]


_OPCODES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
"""


_load_setitem: Callable[[Any], None] = pickle._Unpickler.dispatch[pickle.SETITEM[0]]
_load_setitems: Callable[[Any], None] = pickle._Unpickler.dispatch[pickle.SETITEMS[0]]


class _Dispatch(dict[int, Callable[[pickle.Unpickler], None]]):
    """What an opcode does; so many are looked up, then the pickle is refused."""

    steps = MAX_STEPS

    def __getitem__(self, opcode):
        self.steps -= 1
        if self.steps < 0:
            raise _Refused("its data.pkl makes more objects than the tensors of a state dict need")
        return super().__getitem__(opcode)

    def __missing__(self, opcode):
        raise _Refused(f"uses the pickle opcode {opcode}, which no state dict needs")


class _Unpickler(pickle._Unpickler):
    """The pure-Python unpickler with nothing to call and few opcodes.

    Its memo is a dictionary, so that no index can claim memory; keys are words or integers, so that no hash takes for
    ever.
    """

    stack: list[Any]

    dispatch = _Dispatch(
        {op[0]: pickle._Unpickler.dispatch[op[0]] for op in (getattr(pickle, name) for name in _OPCODES.split())}
    )

    def __init__(self, data: bytes, entries: Mapping[str, zipfile.ZipInfo], root: str):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.entries, self.root = entries, root
        self.dispatch = _Dispatch(self.dispatch)  # type: ignore[misc]  # stubs have it of the class alone
        self.dispatch.steps = MAX_STEPS + STEPS_AN_ENTRY * len(entries)
        self.allowed = {
            ("collections", "OrderedDict"): _ordered_dict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        } | {("torch", name): _StorageType(np.dtype(dtype)) for name, dtype in STORAGE_DTYPES.items()}

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise _Refused(
                f"needs {printable(module)}.{printable(name)}, which is not part of a state dict and is not run; "
                "in PyTorch, save the tensors alone: torch.save(checkpoint['model'], path)"
            )
        return self.allowed[module, name]

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
            raise _Refused("holds a reference that is not a tensor storage of a known type")
        _, kind, key, _, numel = pid
        if not isinstance(key, str) or not re.fullmatch(r"\w+", key) or f"{self.root}/data/{key}" not in self.entries:
            raise _Refused(
                "names a storage that the archive does not hold: "
                f"{printable(key) if isinstance(key, str) else type(key).__name__}"
            )
        entry = f"{self.root}/data/{key}"
        if not _is_count(numel) or numel * kind.dtype.itemsize != self.entries[entry].file_size:
            raise _Refused(
                f"holds a storage {key} whose {self.entries[entry].file_size} bytes are not the values of {kind.dtype} "
                "that it claims"
            )
        return _Storage(entry, kind.dtype, numel)

    def load_build(self):
        """Attributes are dropped (a state dict carries `_metadata`); nothing else can be given a state."""
        self.stack.pop()
        if type(self.stack[-1]) is not collections.OrderedDict:
            raise _Refused(f"sets attributes of a {type(self.stack[-1]).__name__}, which is not part of a state dict")

    def load_setitem(self):
        _check_keys(self.stack[-2:-1])
        _load_setitem(self)

    def load_setitems(self):
        _check_keys(self.stack[::2])
        _load_setitems(self)

    _own: ClassVar[dict[int, Any]] = {
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }
    dispatch |= _own


def _check_keys(keys) -> None:
    if not all(isinstance(k, str | int) for k in keys):
        raise _Refused("holds a dictionary whose keys are neither words nor integers")


def _ordered_dict(*args) -> collections.OrderedDict:
    if args:
        raise _Refused("holds an OrderedDict in the form of Python 2; save it again in Python 3")
    return collections.OrderedDict()


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _rebuild_tensor(storage, offset, size, stride, *_) -> _Tensor:
    if (
        not isinstance(storage, _Storage)
        or not isinstance(size, tuple)
        or not isinstance(stride, tuple)
        or len(size) != len(stride)
    ):
        raise _Refused("holds a tensor without a storage, a size and strides")
    if len(size) > 32 or not all(map(_is_count, (offset, *size, *stride))):
        raise _Refused("holds a tensor whose offset, size or strides are no counts, or with more than 32 axes")
    numel = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if numel and (last >= storage.numel or numel > storage.numel):
        raise _Refused(
            f"holds a tensor of size {printable(size)}, strides {printable(stride)}, "
            f"offset {printable(offset)} in a storage of {storage.numel} values"
        )
    return _Tensor(storage, offset, size, stride)


def _rebuild_parameter(data, *_) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise _Refused("holds a parameter that is not a tensor")
    return data


def _unpickle(data: bytes, entries: Mapping[str, zipfile.ZipInfo], root: str) -> Any:
    try:
        return _Unpickler(data, entries, root).load()
    except _Refused:
        raise
    except Exception as e:  # a hostile or damaged pickle can fail in any way at all
        raise _Refused(f"its data.pkl cannot be read ({type(e).__name__}: {printable(e, 100)})") from None


def _choose(tree: Any, key: str | None) -> dict[str, _Tensor]:
    if not isinstance(tree, dict):
        raise _Refused(f"holds a {type(tree).__name__}, not a state dict")
    if key is not None:
        if not isinstance(tree.get(key), dict):
            raise _Refused(
                f"has no state dict {printable(key)!r}; its entries are "
                f"{_shown(k for k, v in tree.items() if isinstance(v, dict))}"
            )
        tree = tree[key]
    elif not any(isinstance(v, _Tensor) for v in tree.values()):
        found = [k for k in NESTED_KEYS if isinstance(tree.get(k), dict)]
        if not found:
            raise _Refused(
                f"holds no state dict; its entries are {_shown(tree)}, "
                f"and one of {', '.join(NESTED_KEYS)} is looked for"
            )
        tree = tree[found[0]]
    bad = [k for k, v in tree.items() if not isinstance(k, str) or not isinstance(v, _Tensor)]
    if bad or not tree:
        raise _Refused(f"its state dict holds {'values that are not tensors: ' + _shown(bad) if bad else 'no tensors'}")
    return dict(tree)


def _shown(names) -> str:
    names = [printable(n, 60) for n in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"


def _materialise(
    archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], described: Mapping[str, _Tensor]
) -> dict[str, np.ndarray]:
    claimed = sum(math.prod(t.size) * t.storage.dtype.itemsize for t in described.values())
    stored = sum(entries[entry].file_size for entry in {t.storage.entry for t in described.values()})
    if claimed > MAX_SHARING * stored:
        raise _Refused(f"its tensors claim {claimed} bytes out of {stored} stored ones")
    storages: dict[tuple[str, np.dtype], np.ndarray] = {}
    out = {}
    for name, t in described.items():
        where = (t.storage.entry, t.storage.dtype)
        if where not in storages:
            storages[where] = np.frombuffer(archive.read(entries[t.storage.entry]), t.storage.dtype)
        flat, itemsize = storages[where][t.offset :], t.storage.dtype.itemsize
        if math.prod(t.size) == 0:
            out[name] = np.zeros(t.size, t.storage.dtype)
            continue
        view = np.lib.stride_tricks.as_strided(flat, t.size, [s * itemsize for s in t.stride], writeable=False)
        out[name] = np.ascontiguousarray(view).reshape(t.size)
    return out
