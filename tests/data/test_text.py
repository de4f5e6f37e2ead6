"""Text as tokens: which file belongs to which split, where documents end, and what bad input gets."""

import codecs
import hashlib
import inspect
import json
import os
import pathlib
import sysconfig

import numpy as np
import pytest

from research.data import stdlib_text, text, text_files
from research.data.splits import contiguous_split, path_split, split_bounds
from research.data.text import load_text, load_tfds_text, load_tiny_shakespeare
from research.errors import Notice, UserError

STDLIB = pathlib.Path(sysconfig.get_paths()["stdlib"])


def documents(source):
    """The text of each document of a source."""
    return [source.decode(part) for part in np.split(source.tokens, source.documents[1:])]


def test_paths_decide_the_split_for_ever():
    # Golden: files must not move between splits from one version to the next.
    for expected, path in GOLDEN_PATHS.items():
        assert path_split(path, "0.9,0.05") == expected
    splits = [path_split(f"folder/file{k}.txt", (0.6, 0.3)) for k in range(2000)]
    shares = [splits.count(name) / 2000 for name in ("train", "validation", "test")]
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=0.03)


GOLDEN_PATHS = {"train": "_pydecimal.py", "validation": "asyncio/threads.py", "test": "gzip.py"}


def test_split_bounds():
    assert split_bounds("0.7, 0.3") == (0.7, 1.0) and split_bounds((0.9, 0.05)) == (0.9, 0.95)
    assert contiguous_split("abcdefghij", "0.5,0.3") == {"train": "abcde", "validation": "fgh", "test": "ij"}
    for split in ("0.9", "a,b", (0.5, 0.3, 0.2), None, "0,0.5", "0.9,-0.1", "0.9,0.2", "nan,0.1"):
        with pytest.raises(UserError, match="split="):
            split_bounds(split)


def test_stdlib_text_round_trips_with_its_manifest():
    manifest = stdlib_text.manifest()
    sources = stdlib_text.load_stdlib_text(length=64, tokenizer="chars")
    assert json.loads(json.dumps(manifest)) == manifest
    by_split = {name: [file for file in manifest["files"] if file["split"] == name] for name in sources}
    for name, source in sources.items():
        expected = [(STDLIB / file["path"]).read_bytes() for file in by_split[name] if file["bytes"]]
        assert [part.encode() for part in documents(source)] == expected
        kept = [file for file in by_split[name] if file["bytes"]]
        assert [hashlib.sha256(data).hexdigest() for data in expected] == [file["sha256"] for file in kept]
        np.testing.assert_array_equal(source.encode(source.decode(source.tokens)), source.tokens)
        sizes = np.array(source.token_bytes)[source.tokens]
        assert sizes.sum() == sum(file["bytes"] for file in kept)
    assert manifest["bytes"] == sum(file["bytes"] for file in manifest["files"]) > 5_000_000
    shares = [len(by_split[name]) / len(manifest["files"]) for name in sources]
    np.testing.assert_allclose(shares, [0.9, 0.05, 0.05], atol=0.03)
    paths = [file["path"] for file in manifest["files"]]
    assert paths == sorted(paths) and {"ast.py", "json/decoder.py"} <= set(paths)
    parts = {part for path in paths for part in path.split("/")}
    assert not parts & {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    assert not any(path.startswith("_sysconfigdata") for path in paths)


def test_stdlib_manifest_tells_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match=r"holds no \.py files"):
        stdlib_text.load_stdlib_text()
    for name in ("b.py", "a/b.py", "a/c.txt", "a/tests/d.py", "site-packages/e.py", "config-3.11-x/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe4\n")
    first = stdlib_text.manifest()
    assert [file["path"] for file in first["files"]] == ["a/b.py", "b.py"] and first["bytes"] == 10
    lines = "".join(f"{hashlib.sha256(b'text' + bytes([10])).hexdigest()}  {path}\n" for path in ("a/b.py", "b.py"))
    assert first["digest"] == hashlib.sha256(lines.encode()).hexdigest()
    (tmp_path / "b.py").write_text("tent\n")
    assert stdlib_text.manifest()["digest"] != first["digest"]


