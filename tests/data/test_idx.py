"""IDX files made here, good and bad."""

import gzip
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data import idx
from research.data.sources import load_splits
from research.errors import UserError

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def encode(array: np.ndarray) -> bytes:
    code = CODES[array.dtype.str[1:]]
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write(path, array, compress=False):
    path.write_bytes(gzip.compress(encode(array), mtime=0) if compress else encode(array))
    return path


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("compress", [False, True])
def test_round_trip(tmp_path, dtype, compress):
    array = np.arange(-12, 12).reshape(2, 3, 4).astype(dtype)
    read = idx.read_idx(write(tmp_path / "file", array, compress))
    np.testing.assert_array_equal(read, array)
    assert read.dtype == np.dtype(dtype) and read.dtype.isnative


def make_folder(folder, compress=True, middle="-"):
    rng, gz = np.random.default_rng(0), ".gz" if compress else ""
    arrays = {}
    for part, count in (("train", 40), ("t10k", 20)):
        arrays[part] = rng.integers(0, 256, (count, 5, 6), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 4
        write(folder / f"{part}-images{middle}idx3-ubyte{gz}", arrays[part][0], compress)
        write(folder / f"{part}-labels{middle}idx1-ubyte{gz}", arrays[part][1], compress)
    return arrays


@pytest.mark.parametrize(("compress", "middle"), [(True, "-"), (False, "-"), (False, ".")])
def test_folder_loads_as_splits(tmp_path, compress, middle):
    arrays = make_folder(tmp_path, compress, middle)
    splits = load_splits("idx", data_dir=str(tmp_path), validation_fraction=0.1)
    assert {k: len(v) for k, v in splits.items()} == {"train": 36, "validation": 4, "test": 20}
    assert splits["train"].num_classes == 4 and splits["train"].image_shape == (5, 6, 1)
    np.testing.assert_array_equal(splits["test"].images[..., 0], arrays["t10k"][0])
    assert np.bincount(splits["validation"].labels).tolist() == [1, 1, 1, 1]


GOOD = encode(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
HUGE = struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x08", "not an IDX file"),
        (b"\x89PNG" + GOOD[4:], "89504e47"),
        (b"\x00\x00\x07\x03" + GOOD[4:], "not an IDX file"),
        (b"\x00\x00\x08\x00" + GOOD[4:], "not an IDX file"),
        (GOOD[:9], "inside its header"),
        (GOOD[:-1], "claims [2, 3, 4], 24 bytes"),
        (GOOD + b"x", "goes on"),
        (HUGE, "claims"),
        (gzip.compress(GOOD[:-1], mtime=0), "holds 23"),
        (gzip.compress(GOOD + b"x", mtime=0), "goes on"),
        (gzip.compress(GOOD, mtime=0)[:-9], "truncated"),
        (gzip.compress(HUGE, mtime=0), "claims"),
        (b"\x1f\x8bnonsense", "damaged"),
    ],
)
def test_bad_files(tmp_path, data, word):
    path = tmp_path / "bad-idx"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        idx.read_idx(path)
    assert word in str(caught.value) and str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="absent is missing"):
        idx.read_idx(tmp_path / "absent")


@settings(deadline=None, max_examples=150)
@given(data=st.binary(max_size=64), prefix=st.sampled_from([b"", b"\0\0\x08\x01", b"\0\0\x08\x03", b"\x1f\x8b\x08"]))
def test_any_bytes_give_an_array_or_a_user_error(tmp_path_factory, data, prefix):
    path = tmp_path_factory.getbasetemp() / "fuzz-idx"
    path.write_bytes(prefix + data)
    try:
        assert idx.read_idx(path).nbytes <= len(data)
    except UserError as error:
        assert str(path) in str(error)


def test_folder_that_does_not_fit_together(tmp_path):
    make_folder(tmp_path)
    write(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(19, np.uint8), True)
    with pytest.raises(UserError, match="20 images but 19 labels"):
        idx.read_folder(tmp_path)
    write(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros((20, 2), np.uint8), True)
    with pytest.raises(UserError, match="labels are uint8 with 1 dimension"):
        idx.read_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte"):
        idx.read_folder(tmp_path)


def test_a_small_file_does_not_fill_the_memory(tmp_path):
    """Deflate shrinks zeros by a thousand: what swells like that is refused by its header, whether it holds as much or
    not."""
    path = tmp_path / "images.gz"
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(">4B3I", 0, 0, 8, 3, 100, 1000, 1000))
        file.write(bytes(10**8))
    with pytest.raises(
        UserError, match=r"claims \[100, 1000, 1000\], 100000000 bytes, more than a file of its size can hold"
    ):
        idx.read_idx(path)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "images")
    with pytest.raises(UserError, match="images is not a regular file"):
        idx.read_idx(tmp_path / "images")
