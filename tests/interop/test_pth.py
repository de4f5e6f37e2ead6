"""The reader of PyTorch files: true state dicts come out bit-equal, hostile and damaged files are refused and run
nothing."""

import os
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from research.errors import UserError
from research.interop import pth, read_weights

STORAGES = {np.dtype(d): n for n, d in pth.STORAGE_DTYPES.items()}


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def enc(value) -> bytes:
    """Pickle opcodes of a value; bytes are opcodes already."""
    match value:
        case bytes():
            return value
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int() if -(2**31) <= value < 2**31:
            return pickle.BININT + struct.pack("<i", value)
        case int():
            return pickle.LONG1 + bytes([9]) + value.to_bytes(9, "little", signed=True)
        case str():
            return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return pickle.MARK + b"".join(map(enc, value)) + pickle.TUPLE
        case dict():
            return (
                pickle.EMPTY_DICT + pickle.MARK + b"".join(enc(k) + enc(v) for k, v in value.items()) + pickle.SETITEMS
            )
    raise TypeError(value)


def call(function: bytes, *args) -> bytes:
    return function + enc(args) + pickle.REDUCE


def storage(key, numel, kind="FloatStorage") -> bytes:
    return enc(("storage", glob("torch", kind), key, "cpu", numel)) + pickle.BINPERSID


def tensor(store: bytes, offset, size, stride) -> bytes:
    hooks = call(glob("collections", "OrderedDict"))
    return call(glob("torch._utils", "_rebuild_tensor_v2"), store, offset, size, stride, False, hooks)


def write(path, tree, storages=None, *, root="archive", more=None, compress=zipfile.ZIP_STORED):
    body = tree if isinstance(tree, bytes) else enc(tree)
    with zipfile.ZipFile(path, "w", compress) as z:
        z.writestr(f"{root}/data.pkl", pickle.PROTO + b"\x02" + body + pickle.STOP)
        z.writestr(f"{root}/byteorder", "little")
        for key, data in (storages or {}).items():
            z.writestr(f"{root}/data/{key}", np.asarray(data).tobytes())
        for name, data in (more or {}).items():
            z.writestr(name, data)
    return str(path)


SIX = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int64, np.bool_])
def test_dtypes_come_out_bit_equal(tmp_path, dtype):
    data = np.array([0, 1, -2.5, 3, 1e-3, 7]).astype(dtype)
    path = write(
        tmp_path / "a.pth", {"w": tensor(storage("0", 6, STORAGES[np.dtype(dtype)]), 0, (2, 3), (3, 1))}, {"0": data}
    )
    got = pth.read_pth(path)["w"]
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, data.reshape(2, 3))


def test_strided_views_parameters_scalars_and_empty_tensors(tmp_path):
    tree = {
        "transposed": tensor(storage("0", 6), 0, (3, 2), (1, 3)),
        "tail": tensor(storage("0", 6), 4, (2,), (1,)),
        "step": tensor(storage("0", 6), 1, (2,), (2,)),
        "scalar": tensor(storage("0", 6), 5, (), ()),
        "empty": tensor(storage("0", 6), 0, (0, 4), (4, 1)),
        "parameter": call(
            glob("torch._utils", "_rebuild_parameter"),
            tensor(storage("0", 6), 0, (2,), (1,)),
            True,
            call(glob("collections", "OrderedDict")),
        ),
        "sized": tensor(storage("0", 6), 0, call(glob("torch", "Size"), (2, 2)), (2, 1)),
    }
    got = pth.read_pth(write(tmp_path / "a.pth", tree, {"0": SIX}))
    want = {"transposed": SIX.reshape(2, 3).T, "tail": SIX[4:], "step": SIX[1:4:2], "scalar": SIX[5],
            "empty": np.zeros((0, 4)), "parameter": SIX[:2], "sized": SIX[:4].reshape(2, 2)}  # fmt: skip
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        np.testing.assert_array_equal(got[name], value)


def test_ordered_dict_with_metadata_as_torch_writes_it(tmp_path):
    items = pickle.MARK + enc("w") + tensor(storage("0", 6), 0, (6,), (1,)) + pickle.SETITEMS
    state = call(glob("collections", "OrderedDict")) + items + enc({"_metadata": {"": {"version": 1}}}) + pickle.BUILD
    np.testing.assert_array_equal(pth.read_pth(write(tmp_path / "a.pth", state, {"0": SIX}))["w"], SIX)


