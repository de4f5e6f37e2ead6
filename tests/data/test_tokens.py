"""Windows of token arrays against a twin that walks token by token; tokenizers; token files."""

import dataclasses
import hashlib
import json
import os

import numpy as np
import pytest

from research.data.token_files import load_token_file, read_token_file, write_token_file
from research.data.tokenizers import ByteTokenizer, CharTokenizer, IntegerTokenizer, tokenizer_from_json
from research.data.tokens import TokenSource, window_shift
from research.errors import UserError

VOCAB = 50


def make_source(size, length, documents=None, dtype=np.uint16, **options):
    tokens = np.random.default_rng(size).integers(0, VOCAB, size).astype(dtype)
    documents = None if documents is None else np.array(documents)
    return TokenSource("t", tokens, length, IntegerTokenizer(VOCAB), documents, **options)


def naive_example(source, index, shift):
    """One example, token by token."""
    place, last = index * source.length + shift, source.num_tokens - 1
    owner = (
        [sum(start <= p for start in source.documents) for p in range(last + 1)]
        if source.documents is not None
        else [0] * (last + 1)
    )
    tokens, labels, segments = [], [], []
    for p in range(place, place + source.length):
        tokens.append(int(source.tokens[p]) if p <= last else 0)
        inside = p + 1 <= last and owner[p + 1] == owner[p]
        labels.append(int(source.tokens[p + 1]) if inside else -1)
        segments.append((owner[p] if p <= last else owner[last] + 1) - owner[place])
    return tokens, labels, segments


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32])
@pytest.mark.parametrize(
    ("size", "length", "documents"),
    [
        (40, 7, None),
        (43, 7, [0, 3, 4, 5, 14, 21, 22, 42]),
        (29, 7, [0, 7, 14, 28]),
        (36, 7, [0]),
        (5, 8, [0, 2]),
        (6, 1, [0, 1, 4]),
    ],
)
def test_gather_equals_naive(size, length, documents, dtype):
    source = make_source(size, length, documents, dtype)
    block = source.gather(np.arange(len(source)))
    expected = [
        np.array(rows, np.int32)
        for rows in zip(*(naive_example(source, i, 0) for i in range(len(source))), strict=True)
    ]
    assert set(block) == {"tokens", "labels", "lengths"} | ({"segment_ids"} if documents else set())
    filling = np.arange(len(source) * length).reshape(-1, length) >= size
    np.testing.assert_array_equal(np.arange(length) < block["lengths"][:, None], ~filling)
    for key, rows in zip(("tokens", "labels", "segment_ids"), expected, strict=True):
        if key in block:
            np.testing.assert_array_equal(block[key], rows)
            assert block[key].dtype == np.int32 and block[key].shape == (len(source), length)
    if size >= 2 * length:
        training = dataclasses.replace(source, shift=True, seed=5)
        indices = np.array([0, len(training) - 1, 0, len(training) - 1])
        epochs = np.array([3, 0, 1, 3])
        block = training.gather(indices, epochs)
        assert "lengths" not in block  # training windows are never filled up
        for row in range(4):
            shift = window_shift(length, 5, int(epochs[row]))
            tokens, labels, segments = naive_example(source, int(indices[row]), shift)
            np.testing.assert_array_equal(block["tokens"][row], tokens)
            np.testing.assert_array_equal(block["labels"][row], labels)
            if documents:
                np.testing.assert_array_equal(block["segment_ids"][row], segments)


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 9, 14, 15, 40])
def test_evaluation_covers_every_token_exactly_once(size):
    source = make_source(size, 7)
    assert len(source) == -(-max(size - 1, 0) // 7)
    block = source.gather(np.arange(len(source)))
    labels, tokens = block["labels"].ravel(), block["tokens"].ravel()
    np.testing.assert_array_equal(labels[: max(size - 1, 0)], source.tokens[1:])
    assert (labels[max(size - 1, 0) :] == -1).all() and (labels[: max(size - 1, 0)] >= 0).all()
    np.testing.assert_array_equal(tokens[: max(size - 1, 0)], source.tokens[:-1])


@pytest.mark.parametrize("size", [13, 14, 20, 21, 22, 40])
def test_training_has_the_most_windows_that_fit_for_every_shift(size):
    source = make_source(size, 7, shift=True)
    furthest = lambda count: (count - 1) * 7 + 6 + 7
    assert len(source) == 0 or furthest(len(source)) < size
    assert furthest(len(source) + 1) >= size
    for epoch in range(20):
        block = source.gather(np.arange(len(source)), np.full(len(source), epoch))
        shift = window_shift(7, 0, epoch)
        np.testing.assert_array_equal(block["tokens"].ravel(), source.tokens[shift:][: 7 * len(source)])
        np.testing.assert_array_equal(block["labels"].ravel(), source.tokens[shift + 1 :][: 7 * len(source)])


def test_shifts_are_a_pure_function_of_seed_and_epoch():
    # Golden: the order of tokens in training, which must never move.
    assert [window_shift(256, 0, epoch) for epoch in range(6)] == GOLDEN_SHIFTS
    assert [window_shift(256, seed, 1) for seed in (1, 2, -1)] == GOLDEN_SEEDS
    assert {window_shift(5, 3, epoch) for epoch in range(60)} == set(range(5))
    source = make_source(400, 20, shift=True, seed=3)
    indices, epochs = np.array([0, 5, 0, 5]), np.array([0, 0, 4, 4])
    first = source.gather(indices, epochs)["tokens"]
    again = dataclasses.replace(source).gather(indices[::-1], epochs[::-1])["tokens"][::-1]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[2])
    other = dataclasses.replace(source, seed=4).gather(indices, epochs)["tokens"]
    assert not np.array_equal(first, other)
    still = dataclasses.replace(source, shift=False).gather(indices, epochs)["tokens"]
    np.testing.assert_array_equal(still, source.gather(indices)["tokens"])
    np.testing.assert_array_equal(still[1], source.tokens[100:120])