def test_stdlib_text_in_small():
    small, again = (stdlib_text.load_stdlib_text(length=64, max_bytes=100_000) for _ in range(2))
    assert [source.num_tokens for source in small.values()] == pytest.approx([90_000, 5_000, 5_000], abs=3)
    files = [file for file in stdlib_text.manifest()["files"] if file["bytes"]]
    for name, source in small.items():
        parts = [part.encode() for part in documents(source)]
        in_split = [file["path"] for file in files if file["split"] == name]
        chosen = sorted(in_split, key=lambda path: hashlib.sha256(path.encode()).hexdigest())[: len(parts)]
        wholes = [(STDLIB / path).read_bytes() for path in sorted(chosen)]
        assert all(whole.startswith(part) for whole, part in zip(wholes, parts, strict=True))
        assert [path for path, whole, part in zip(sorted(chosen), wholes, parts, strict=True) if whole != part] in (
            [],
            chosen[-1:],
        )
        assert again[name].digest == source.digest
    with pytest.raises(UserError, match="max_bytes=0"):
        stdlib_text.load_stdlib_text(max_bytes=0)
    with pytest.raises(
        UserError, match="stdlib_text/train: 90 tokens are too few for length=64; it needs at least 128"
    ):
        stdlib_text.load_stdlib_text(max_bytes=100, length=64)


def test_one_file_is_cut_in_order_at_characters(tmp_path):
    path = tmp_path / "book.txt"
    content = "äöü\r\nß" * 50
    path.write_bytes(content.encode())
    for tokenizer, width in (("bytes", 256), ("chars", 6)):
        sources = load_text(data_dir=path, length=8, tokenizer=tokenizer, split="0.55,0.25")
        assert {source.vocab_size for source in sources.values()} == {width}
        decoded = {name: source.decode(source.tokens) for name, source in sources.items()}
        assert decoded == {"train": content[:165], "validation": content[165:240], "test": content[240:]}
        assert sources["train"].documents is None and sources["train"].shift and not sources["validation"].shift
    assert not load_text(data_dir=path, length=8, shift=False)["train"].shift


@pytest.fixture
def folder(tmp_path):
    for k in range(40):
        (tmp_path / f"part{k % 3}").mkdir(exist_ok=True)
        (tmp_path / f"part{k % 3}" / f"file{k}.txt").write_text(f"Text {k}: " + "ab" * k)
    (tmp_path / "notes.md").write_text("# Notes")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / ".hidden.txt").write_text("hidden")
    return tmp_path


def test_folder_has_a_document_for_each_file(folder):
    sources = load_text(data_dir=folder, length=16, split="0.6,0.2")
    found = {name: documents(source) for name, source in sources.items()}
    below = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt") if path.parent != folder)
    files = [*below, "notes.md"]
    for name in sources:
        assert found[name] == [
            (folder / file).read_text() for file in sorted(files) if path_split(file, "0.6,0.2") == name
        ]
    assert sum(map(len, found.values())) == 41
    (folder / "part0" / "another.txt").write_text("new")
    after = {name: documents(source) for name, source in load_text(data_dir=folder, length=16, split="0.6,0.2").items()}
    assert {name: [part for part in parts if part != "new"] for name, parts in after.items()} == found


def test_labels_and_segments_at_the_ends_of_files(folder):
    source = load_text(data_dir=folder, length=16, split="0.6,0.2")["validation"]
    block = source.gather(np.arange(len(source)))
    labels = block["labels"].ravel()[: source.num_tokens]
    ends = np.append(source.documents[1:], source.num_tokens) - 1
    np.testing.assert_array_equal(np.flatnonzero(labels < 0), ends)
    first = block["segment_ids"][0]
    np.testing.assert_array_equal(first, np.searchsorted(source.documents, np.arange(16), "right") - 1)
    assert (block["segment_ids"][:, 0] == 0).all()


def test_pattern_chooses_files(folder):
    some = load_text(data_dir=folder, length=2, pattern="file1*.txt, file2.txt", split="0.6,0.2")
    assert sum(len(documents(source)) for source in some.values() if source.num_tokens) == 12
    with pytest.raises(UserError, match=r"holds no text: none of its files that match \*\.py"):
        load_text(data_dir=folder, pattern="*.py")


def test_what_load_text_refuses(folder, tmp_path_factory):
    one = tmp_path_factory.mktemp("one")
    (one / "a.txt").write_text("abc" * 100)
    (one / "bad.txt").write_bytes(b"\xff")
    (one / "empty.txt").write_text("")
    (one / "a").mkdir()
    (one / "a" / "a.txt").write_text("abc" * 100)
    cases = [
        (dict(data_dir=None), "needs data_dir"),
        (dict(data_dir=one / "nope"), "no file or folder"),
        (dict(data_dir=one / "bad.txt"), r"a file cannot be read as UTF-8 text: bad.txt \(byte 0 is no UTF-8\);"),
        (dict(data_dir=one / "empty.txt"), "there is no text"),
        (
            dict(data_dir=one / "a", length=8),
            f"none of its 1 files falls into {'validation' if path_split('a.txt', '0.9,0.05') == 'train' else 'train'}",
        ),
        (dict(data_dir=one / "a.txt", length=200), "270 tokens are too few for length=200; it needs at least 400"),
        (dict(data_dir=one / "a.txt", tokenizer="bpe"), "'bpe'. Valid: bytes, chars"),
    ]
    for options, word in cases:
        with pytest.raises(UserError, match=word):
            load_text(**options)