def test_nested_checkpoints(tmp_path):
    one, two = (tensor(storage(k, 6), 0, (6,), (1,)) for k in "01")
    tree = {"epoch": 3, "optimizer": {0: 1}, "model": {"w": one}, "model_ema": {"w": two}}
    path = write(tmp_path / "a.pth", tree, {"0": SIX, "1": SIX + 10})
    np.testing.assert_array_equal(read_weights(path)["w"], SIX)
    np.testing.assert_array_equal(pth.read_pth(path, "model_ema")["w"], SIX + 10)
    with pytest.raises(UserError, match="no state dict 'teacher'; its entries are optimizer, model, model_ema"):
        pth.read_pth(path, "teacher")
    with pytest.raises(UserError, match="holds no state dict; its entries are epoch"):
        pth.read_pth(write(tmp_path / "b.pth", {"epoch": 3}))


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("torch", "load"), ("argparse", "Namespace")],
)
def test_foreign_names_are_refused_and_nothing_runs(tmp_path, module, name):
    ran = tmp_path / "ran"
    path = write(tmp_path / "a.pth", {"w": call(glob(module, name), f"touch {ran}")})
    with pytest.raises(UserError, match=f"needs {module}.{name}, which is not part of a state dict"):
        pth.read_pth(path)
    assert not ran.exists()