GOLDEN_SHIFTS, GOLDEN_SEEDS = [144, 193, 108, 80, 146, 113], [125, 217, 73]


def test_bad_sources():
    with pytest.raises(UserError, match="length=0"):
        make_source(10, 0)
    with pytest.raises(UserError, match=r"int64\[10\].*uint16"):
        make_source(10, 2, dtype=np.int64)
    for documents in ([1, 3], [0, 3, 3], [0, 10], [0, 5, 4], []):
        with pytest.raises(UserError, match="documents must start at 0"):
            make_source(10, 2, documents)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=r"0\.\.4"):
            make_source(10, 2).gather(np.array([0, index]))


TEXT = "Zäh wie Öl\r\n\tκαὶ 漢字 🙂 e\u0301 \x00 end"  # noqa: RUF001  (scripts are mixed on purpose)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer.of_texts([TEXT])], ids=["bytes", "chars"])
def test_text_round_trips_and_bytes_add_up(tokenizer):
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.decode(tokens) == TEXT and tokenizer.decode(tokens[:0]) == "" and len(tokenizer.encode("")) == 0
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert sum(tokenizer.token_bytes[token] for token in tokens) == len(TEXT.encode())
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again == tokenizer
    np.testing.assert_array_equal(again.encode(TEXT), tokens)


def test_chars_equal_nanogpt():
    tokenizer = CharTokenizer.of_texts(["hello", "world\n"])
    chars = sorted(set("helloworld\n"))
    assert tokenizer.stoi == {character: i for i, character in enumerate(chars)} and list(tokenizer.itos) == chars
    np.testing.assert_array_equal(tokenizer.encode("low"), [chars.index(c) for c in "low"])
    assert tokenizer.encode("low").dtype == np.uint8
    many = CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 257))))
    assert many.encode("丁").dtype == np.uint16 and many.token_bytes == (3,) * 257


def test_integers_round_trip():
    tokenizer = IntegerTokenizer(300)
    np.testing.assert_array_equal(tokenizer.encode("17 299\n0"), [17, 299, 0])
    assert tokenizer.decode(np.array([17, 299, 0])) == "17 299 0" and tokenizer.token_bytes is None
    assert tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer


