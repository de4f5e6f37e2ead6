"""TFDS data sets made here in array_record format, read back without TensorFlow; and the command that makes them."""

import gzip
import io
import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from research.data.pipeline import batch_at
from research.data.source import ArraySource
from research.data.sources import load_splits
from research.data.tfds_prepare import write_idx_as_tfds
from research.data.tfds_source import TfdsSource
from research.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")
COUNTS = {"train": 30, "test": 12}


def picture(number: int, varied: bool) -> np.ndarray:
    height = 8 + number % 3 if varied else 8
    return np.full((height, 10, 3), number * 5, np.uint8) + np.arange(10, dtype=np.uint8)[None, :, None]


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def prepare(data_dir, name: str, varied: bool, encode=lambda number, image: png(image), **feature) -> None:
    """Writes a data set; `encode` makes the file of an image of its number and pixels."""

    def info(self):
        image = tfds.features.Image(**{"shape": (None, None, 3) if varied else (8, 10, 3), **feature})
        features = tfds.features.FeaturesDict(
            {"image": image, "label": tfds.features.ClassLabel(num_classes=3), "file_name": tfds.features.Text()}
        )
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

    def examples(self, split):
        for number in range(COUNTS[split]):
            image = encode(number, picture(number, varied))
            yield (
                number,
                {
                    "image": io.BytesIO(image) if isinstance(image, bytes) else image,
                    "label": number % 3,
                    "file_name": f"{split}{number}.png",
                },
            )

    members = {
        "name": name,
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": info,
        "_generate_examples": examples,
        "_split_generators": lambda self, _: {split: self._generate_examples(split) for split in COUNTS},
    }
    with tfds.core.registered.skip_registration():
        builder = type(name, (tfds.core.GeneratorBasedBuilder,), members)
    builder(data_dir=str(data_dir), file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    prepare(folder, "local_fixed", varied=False)
    prepare(folder, "local_varied", varied=True)
    return str(folder)


def check_images(source, varied):
    block = source.gather(np.arange(len(source)))
    numbers = (block["image"][:, 4, 0, 0].astype(int) + 2) // 5
    np.testing.assert_array_equal(numbers % 3, block["label"])
    return block, numbers


def test_fixed_shape_is_read_into_memory(data_dir):
    splits = load_splits("tfds:local_fixed", data_dir=data_dir)
    assert {k: len(v) for k, v in splits.items()} == {"train": 27, "validation": 3, "test": 12}
    assert all(isinstance(s, ArraySource) for s in splits.values())
    assert splits["train"].num_classes == 3 and splits["train"].image_shape == (8, 10, 3)
    block, numbers = check_images(splits["test"], False)
    assert sorted(numbers) == list(range(12))
    np.testing.assert_array_equal(block["image"], np.stack([picture(n, False) for n in numbers]))
    assert "tensorflow" not in sys.modules or os.environ.get("NESTAX_ALLOW_TF")


def test_decoding_on_the_fly_equals_memory(data_dir):
    memory = load_splits("tfds:local_fixed", data_dir=data_dir)["train"]
    disk = load_splits("tfds:local_fixed", data_dir=data_dir, in_memory=False)["train"]
    assert isinstance(disk, TfdsSource)
    for step in range(3):
        first, second = (batch_at(s, step, batch_size=20, seed=1) for s in (memory, disk))
        for key in first:
            np.testing.assert_array_equal(first[key], second[key])


def test_varied_shapes_are_resized(data_dir):
    with pytest.raises(UserError, match="image_size"):
        load_splits("tfds:local_varied", data_dir=data_dir)
    splits = load_splits("tfds:local_varied", data_dir=data_dir, image_size=8, in_memory=False)
    assert splits["test"].image_shape == (8, 8, 3)
    assert splits["test"].gather(np.array([3, 0, 1]))["image"].shape == (3, 8, 8, 3)
    memory = load_splits("tfds:local_varied", data_dir=data_dir, image_size=8)
    block = np.arange(12)
    np.testing.assert_array_equal(memory["test"].images, splits["test"].gather(block)["image"])


def test_unknown_split(data_dir):
    with pytest.raises(UserError, match="no split 'dev'.*train, test|no split 'dev'.*test, train"):
        load_splits("tfds:local_fixed", data_dir=data_dir, test_split="dev")


@pytest.fixture(scope="module")
def idx_folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("idx"), np.random.default_rng(0)
    for part, count in (("train", 20), ("t10k", 10)):
        images, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return folder


def test_idx_folder_becomes_a_tfds_set(idx_folder, tmp_path):
    write_idx_as_tfds("kmnist", idx_folder, str(tmp_path))
    prepared = load_splits("tfds:kmnist", data_dir=str(tmp_path))
    plain = load_splits("idx", data_dir=str(idx_folder), num_classes=10)
    assert prepared["test"].num_classes == 10
    rows = lambda s: sorted((int(label), image.tobytes()) for image, label in zip(s.images, s.labels, strict=True))
    assert rows(prepared["test"]) == rows(plain["test"])


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "launch.prepare", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_command_help_is_quick_and_ends_with_0():
    result = command("--helpshort")
    assert result.returncode == 0 and "--from" in result.stdout and "fashion_mnist" in result.stdout


def test_command_copies_an_idx_folder(idx_folder, tmp_path):
    result = command("--dataset=mnist", f"--from={idx_folder}", NESTAX_DATA=str(tmp_path))
    assert result.returncode == 0 and "20 train, 10 test" in result.stdout, result.stderr
    assert len(load_splits("mnist", data_dir=str(tmp_path / "mnist"))["test"]) == 10


def test_command_says_what_needs_no_preparation():
    result = command("--dataset=digits")
    assert (result.returncode, result.stdout.strip()) == (0, "digits needs no preparation."), result.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--dataset is missing"),
        (["--dataset=cifar10"], "did you mean tfds:cifar10"),
        (["--dataset=mnist", "--from=/nope"], "--from=/nope"),
        (["--dataset=tfds:fashion_mnst"], "fashion_mnist"),
    ],
)
def test_command_errors_are_one_line_and_exit_2(arguments, word, tmp_path):
    result = command(*arguments, f"--data_dir={tmp_path}")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and word in line and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "name",
    ["../../etc", "a/../../b", "/etc/passwd", "", "local_fixed/..", "local fixed", "x" * 400 + "/", "local_fixed:1"],
)
def test_names_that_lead_elsewhere_are_refused(name, data_dir):
    with pytest.raises(UserError, match="is no name of a data set; valid: NAME"):
        load_splits(f"tfds:{name}", data_dir=data_dir)


