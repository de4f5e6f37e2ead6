"""IDX files, the format of MNIST and its family (http://yann.lecun.com/exdb/mnist/), plain or gzipped.

Nothing in a header is believed before the file has been seen to hold what it claims.
"""

import gzip
import io
import math
import os
import pathlib
import struct
import zlib

import numpy as np

from research.errors import UserError
from research.files import MOST_SWELLING, SMALL, check_regular, user_path

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_DIMS = 4
# Deflate shrinks data by 1032 at most (RFC 1951: 258 bytes from 2 bits), images that show anything by far less.
_MAX_GZIP_RATIO = 1032
_CHUNK = 1 << 20
_PARTS = {"train": ("train",), "test": ("t10k", "test")}
HOW_TO_GET = {
    "fashion_mnist": "Install the Debian package dataset-fashion-mnist",
    "mnist": "Get the four IDX files of MNIST",
}


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The array in an IDX file, in native byte order. Raises UserError for anything that is not exactly one IDX
    array."""
    path = pathlib.Path(path)
    check_regular(path)
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else path.open("rb") as file:
            return _read_stream(file, path, file_size, _MAX_GZIP_RATIO if zipped else 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is truncated or damaged: {error}. Get the file again.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error


def _read_stream(file: io.BufferedIOBase, path: pathlib.Path, file_size: int, most_ratio: int) -> np.ndarray:
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _DTYPES or not 1 <= head[3] <= _MAX_DIMS:
        raise UserError(
            f"{path} is not an IDX file: it starts with {head.hex() or 'nothing'}, not 0000TTDD (type, dimensions)."
        )
    dtype, ndim = np.dtype(_DTYPES[head[2]]), head[3]
    sizes = file.read(4 * ndim)
    if len(sizes) < 4 * ndim:
        raise UserError(f"{path} is truncated: it ends inside its header.")
    shape = struct.unpack(f">{ndim}I", sizes)
    wanted = math.prod(shape) * dtype.itemsize
    if most_ratio > 1 and wanted > SMALL:
        most_ratio = MOST_SWELLING  # a megabyte must not fill the memory
    if wanted > (file_size - (4 + 4 * ndim if most_ratio == 1 else 0)) * most_ratio:
        raise UserError(
            f"{path} claims {list(shape)}, {wanted} bytes, more than a file of its size can hold: truncated or damaged."
        )
    data = bytearray()
    while len(data) <= wanted and (chunk := file.read(min(_CHUNK, wanted + 1 - len(data)))):
        data += chunk
    if len(data) != wanted:
        found = f"holds {len(data)}" if len(data) < wanted else "goes on after them"
        raise UserError(
            f"{path} is damaged: its header {list(shape)} asks for {wanted} bytes of data, the file {found}."
        )
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def find_file(folder: pathlib.Path, split: str, kind: str) -> pathlib.Path:
    """The file of a split ('train', 'test') and kind ('images', 'labels'), by any of its usual names."""
    dims = {"images": 3, "labels": 1}[kind]
    names = [f"{part}-{kind}{dot}idx{dims}-ubyte{gz}" for part in _PARTS[split] for dot in "-." for gz in (".gz", "")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder} has no {names[0]} (nor {names[1]}); an IDX folder holds train and t10k images and labels, "
        ".gz or not."
    )


def read_folder(folder: str | os.PathLike[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The pairs (images, labels) of 'train' and 'test' in a folder with the four IDX files."""
    folder = user_path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: give one that holds the four IDX files.")
    result = {}
    for split in _PARTS:
        paths = {kind: find_file(folder, split, kind) for kind in ("images", "labels")}
        images, labels = (read_idx(path) for path in paths.values())
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise UserError(
                f"{paths['images']} holds {images.dtype}{list(images.shape)}; images are uint8 with 3 or 4 dimensions."
            )
        if labels.dtype != np.uint8 or labels.ndim != 1:
            raise UserError(
                f"{paths['labels']} holds {labels.dtype}{list(labels.shape)}; labels are uint8 with 1 dimension."
            )
        if len(images) != len(labels):
            raise UserError(
                f"{folder} does not fit together: {len(images)} images but {len(labels)} labels in its {split} files."
            )
        result[split] = images, labels
    return result


def usual_folders(name: str) -> list[pathlib.Path]:
    """Where the IDX folder of a data set is looked for, first to last; `prepare` puts it into the first."""
    folder = name.replace("_", "-")
    home = os.path.expanduser("~")
    own = [pathlib.Path(home, ".cache/nestax", folder)] if os.path.isabs(home) else []  # a container may know no home
    places = [*own, pathlib.Path("/usr/share/datasets") / folder]
    root = os.environ.get("NESTAX_DATA")
    return [user_path(root) / folder, *places] if root else places


def find_folder(name: str, data_dir: str | None) -> pathlib.Path:
    """`data_dir` if given, else the first of the usual folders of the data set that exists."""
    if data_dir is not None:
        return user_path(data_dir)
    places = usual_folders(name)
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f"{name} is in none of {', '.join(map(str, places))}. {HOW_TO_GET[name]}, or set data_dir to a folder with the "
        f"four IDX files, .gz or not (python -m launch.prepare --dataset={name} --from=DIR puts them in place)."
    )