@pytest.fixture
def strange(tmp_path):
    """What folders of texts hold beside texts: every way in which one can be lost, or hang who reads it."""
    for name, data in {
        "plain.txt": b"one",
        "marked.txt": codecs.BOM_UTF8 + b"zwei",
        "windows.txt": b"three\r\nthree",
        "line.txt": b"x" * 100_000,
        "empty.txt": b"",
        "mark_alone.txt": codecs.BOM_UTF8,
    }.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def everything(folder, **options):
    return sorted(
        part
        for source in load_text(data_dir=folder, length=2, split="1,0", **options).values()
        for part in documents(source)
        if part
    )


TEXTS = sorted(["one", "zwei", "three\r\nthree", "x" * 100_000])


def test_texts_come_as_they_are_and_what_is_left_out_is_said(strange):
    with pytest.warns(Notice, match=r": 2 empty left out: empty.txt, mark_alone.txt$"):
        assert everything(strange) == TEXTS
    (strange / ".git").mkdir()
    with pytest.warns(Notice, match=r": 1 hidden left out: .git$"):
        assert everything(strange) == TEXTS


BAD = {
    "latin.txt": "né".encode("latin-1"),
    "binary.txt": b"PK\x03\x04\0\0",
    "wide.txt": "wide".encode("utf-16"),
    "cut.txt": "ö".encode()[:1],
}


def test_every_file_that_is_no_text_is_named(strange):
    for name, data in BAD.items():
        (strange / name).write_bytes(data)
    with pytest.raises(UserError) as told:
        everything(strange)
    assert str(told.value) == (
        f"{strange}: 4 of 10 files cannot be read as UTF-8 text: binary.txt (character 4 is NUL: binary, "
        "or another encoding), "
        "cut.txt (byte 0 is no UTF-8), latin.txt (byte 1 is no UTF-8) and 1 more;\n"
        "convert or remove them, give their encoding (such as encoding=latin-1), or choose files by pattern=*.txt"
    )
    assert everything(strange, pattern="l*.txt", encoding="latin-1") == ["né", "x" * 100_000]
    assert everything(strange, pattern="wide.txt", encoding="utf-16") == ["wide"]
    with pytest.raises(UserError, match="encoding=rot13 is not known; valid: utf-8, utf-16, latin-1"):
        everything(strange, encoding="rot13")


def test_pipes_devices_and_broken_links_are_named_and_hang_nothing(strange):
    os.mkfifo(strange / "pipe")
    (strange / "endless").symlink_to("/dev/zero")
    (strange / "gone").symlink_to("nowhere")
    with pytest.raises(
        UserError,
        match=r"3 of 9 files cannot .*endless \(not a regular file\), gone \(a broken link\), "
        r"pipe \(not a regular file\)",
    ):
        everything(strange)
    for name in ("pipe", "endless"):
        with pytest.raises(UserError, match=rf"{name} \(not a regular file\)"):
            load_text(data_dir=strange / name)


def test_linked_folders_are_read_once_and_loops_end(strange, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "far.txt").write_text("far")
    (strange / "loop").symlink_to(strange)
    (strange / "link").symlink_to(other)
    (strange / "second").symlink_to(other)
    assert everything(strange) == sorted([*TEXTS, "far"])


def test_more_text_than_memory_is_refused_before_it_is_read(strange):
    for name in ("a", "b"):
        with open(strange / name, "wb") as file:
            file.truncate(2**31)
    with pytest.raises(UserError, match="bytes of text, more than 4,294,967,296; write token files"):
        text_files.read_files([strange / "a", strange / "b", strange / "plain.txt"], strange)


PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A place without any data, and a short play in the part of tiny Shakespeare."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NESTAX_DATA", raising=False)
    monkeypatch.setattr(text, "SHAKESPEARE_SHA256", hashlib.sha256(PLAY.encode()).hexdigest())
    return tmp_path