def test_a_description_that_names_files_elsewhere_is_refused(data_dir, tmp_path):
    folder = tmp_path / "local_fixed"
    shutil.copytree(os.path.join(data_dir, "local_fixed"), folder)
    (info,) = folder.rglob("dataset_info.json")
    described = json.loads(info.read_text())
    for split in described["splits"]:
        split["filepathTemplate"] = "../../../../secret-{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info.write_text(json.dumps(described))
    with pytest.raises(UserError, match="names files outside of|cannot be read"):
        load_splits("tfds:local_fixed", data_dir=str(tmp_path))


def prepared(folder, name, encode, **options):
    prepare(folder, name, False, encode, **options)
    return f"tfds:{name}"


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_any_mode_become_the_set_s(tmp_path, in_memory):
    """Every kind in turn: RGBA, grey with alpha, grey, a palette; what is clear is white."""

    def encode(number, image):
        kinds = [Image.fromarray(np.dstack([image, np.zeros((8, 10), np.uint8)])), Image.new("LA", (10, 8), (9, 0))]
        kinds += [Image.new("L", (10, 8), 77), Image.fromarray(image).convert("P")]
        file = io.BytesIO()
        kinds[number % 4].save(file, "PNG")
        return file.getvalue()

    source = load_splits(prepared(tmp_path, "mixed", encode), data_dir=str(tmp_path), in_memory=in_memory)["test"]
    images = source.gather(np.arange(12))["image"]
    assert images.shape == (12, 8, 10, 3)
    corners = images[:, 0, 0].tolist()
    assert corners.count([255, 255, 255]) == 6 and corners.count([77, 77, 77]) == 3


@pytest.mark.parametrize("in_memory", [True, False])
def test_damaged_images_are_all_named_before_training(tmp_path, in_memory):
    cut = lambda number, image: png(np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8))[
        : None if number % 3 else -90
    ]
    name = prepared(tmp_path, "cut", cut)
    with pytest.raises(UserError) as told:
        load_splits(name, data_dir=str(tmp_path), in_memory=in_memory)
    first, second = str(told.value).split("\n")
    assert first.startswith("tfds:cut/train: 10 of 30 images cannot be read: example ") and "and 7 more;" in first
    assert first.count(".png) (") == 3 and first.count("train") == 4
    assert "get these files again" in second


def test_sizes_and_types_that_the_set_does_not_declare(tmp_path):
    other = lambda number, image: png(image if number != 5 else image[:4])
    with pytest.raises(
        UserError, match=r"tfds:sizes/train: example \d+ \(train5.png\) cannot be read: it is 4x10; set image_size"
    ):
        load_splits(prepared(tmp_path, "sizes", other), data_dir=str(tmp_path))


def test_images_of_numbers_without_a_range_are_refused(data_dir, tmp_path):
    shutil.copytree(os.path.join(data_dir, "local_fixed"), tmp_path / "local_fixed")
    (features,) = tmp_path.rglob("features.json")
    features.write_text(features.read_text().replace('"uint8"', '"float32"').replace('"3"', '"1"'))
    with pytest.raises(
        UserError, match="The images of tfds:local_fixed are float32 of 1 channels; valid: uint8 of 1, 3, 4"
    ):
        load_splits("tfds:local_fixed", data_dir=str(tmp_path))


def test_damaged_records_are_told(data_dir, tmp_path):
    shutil.copytree(os.path.join(data_dir, "local_fixed"), tmp_path / "local_fixed")
    for file in tmp_path.rglob("*test.array_record*"):
        file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="tfds:local_fixed/test.* cannot be read .*; prepare it anew"):
        load_splits("tfds:local_fixed", data_dir=str(tmp_path))