def test_what_tokenizers_refuse():
    chars = CharTokenizer("abc")
    with pytest.raises(UserError, match=r"'ü' \(U\+00FC\) at place 2 .*3 characters 'abc'"):
        chars.encode("abüd")
    with pytest.raises(UserError, match=r"U\+DC80\) at place 1"):
        ByteTokenizer().encode("a\udc80")
    with pytest.raises(UserError, match=r"U\+DC80"):
        chars.encode("a\udc80")
    for tokenizer, tokens in ((chars, [0, 3]), (chars, [-1]), (ByteTokenizer(), [256]), (IntegerTokenizer(4), [4])):
        with pytest.raises(
            UserError, match=f"Token {tokens[-1]} is not in the vocabulary, which is 0..{tokenizer.vocab_size - 1}"
        ):
            tokenizer.decode(np.array(tokens))
    for text in ("4", "-1", "one", "1.5", "9" * 30):
        with pytest.raises(UserError, match="0..3"):
            IntegerTokenizer(4).encode(text)
    for itos in ("", "ba", "aa"):
        with pytest.raises(UserError, match="sorted"):
            CharTokenizer(itos)
    for data in (
        {},
        {"kind": "bpe"},
        None,
        {"kind": "chars"},
        {"kind": "chars", "itos": 3},
        {"kind": "bytes", "more": 1},
    ):
        with pytest.raises(UserError, match="kind"):
            tokenizer_from_json(data)


@pytest.fixture
def folder(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 1000, 500)
    write_token_file(tmp_path / "train.bin", tokens[:400])
    write_token_file(tmp_path / "val.bin", tokens[400:])
    return tmp_path


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
@pytest.mark.parametrize("suffix", [".bin", ".npy"])
def test_memmap_equals_array(tmp_path, suffix, dtype, monkeypatch):
    monkeypatch.setattr("research.data.token_files._CHUNK", 64)
    tokens = np.random.default_rng(0).integers(0, 1000, 500)
    path = tmp_path / f"train{suffix}"
    write_token_file(path, tokens, dtype)
    mapped = read_token_file(path, 1000, dtype)
    assert isinstance(mapped, np.memmap) and mapped.dtype == dtype
    np.testing.assert_array_equal(mapped, tokens)
    np.testing.assert_array_equal(np.load(path) if suffix == ".npy" else np.fromfile(path, dtype), tokens)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    disk, memory = (
        TokenSource("t", array, 16, IntegerTokenizer(1000), shift=True) for array in (mapped, tokens.astype(dtype))
    )
    indices = np.arange(len(disk))
    for key, rows in memory.gather(indices, indices % 3).items():
        np.testing.assert_array_equal(disk.gather(indices, indices % 3)[key], rows)
    assert disk.digest == memory.digest == hashlib.sha256(tokens.astype(dtype).tobytes()).hexdigest()
    other = dataclasses.replace(memory, tokens=(tokens ^ 1).astype(dtype))
    assert other.digest != memory.digest


def test_token_folder(folder):
    sources = load_token_file(data_dir=folder, length=16, vocab_size=1000)
    assert {name: (source.num_tokens, len(source)) for name, source in sources.items()} == {
        "train": (400, 24),
        "validation": (100, 7),
        "test": (0, 0),
    }
    assert sources["train"].shift and not sources["validation"].shift and sources["train"].token_bytes is None
    assert sources["train"].digest == hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest()
    write_token_file(folder / "test.npy", np.arange(40), "uint32")
    chars = CharTokenizer("".join(map(chr, range(32, 1032))))
    (folder / "meta.json").write_text(json.dumps({"dtype": "uint16", "tokenizer": chars.to_json()}))
    sources = load_token_file(data_dir=folder, length=16)
    assert sources["test"].decode(sources["test"].tokens[:3]) == ' !"' and sources["test"].vocab_size == 1000


def test_one_token_file_is_cut_in_order(folder):
    sources = load_token_file(data_dir=folder / "train.bin", length=16, vocab_size=1000, split="0.75,0.25", shift=False)
    assert [source.num_tokens for source in sources.values()] == [300, 100, 0] and len(sources["train"]) == 19
    joined = np.concatenate([source.tokens for source in sources.values()])
    np.testing.assert_array_equal(joined, np.fromfile(folder / "train.bin", "uint16"))


def test_a_token_outside_the_vocabulary_is_named(folder, monkeypatch):
    monkeypatch.setattr("research.data.token_files._CHUNK", 64)
    tokens = np.zeros(500, np.int32)
    tokens[[321, 400]] = 777
    write_token_file(folder / "val.bin", tokens)
    write_token_file(folder / "train.bin", np.arange(777))
    with pytest.raises(UserError, match=r"val\.bin: token 777 at place 321 .*vocabulary, which is 0\.\.776"):
        load_token_file(data_dir=folder, vocab_size=777)
    tokens[7] = -3
    np.save(folder / "x.npy", tokens)
    with pytest.raises(UserError, match=r"x\.npy: token -3 at place 7 "):
        read_token_file(folder / "x.npy", 1000)