def test_os_system_made_by_pickle_itself(tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {ran}",)

    for protocol in (2, 4):
        payload = pickle.dumps({"w": Evil()}, protocol)
        with zipfile.ZipFile(tmp_path / "a.pth", "w") as z:
            z.writestr("archive/data.pkl", payload)
        with pytest.raises(UserError, match="system"):
            pth.read_pth(tmp_path / "a.pth")
        assert not ran.exists()
        pickle.loads(payload)  # the payload is a live one
        assert ran.exists()
        ran.unlink()


HOSTILE = {
    "beyond the storage": (tensor(storage("0", 6), 2, (5,), (1,)), "offset 2 in a storage of 6"),
    "strides beyond": (tensor(storage("0", 6), 0, (2, 2), (5, 1)), "in a storage of 6"),
    "expanded": (tensor(storage("0", 6), 0, (10**12,), (0,)), "in a storage of 6"),
    "negative offset": (tensor(storage("0", 6), -1, (2,), (1,)), "no counts"),
    "negative stride": (tensor(storage("0", 6), 5, (2,), (-1,)), "no counts"),
    "overflow": (tensor(storage("0", 6), 0, (2**62, 2**62), (0, 0)), "in a storage of 6"),
    "claims more": (tensor(storage("0", 7), 0, (7,), (1,)), "24 bytes are not the values"),
    "other type": (tensor(storage("0", 6, "DoubleStorage"), 0, (6,), (1,)), "24 bytes are not the values"),
    "unknown type": (tensor(storage("0", 6, "QInt8Storage"), 0, (6,), (1,)), "needs torch.QInt8Storage"),
    "no such storage": (tensor(storage("9", 6), 0, (6,), (1,)), "does not hold: 9"),
    "path as storage": (tensor(storage("../data.pkl", 6), 0, (6,), (1,)), "does not hold"),
    "no storage": (call(glob("torch._utils", "_rebuild_tensor_v2"), 1, 0, (6,), (1,)), "without a storage"),
    "a function's state": (
        glob("torch._utils", "_rebuild_tensor_v2") + enc({"x": 1}) + pickle.BUILD,
        "sets attributes",
    ),
    "huge memo": (enc(1) + pickle.LONG_BINPUT + struct.pack("<I", 2**31 - 1), "holds no state dict"),
    "opcode": (pickle.EMPTY_SET, "pickle opcode 143"),
    "huge bytearray": (pickle.BYTEARRAY8 + struct.pack("<Q", 2**60), "pickle opcode 150"),
    "endless hash": (pickle.EMPTY_DICT + enc((1,)) + enc(1) + pickle.SETITEM, "keys are neither"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles(tmp_path, case):
    value, message = HOSTILE[case]
    with pytest.raises(UserError, match=message):
        pth.read_pth(write(tmp_path / "a.pth", {"w": value}, {"0": SIX}))


def test_many_names_for_one_storage_cannot_claim_memory(tmp_path):
    view = tensor(storage("0", 6), 0, (3, 2), (1, 3))
    assert len(pth.read_pth(write(tmp_path / "a.pth", {f"w{i}": view for i in range(8)}, {"0": SIX}))) == 8
    with pytest.raises(UserError, match="claim 216 bytes out of 24"):
        pth.read_pth(write(tmp_path / "a.pth", {f"w{i}": view for i in range(9)}, {"0": SIX}))


def test_hostile_archives(tmp_path):
    good = {"w": tensor(storage("0", 6), 0, (6,), (1,))}
    with pytest.raises(UserError, match="points outside"):
        pth.read_pth(write(tmp_path / "a.pth", good, {"0": SIX}, more={"archive/../../etc/passwd": "x"}))
    with pytest.raises(UserError, match="points outside"):
        pth.read_pth(write(tmp_path / "a.pth", good, {"0": SIX}, more={"/etc/passwd": "x"}))
    with pytest.raises(UserError, match="is compressed"):
        pth.read_pth(write(tmp_path / "a.pth", good, {"0": np.zeros(10**6, np.float32)}, compress=zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match="without exactly one data.pkl"):
        pth.read_pth(write(tmp_path / "a.pth", good, {"0": SIX}, more={"other/data.pkl": "x"}))
    with pytest.raises(UserError, match="TorchScript"):
        pth.read_pth(write(tmp_path / "a.pth", good, {"0": SIX}, more={"archive/constants.pkl": "x"}))
    with pytest.warns(UserWarning, match="Duplicate"), pytest.raises(UserError, match="occurs twice"):
        pth.read_pth(write(tmp_path / "a.pth", good, {"0": SIX}, more={"archive/data/0": "x"}))


def test_entries_that_overlap_are_refused(tmp_path):
    """Many names in the directory for one stored entry: a bomb without compression."""
    path = write(tmp_path / "a.pth", {"w": tensor(storage("0", 6), 0, (6,), (1,))}, {"0": SIX})
    with zipfile.ZipFile(path, "a") as z:
        one = z.getinfo("archive/data/0")
        for i in range(1, 200):
            twin = zipfile.ZipInfo(f"archive/data/{i}")
            twin.header_offset, twin.file_size, twin.compress_size, twin.CRC = (
                one.header_offset,
                24 * 10**4,
                24 * 10**4,
                one.CRC,
            )
            z.filelist.append(twin)
            z.NameToInfo[twin.filename] = twin
        z._didModify = True
    with pytest.raises(UserError, match="zip entries claim"):
        pth.read_pth(path)


def test_damaged_files(tmp_path):
    path = write(
        tmp_path / "a.pth",
        {"w": tensor(storage("0", 10**4), 0, (10**4,), (1,))},
        {"0": np.arange(10**4, dtype=np.float32)},
    )
    data = pathlib.Path(path).read_bytes()
    bad = tmp_path / "b.pth"
    for cut in (10, len(data) // 2, len(data) - 5):
        bad.write_bytes(data[:cut])
        with pytest.raises(UserError, match="damaged or cut short"):
            pth.read_pth(bad)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    bad.write_bytes(flipped)
    with pytest.raises(UserError, match="CRC"):
        pth.read_pth(bad)
    for content in (b"", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"version https://git-lfs"):
        bad.write_bytes(content)
        with pytest.raises(UserError, match="not a zip-format PyTorch file"):
            pth.read_pth(bad)
    with pytest.raises(UserError, match="none.pth is missing"):
        pth.read_pth(tmp_path / "none.pth")


def test_against_torch(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.randn(5, 6)
    state = torch.nn.BatchNorm2d(3).state_dict()
    state |= {"view": base.T[1:3], "half": base.half(), "bfloat": base.bfloat16(), "double": base.double(),
              "tied": base, "scalar": torch.tensor(2.5), "parameter": torch.nn.Parameter(base[::2])}  # fmt: skip
    optimizer = torch.optim.AdamW([torch.nn.Parameter(base)])
    torch.save({"model": state, "optimizer": optimizer.state_dict(), "epoch": 1}, tmp_path / "a.pth")
    got = pth.read_pth(tmp_path / "a.pth")
    assert list(got) == list(state)
    for name, value in state.items():
        if value.dtype == torch.bfloat16:
            np.testing.assert_array_equal(got[name].view(np.uint16), value.view(torch.uint16).numpy())
        else:
            np.testing.assert_array_equal(got[name], value.detach().numpy(), strict=True)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "b.pth")
    with pytest.raises(UserError, match="needs torch.nn.modules.linear.Linear"):
        pth.read_pth(tmp_path / "b.pth")
    torch.save(state, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="not a zip-format"):
        pth.read_pth(tmp_path / "c.pth")
