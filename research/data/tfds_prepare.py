"""Puts a TFDS data set in place in array_record format: downloaded, or written from files that are on disk already."""

import difflib
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from research.data import idx
from research.data.tfds_builder import DEFAULT_DIR, open_builder
from research.errors import UserError
from research.files import user_path

# The members of the MNIST family, as TFDS names them: (version, classes).
IDX_FAMILY = {"mnist": ("3.0.1", 10), "fashion_mnist": ("3.0.1", 10), "kmnist": ("3.0.1", 10)}


def prepare(name: str, folder: pathlib.Path | None, data_dir: str | None) -> str:
    """Prepares a TFDS data set and returns a sentence that says where it lies.

    Args:
      name: as TFDS calls it.
      folder: with archives, or IDX files of the MNIST family, that are on disk already; None: they are downloaded.
      data_dir: where to put it; None: TFDS's own folder.

    Raises:
      UserError: there is none of this name, or it cannot be prepared.
    """
    if folder is not None and name in IDX_FAMILY:
        place = write_idx_as_tfds(name, folder, data_dir)
    else:
        place = _downloaded(name, folder, data_dir)
    splits = open_builder(name, data_dir).info.splits
    return f"tfds:{name} lies in {place}: {', '.join(f'{split.num_examples} {key}' for key, split in splits.items())}."


def write_idx_as_tfds(name: str, folder: pathlib.Path, data_dir: str | None) -> pathlib.Path:
    """Writes a folder of IDX files as the TFDS data set `name` (one of IDX_FAMILY) in array_record format.

    TFDS itself needs TensorFlow for these and refuses files that were compressed anew, as Debian's are.
    Returns the folder of the data set; one that is there already is left as it is.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    arrays = idx.read_folder(folder)
    version, num_classes = IDX_FAMILY[name]
    shape = (*arrays["train"][0].shape[1:], 1)[:3]

    def png(image: np.ndarray) -> io.BytesIO:
        file = io.BytesIO()
        Image.fromarray(image.squeeze()).save(file, "PNG")
        file.seek(0)
        return file

    def info(self: Any) -> Any:
        features = {
            "image": tfds.features.Image(shape=shape),
            "label": tfds.features.ClassLabel(num_classes=num_classes),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
        )

    def examples(self: Any, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, (image, label) in enumerate(zip(*arrays[split], strict=True)):
            yield number, {"image": png(image), "label": int(label)}

    members = {
        "name": name,
        "VERSION": tfds.core.Version(version),
        "_info": info,
        "_generate_examples": examples,
        "_split_generators": lambda self, _: {split: self._generate_examples(split) for split in arrays},
    }
    with tfds.core.registered.skip_registration():
        builder_class = type(name, (tfds.core.GeneratorBasedBuilder,), members)
    builder = builder_class(data_dir=str(user_path(data_dir or DEFAULT_DIR)), file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def _downloaded(name: str, folder: pathlib.Path | None, data_dir: str | None) -> pathlib.Path:
    # TFDS takes two seconds to import and logs through absl.
    import tensorflow_datasets as tfds

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