def test_a_file_is_replaced_as_a_whole(folder, monkeypatch):
    mapped = read_token_file(folder / "val.bin", 1000)
    before = np.array(mapped)
    write_token_file(folder / "val.bin", np.zeros(100, np.int64))
    np.testing.assert_array_equal(mapped, before)
    assert not read_token_file(folder / "val.bin", 1000).any()

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_token_file(folder / "val.bin", before)
    assert not read_token_file(folder / "val.bin", 1000).any()
    assert sorted(p.name for p in folder.iterdir()) == ["train.bin", "val.bin"]


def test_a_failed_write_leaves_the_old_file(folder):
    before = (folder / "val.bin").read_bytes()
    for tokens, word in (
        ([1, 65536], "token 65536 at place 1"),
        ([-1], "token -1 at place 0"),
        ([0.5], "float64"),
        ([], "at least one"),
    ):
        with pytest.raises(UserError, match=word):
            write_token_file(folder / "val.bin", np.array(tokens))
    assert (folder / "val.bin").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["train.bin", "val.bin"]


def _several_arrays(path):
    """Writes several arrays in one file of this very name, to which np.savez would add its suffix."""
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))


@pytest.mark.parametrize(
    ("break_it", "options", "word"),
    [
        (lambda f: (f / "train.bin").write_bytes(b""), {}, "train.bin has 0 bytes"),
        (lambda f: (f / "train.bin").write_bytes(b"abc"), {}, "train.bin has 3 bytes, not a positive multiple of 2"),
        (lambda f: (f / "val.bin").unlink(), {}, "no val.bin and no val.npy"),
        (lambda f: (f / "test.npy").write_bytes(b"junk"), {}, "test.npy is not a whole .npy"),
        (lambda f: np.save(f / "test.npy", np.zeros(3)), {}, r"test.npy holds float64\[3\]"),
        (lambda f: np.save(f / "test.npy", np.zeros(0, np.uint8)), {}, "test.npy"),
        (lambda f: (f / "meta.json").write_text("{"), {}, "meta.json is damaged: Expecting"),
        (lambda f: (f / "meta.json").write_bytes(b"\xff"), {}, "meta.json is damaged: byte 0 is no UTF-8"),
        (lambda f: (f / "meta.json").write_text('{"vocab_size": true}'), {}, "meta.json must hold"),
        (lambda f: (f / "meta.json").write_text('{"vocab_size": 1' + 30 * "0" + "}"), {}, "meta.json must hold"),
        (lambda f: (f / "meta.json").write_text('{"dtype": [1]}'), {"dtype": None}, r"cannot be \[1\]. Valid: uint8"),
        (
            lambda f: (f / "meta.json").write_text('{"tokenizer": {"kind": ["chars"]}}'),
            {},
            r"kind is \['chars'\]. Valid: bytes",
        ),
        (
            lambda f: (f / "meta.json").write_text('{"tokenizer": {"kind": "chars", "itos": "\\ud800"}}'),
            {},
            "is not a sorted list",
        ),
        (lambda f: _several_arrays(f / "test.npy"), {}, "not a whole .npy"),
        (lambda f: os.mkfifo(f / "meta.json"), {}, "meta.json is not a regular file"),
        (lambda f: (f / "meta.json").write_text('{"vocab_size": "big"}'), {}, "meta.json must hold"),
        (
            lambda f: (f / "meta.json").write_text('{"vocab_size": 2000}'),
            {},
            "vocab_size=1000 is asked for, .* says 2000",
        ),
        (
            lambda f: (f / "meta.json").write_text('{"tokenizer": {"kind": "bpe"}}'),
            {},
            "'bpe'. Valid: bytes, chars, integers",
        ),
        (lambda f: None, {"vocab_size": None}, "set vocab_size"),
        (lambda f: None, {"dtype": "int64"}, "'int64'. Valid: uint8, uint16, uint32, int32"),
        (lambda f: None, {"length": 300}, "400 tokens are too few for length=300; it needs at least 600"),
        (lambda f: None, {"data_dir": None}, "needs data_dir"),
        (lambda f: None, {"data_dir": "/nope.bin"}, "/nope.bin is missing"),
        (lambda f: None, {"data_dir": "/nope"}, "/nope ends in nothing; token files end in .bin or .npy"),
    ],
)
def test_bad_token_files(folder, break_it, options, word):
    break_it(folder)
    with pytest.raises(UserError, match=word):
        load_token_file(**{"data_dir": folder, "length": 16, "vocab_size": 1000, **options})
