"""Puts a data set in the place where training finds it.

    python -m launch.prepare --dataset=fashion_mnist --from=DIR        # copy a folder of IDX files into place
    python -m launch.prepare --dataset=tfds:fashion_mnist --from=DIR   # the same files as a TFDS data set, offline
    python -m launch.prepare --dataset=tfds:cifar10                    # download by TensorFlow Datasets
    python -m launch.prepare --dataset=tfds:cifar10 --from=DIR         # from archives already downloaded to DIR

TFDS data sets are written in array_record format, into ~/tensorflow_datasets or --data_dir. Copied folders go to
$NESTAX_DATA/NAME, or ~/.cache/nestax/NAME, or --data_dir. The data sets digits and synthetic need no preparation.
"""

import functools
import pathlib
import shutil

from absl import flags

from launch import common, outputs
from research.errors import UserError
from research.files import replace_file, user_path

_DATASET = flags.DEFINE_string(
    "dataset", None, "What to prepare: fashion_mnist, mnist, or tfds:NAME for any TFDS data set."
)
_FROM = flags.DEFINE_string(
    "from", None, "Folder with files that are already on disk; nothing is downloaded that lies there."
)
_DATA_DIR = outputs.output_flag("data_dir", outputs.Place.FOLDER, "Where to put the result instead of the usual place.")

_IDX_NAMES = ("fashion_mnist", "mnist")
_READY = ("digits", "synthetic")


def prepare(dataset: str | None, source: str | None, data_dir: str | None) -> str:
    """Prepares the data set and returns a sentence that says where it lies."""
    if not dataset:
        raise UserError(f"--dataset is missing. Valid: {', '.join(_IDX_NAMES)}, tfds:NAME.")
    folder = user_path(source) if source else None
    if folder is not None and not folder.is_dir():
        raise UserError(f"--from={source} is not a folder.")
    if dataset in _READY:
        return f"{dataset} needs no preparation."
    if dataset in _IDX_NAMES:
        return _prepare_idx(dataset, folder, data_dir)
    if dataset.startswith("tfds:"):
        return _prepare_tfds(dataset.removeprefix("tfds:"), folder, data_dir)
    raise UserError(
        f"Unknown --dataset={dataset}. Valid: {', '.join(_IDX_NAMES)}, tfds:NAME (did you mean tfds:{dataset}?)."
    )


def _prepare_idx(name: str, folder: pathlib.Path | None, data_dir: str | None) -> str:
    from research.data import idx

    if folder is None:
        place = idx.find_folder(name, data_dir)
        return f"{name} lies in {place}: {_counts(idx.read_folder(place))}."
    counts = _counts(idx.read_folder(folder))
    target = user_path(data_dir) if data_dir else idx.usual_folders(name)[0]
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        for kind in ("images", "labels"):
            path = idx.find_file(folder, split, kind)
            if path.resolve() != (target / path.name).resolve():
                replace_file(target / path.name, functools.partial(shutil.copyfile, path))
    return f"{name} lies in {target}: {counts}."


def _counts(arrays: dict) -> str:
    return ", ".join(f"{len(labels)} {split}" for split, (_, labels) in arrays.items())


def _prepare_tfds(name: str, folder: pathlib.Path | None, data_dir: str | None) -> str:
    # TFDS itself takes two seconds to import and logs through absl.
    from research.data import tfds_source

    if folder is not None and name in tfds_source.IDX_FAMILY:
        place = tfds_source.write_idx_as_tfds(name, folder, data_dir)
    else:
        place = _download_and_prepare(name, folder, data_dir)
    splits = tfds_source.open_builder(name, data_dir).info.splits
    return f"tfds:{name} lies in {place}: {', '.join(f'{split.num_examples} {key}' for key, split in splits.items())}."


def _download_and_prepare(name: str, folder: pathlib.Path | None, data_dir: str | None) -> pathlib.Path:
    import difflib

    import tensorflow_datasets as tfds

    from research.data.tfds_source import DEFAULT_DIR

    root = user_path(data_dir or DEFAULT_DIR)
    try:
        builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=str(folder) if folder else None)
        )
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=3)
        hint = f" Near names: {', '.join(near)}." if near else " See https://www.tensorflow.org/datasets/catalog."
        raise UserError(f"TFDS has no data set {name!r}.{hint}") from error
    except ImportError as error:
        raise UserError(
            f"TFDS needs the package {error.name} to prepare {name} (training does not): pip install {error.name}, "
            "or prepare it on another machine in array_record format and copy the folder."
        ) from error
    except Exception as error:  # TFDS and its network layers raise dozens of types; each ends this command.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"TFDS could not prepare {name} under {root}: {reason} Offline, give the files by --from=DIR."
        ) from error
    return pathlib.Path(builder.data_dir)


def main() -> int:
    print(prepare(_DATASET.value, _FROM.value, _DATA_DIR.value))
    return 0


if __name__ == "__main__":
    common.run(main)