def check_play(sources):
    cut = int(0.9 * len(PLAY))
    assert [source.decode(source.tokens) for source in sources.values()] == [PLAY[:cut], PLAY[cut:], ""]
    assert sources["train"].tokenizer.itos == "".join(sorted(set(PLAY))) and sources["train"].documents is None
    assert len(sources["test"]) == 0


def test_tiny_shakespeare_is_found(elsewhere, monkeypatch):
    given, fallback, named = elsewhere / "given", elsewhere / "data", elsewhere / "root"
    for place, name in ((given, "input.txt"), (fallback, "tinyshakespeare.txt"), (named, "input.txt")):
        place.mkdir()
        (place / name).write_text(PLAY)
        if place == named:
            monkeypatch.setenv("NESTAX_DATA", str(named))
        data_dir = given if place == given else None
        check_play(load_tiny_shakespeare(data_dir=data_dir, length=16))
        check_play(load_tiny_shakespeare(data_dir=place / name, length=16))
        (place / name).unlink()
    assert inspect.signature(load_tiny_shakespeare).parameters["tokenizer"].default == "chars"


def test_another_text_or_none_is_not_tiny_shakespeare(elsewhere, monkeypatch):
    with pytest.raises(
        UserError, match=r"(?s)no tinyshakespeare.txt or input.txt in /given, nor the TFDS set in /given\.\n.*char-rnn"
    ):
        load_tiny_shakespeare(data_dir="/given")
    (elsewhere / "data").mkdir()
    (elsewhere / "data" / "input.txt").write_text(PLAY + "!")
    digest = hashlib.sha256((PLAY + "!").encode()).hexdigest()
    with pytest.raises(
        UserError,
        match=f"data/input.txt is not tiny Shakespeare: its SHA-256 is {digest}, not {text.SHAKESPEARE_SHA256}",
    ):
        load_tiny_shakespeare()
    monkeypatch.undo()
    with pytest.raises(UserError, match="not 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"):
        load_tiny_shakespeare(data_dir=elsewhere / "data" / "input.txt")


def prepare_tfds(data_dir, name, splits):
    tfds = pytest.importorskip("tensorflow_datasets")

    def info(self):
        features = {"text": tfds.features.Text(), "number": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def examples(self, split):
        for number, content in enumerate(splits[split]):
            yield number, {"text": content, "number": number}

    members = {
        "name": name,
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": info,
        "_generate_examples": examples,
        "_split_generators": lambda self, _: {split: self._generate_examples(split) for split in splits},
    }
    with tfds.core.registered.skip_registration():
        builder = type(name, (tfds.core.GeneratorBasedBuilder,), members)
    builder(data_dir=str(data_dir), file_format="array_record").download_and_prepare()


def test_tfds_text(tmp_path):
    training = [f"Größe {k} " + "x" * k for k in range(40)]
    prepare_tfds(tmp_path, "two_parts", {"train": training, "test": ["one", "two"]})
    load = lambda **options: load_tfds_text("two_parts", data_dir=str(tmp_path), length=16, **options)
    sources = load()
    found = {name: documents(source) for name, source in sources.items()}
    assert sorted(found["test"]) == ["one", "two"] and len(found["validation"]) == 2
    assert sorted(found["train"] + found["validation"]) == sorted(training)
    chosen = load(train_split="train[:50%]", validation_split="test", tokenizer="chars")
    assert len(documents(chosen["train"])) == 20 and sorted(documents(chosen["validation"])) == ["one", "two"]
    for options, word in (
        ({"text_key": "body"}, "no feature 'body'; set text_key to one of number, text|text, number"),
        ({"text_key": "number"}, "holds int where text is wanted"),
        ({"train_split": "train"}, "no split 'validation'; set validation_split. Valid: test, train|train, test"),
        ({"test_split": "dev"}, "no split 'dev'; set test_split"),
    ):
        with pytest.raises(UserError, match=word):
            load(**options)


def test_tiny_shakespeare_from_tfds(elsewhere):
    cut = int(0.9 * len(PLAY))
    middle = cut + (len(PLAY) - cut) // 2
    folder = elsewhere / "tensorflow_datasets"
    prepare_tfds(
        folder, "tiny_shakespeare", {"train": [PLAY[:cut]], "validation": [PLAY[cut:middle]], "test": [PLAY[middle:]]}
    )
    check_play(load_tiny_shakespeare(length=16))
    prepare_tfds(elsewhere / "other", "tiny_shakespeare", {"train": [PLAY], "validation": ["!"], "test": ["!"]})
    with pytest.raises(UserError, match="is not tiny Shakespeare"):
        load_tiny_shakespeare(data_dir=str(elsewhere / "other"))
