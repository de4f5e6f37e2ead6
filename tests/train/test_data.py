"""A run's data: what is stored of them, changed data, data that are gone."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from launch import config as recipe
from research.data import digests
from research.data.sources import load_splits
from research.errors import UserError
from research.nested.space import make_space
from research.train import data
from research.train.extraction import Trained, load_model
from research.train.loop import train
from research.train.setup import make_setup
from tests.train.reporter import Lines

TEXT = "the cat sat on the mat; " * 120
OTHER = TEXT.replace("c", "b")  # as many letters, as many different ones, the same tokens


def configured(corpus, **more):
    fields = {
        "data.dir": str(corpus),
        "train.duration": "4",
        "eval.every": "0",
        "checkpoint.every": "2",
        "model.depth": "1",
    }
    return recipe.load("tests/tiny_lm.py:full", fields | {k.replace("__", "."): str(v) for k, v in more.items()})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run over a text that is then moved away: (workdir, corpus, the text)."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = folder / "corpus.txt"
    corpus.write_text(TEXT)
    train(configured(corpus), str(folder / "run"), Lines())
    corpus.rename(folder / "moved.txt")
    return folder / "run", corpus, folder / "moved.txt"


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    yield tmp_path / "run", trained[1]
    trained[1].unlink(missing_ok=True)


def test_another_text_of_the_same_alphabet_size_is_noticed(copied):
    run, corpus = copied
    corpus.write_text(OTHER)
    before = (run / "tokenizer.json").read_bytes()
    with pytest.raises(
        UserError, match=r"was trained on other data: the content of the vocabulary differs .*; restore them"
    ):
        train(configured(corpus), str(run), Lines())
    assert (run / "tokenizer.json").read_bytes() == before
    (run / "data.json").unlink()  # as of a run of before there was one
    with pytest.raises(UserError, match="was trained on other data: their vocabulary is not that of tokenizer.json"):
        train(configured(corpus), str(run), Lines())
    assert (run / "tokenizer.json").read_bytes() == before


def test_more_of_the_same_text_is_noticed_and_the_same_text_continues(copied):
    run, corpus = copied
    corpus.write_text(TEXT + TEXT[:480])
    with pytest.raises(UserError, match=r"other data: train has \d+ examples, not \d+"):
        train(configured(corpus), str(run), Lines())
    corpus.write_text(TEXT)
    lines = Lines()
    train(configured(corpus), str(run), lines)
    assert "resumed from step 4" in lines.said


def test_what_needs_no_data_needs_no_data(trained):
    run, corpus, _ = trained
    assert not corpus.exists()
    config, params, stats = load_model(run, "s")
    assert config.dim == 16 and params and stats == {}
    opened = Trained(run)
    assert opened.setup.total == 4 and opened.setup.order == ("full", "s")
    with pytest.raises(UserError, match=r"There is no file or folder .*corpus.txt"):
        opened.evaluator(["full"], opened.weights, "validation")
    opened.programs.close()


def test_evaluating_on_changed_data_is_said_and_another_vocabulary_refused(copied):
    run, corpus = copied
    said = []
    corpus.write_text(TEXT + TEXT[:480])
    Trained(run, said.append).setup.splits  # noqa: B018  (opens the data)
    assert len(said) == 1 and "are not those that the run was trained on: train has" in said[0]
    corpus.write_text(OTHER)
    with pytest.raises(UserError, match="not those that the run was trained on: the content of the vocabulary differs"):
        Trained(run).setup.splits  # noqa: B018  (opens the data)


@pytest.mark.slow
def test_statistics_that_are_missing_are_named_where_the_data_are_gone(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 255, (2, 40, 8, 8), dtype=np.uint8)
    fields = {
        "train.duration": "1",
        "optim.warmup": "0",
        "eval.every": "0",
        "data.batch_size": "8",
        "data.validation_fraction": "0.2",
    }
    config = recipe.load("tests/tiny.py:full", fields)
    config["nested"]["points"], config["data"]["name"], config["data"]["dir"] = {}, "idx", str(tmp_path / "idx")
    _write_idx(tmp_path / "idx", images)
    train(config, str(tmp_path / "run"), Lines())
    shutil.rmtree(tmp_path / "idx")
    assert load_model(tmp_path / "run")[2], "saved statistics need no data"
    shutil.rmtree(tmp_path / "run" / "statistics")
    with pytest.raises(
        UserError, match=r"the statistics of full at step 1 are not in .*run, and making them needs the data: "
    ):
        load_model(tmp_path / "run")


def _write_idx(folder, images):
    folder.mkdir()
    for split, own in zip(("train", "t10k"), images, strict=True):
        header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in own.shape)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + own.tobytes())
        labels = np.arange(len(own), dtype=np.uint8) % 10
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + len(own).to_bytes(4, "big") + labels.tobytes()
        )


@pytest.mark.parametrize(
    "recipe_name", ["tests/tiny.py", "configs/mqar.py", "configs/pixel_sequences.py", "configs/customise.py"]
)
def test_facts_build_what_the_data_build(recipe_name, tmp_path):
    config = recipe.load(recipe_name, {})
    whole = make_setup(config)
    data.keep(whole.data, tmp_path, trained=False)
    known = make_setup(config, data.read(tmp_path))
    assert "splits" not in vars(known.data), "nothing was loaded"
    assert known.space.full == whole.space.full and known.total == whole.total and known.task == whole.task
    assert known.batch_shapes(3) == whole.batch_shapes(3)
    assert make_space(known.space.full, config["nested"]["points"]).names() == whole.space.names()
    data.keep(whole.data, tmp_path, trained=True)


@pytest.mark.parametrize(
    "text", ["{}", "[", '{"examples": 1, "sha256": {}, "block": [], "sample": {}, "attributes": {}}']
)
def test_a_damaged_file_is_told(text, tmp_path):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match="data.json is damaged: .*remove it"):
        data.read(tmp_path)


def test_a_file_of_before_kinds_of_examples_were_types_is_read(copied):
    run, _ = copied
    stored = json.loads((run / "data.json").read_text())
    now = data.read(run)
    former = {**stored, "block": ["labels", "tokens"], "attributes": {**stored["attributes"], "vocab_size": 3}}
    del former["checksum"]
    checksum = hashlib.sha256(json.dumps(former, sort_keys=True).encode()).hexdigest()
    (run / "data.json").write_text(json.dumps({**former, "checksum": checksum}))
    read = data.read(run)
    assert read.source.vocab_size == 3 and now.source.vocab_size == len(set(TEXT))
    assert read.source.token_bytes == now.source.token_bytes == (1,) * len(set(TEXT))
    (run / "data.json").write_text(json.dumps({**former, "block": ["image"], "checksum": checksum}))
    with pytest.raises(UserError, match="data.json is damaged: it does not hold what was written"):
        data.read(run)


def test_digests(tmp_path):
    a = np.arange(6, dtype=np.int32)
    assert digests.of_arrays(a) == digests.of_arrays(a.copy()) != digests.of_arrays(a.reshape(2, 3))
    assert digests.of_arrays(a) != digests.of_arrays(a.astype(np.uint32)) and len(digests.of_arrays()) == 64
    path = tmp_path / "shard"
    path.write_bytes(b"x" * 3_000_000)
    before = digests.of_files([path])
    data_bytes = bytearray(path.read_bytes())
    data_bytes[-1] = 0
    path.write_bytes(data_bytes)
    assert digests.of_files([path]) != before
    first, other = (
        load_splits("probe:mqar", seed=seed, vocab_size=64, length=16, pairs=2, train_examples=9, test_examples=2)[
            "train"
        ]
        for seed in (0, 1)
    )
    again = load_splits("probe:mqar", seed=0, vocab_size=64, length=16, pairs=2, train_examples=9, test_examples=2)[
        "train"
    ]
    assert first.digest == again.digest != other.digest


def test_the_file_is_json(trained):
    stored = json.loads((trained[0] / "data.json").read_text())
    assert stored["name"] == "text" and set(stored["sha256"]) == {"train", "validation", "test", "the vocabulary"}
    assert stored["attributes"]["vocab_size"] == len(set(TEXT)) and stored["sample"]["tokens"] == [[24], "<i4"]
