"""Pairs of texts: words and their hashes, functions and their docstrings, domains, files of the user's own, what bad
input gets."""

import json
import os
import zlib

import numpy as np
import pytest

from research.data import stdlib_pairs
from research.data.sources import load_splits
from research.data.text_pairs import Pair, hashed, pair_sources, words
from research.errors import UserError

FILE = b'''
def read(path):
    """Read a block."""
    # of the file
    return open(path).read()


class Reader:
    """Not a function."""

    def close(self):
        """Close it."""
        def inner():
            """Inner one."""
            return 3
        inner()

    def bare(self):
        return 1
'''


def test_words_of_prose_and_code():
    assert words("readBlock_2 of HTTPServer, Größe!") == ["read", "block", "2", "of", "http", "server", "gr", "öße"]


def test_tokens_are_hashes_behind_the_domain_s_place():
    expected = [0, *(1 + zlib.crc32(w) % 99 for w in (b"read", b"block"))]
    assert list(hashed("read_block", 100, 8)) == expected and list(hashed("ReadBlock of it", 100, 3)) == expected
    tokens = [t for w in range(500) for t in hashed(f"w{w}", 100, 8)[1:]]
    assert min(tokens) >= 1 and max(tokens) <= 99


def test_functions_of_a_file():
    found = list(stdlib_pairs.functions(FILE))
    assert found[0] == ("read", "Read a block.", "# of the file\nreturn open(path).read()")
    assert [(root, doc) for root, doc, _ in found[1:]] == [("Reader", "Close it."), ("Reader", "Inner one.")]
    assert found[1][2].startswith("def inner():") and found[2][2] == "return 3"
    assert not list(stdlib_pairs.functions(b"def broken(:"))


@pytest.fixture(scope="module")
def sources():
    return load_splits("stdlib_pairs", length=16)


@pytest.mark.slow
def test_standard_library_has_pairs_of_every_domain_in_every_split(sources):
    counts = {name: np.bincount(source.domain, minlength=5) for name, source in sources.items()}
    assert all(counts[name].min() >= 30 for name in counts) and counts["train"].sum() > 3000
    total = sum(c.sum() for c in counts.values())
    np.testing.assert_allclose(
        [counts[n].sum() / total for n in ("train", "validation", "test")], [0.75, 0.1, 0.15], atol=0.05
    )
    assert sources["train"].domains == tuple(stdlib_pairs.DOMAINS) and sources["train"].domains[1] == "internet"
    texts = [{pair.a for pair in source.texts} for source in sources.values()]
    assert sum(map(len, texts)) == total == len(set.union(*texts))
    owners = [m for modules in stdlib_pairs.DOMAINS.values() for m in modules.split()]
    assert len(owners) == len(set(owners))


def test_batches_hold_tokens_lengths_and_domains(sources):
    source = sources["test"]
    block = source.gather(np.array([5, 0]))
    assert (
        block["pairs"].shape == (2, 2, 16)
        and block["pairs"].dtype == block["lengths"].dtype == block["domain"].dtype == np.int32
    )
    for row, i in enumerate((5, 0)):
        for side, text in enumerate(source.texts[i][:2]):
            tokens, length = source.encode(text)
            np.testing.assert_array_equal(block["pairs"][row, side], tokens)
            assert block["lengths"][row, side] == length == len(hashed(text, 8192, 16))
            assert not block["pairs"][row, side, length:].any() and block["pairs"][row, side, 0] == 0
        assert block["domain"][row] == source.texts[i].domain
    assert len(set(source.domain[:64])) == 5  # any batch mixes the domains


def write(folder, **splits):
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text(
            "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        )


ROW = {"a": "what is it", "b": "it is this", "domain": "law"}


def test_pairs_of_one_s_own(tmp_path):
    write(tmp_path, train=[ROW, {**ROW, "domain": "art"}], test=[ROW])
    sources = load_splits("text_pairs", data_dir=str(tmp_path), length=8, vocab_size=50)
    assert [len(sources[n]) for n in ("train", "validation", "test")] == [2, 0, 1]
    assert sources["train"].domains == ("art", "law") and list(sources["test"].domain) == [1]
    assert sources["test"].texts == (Pair("what is it", "it is this", 1),)


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        ({}, {}, "There is no .*train.jsonl"),
        ({"train": []}, {}, "no pair to train on"),
        ({"train": ["{"]}, {}, "train.jsonl, line 1 is not"),
        ({"train": [ROW, {"a": 1, "b": "", "domain": "law"}]}, {}, "train.jsonl, line 2 is not"),
        (
            {"train": [ROW], "test": [ROW, {**ROW, "domain": "tax"}]},
            {},
            "test.jsonl, line 2: domain 'tax' that no expert has; valid: law",
        ),
        ({"train": [ROW]}, {"length": 1}, "length=1; valid: whole numbers from 2"),
        ({"train": [ROW]}, {"vocab": 9}, "no option 'vocab'. Valid: length, vocab_size"),
    ],
)
def test_bad_files(splits, options, message, tmp_path):
    write(tmp_path, **splits)
    with pytest.raises(UserError, match=message):
        load_splits("text_pairs", data_dir=str(tmp_path), **options)


def test_lines_are_those_of_json_whatever_their_ends_and_letters(tmp_path):
    odd = {**ROW, "a": "first\u2028second\x85third", "b": "lone \ud800 half"}
    text = (
        "\ufeff"
        + json.dumps(ROW)
        + "\r\n\n"
        + json.dumps(odd, ensure_ascii=False).replace("\ud800", "\\ud800")
        + "\r\n  \r\n"
    )
    (tmp_path / "train.jsonl").write_bytes(text.encode())
    assert {pair.a for pair in load_splits("text_pairs", data_dir=str(tmp_path))["train"].texts} == {ROW["a"], odd["a"]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff", r"cannot be read as UTF-8 text: train.jsonl \(byte 0 is no UTF-8\);\nconvert it to UTF-8"),
        (b"[" * 100_000, "train.jsonl, line 1 is not"),
        (b'{"a": ' + b"9" * 5000 + b"}\n{\n", "line 1 is not .*; so are 1 more lines"),
        (b'{"a": "\x1b[2J' + b"x" * 1000, r"is not .*: \{\"a\": \"\\x1b\[2J"),
        (None, r"train.jsonl \(not a regular file\)"),
    ],
)
def test_hostile_lines(data, message, tmp_path):
    if data is None:
        os.mkfifo(tmp_path / "train.jsonl")
    else:
        (tmp_path / "train.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=message) as told:
        load_splits("text_pairs", data_dir=str(tmp_path))
    assert len(str(told.value)) < 400 and "\x1b" not in str(told.value)


def test_a_folder_is_needed():
    with pytest.raises(UserError, match="needs data_dir"):
        load_splits("text_pairs")


def test_order_and_digest_are_functions_of_the_texts():
    pairs = [Pair(f"text {i}", f"its code {i}", i % 2) for i in range(20)]
    make = lambda given: pair_sources("x", {"train": given}, ("p", "q"), length=4, vocab_size=9)["train"]
    assert make(pairs).texts == make(pairs).texts != tuple(pairs) and set(make(pairs).texts) == set(pairs)
    assert len({make(p).digest for p in (pairs, pairs[::-1], pairs[1:])}) == 3


def test_labels_outside_the_domains():
    with pytest.raises(UserError, match="x/train: domain label 2 that no expert has; valid: 0..1"):
        pair_sources("x", {"train": [Pair("a b", "c d", 2)]}, ("p", "q"), length=4, vocab_size=9)
