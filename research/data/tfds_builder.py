"""The builders of prepared TFDS data sets, opened without TensorFlow."""

import pathlib
import re
from typing import Any

from research.errors import UserError
from research.files import printable, user_path

DEFAULT_DIR = "~/tensorflow_datasets"
_NAME = re.compile(r"[A-Za-z]\w*(/[A-Za-z0-9_+-][\w.+-]*)?(:\d+\.\d+\.\d+)?")


def open_builder(name: str, data_dir: str | None) -> Any:
    """The read-only builder of a prepared data set ('NAME', 'NAME/CONFIG' or 'NAME:VERSION').

    Raises:
      UserError: it is not there, in another format, or its name or its description lead out of its folder.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"tfds:{name[:80]} is no name of a data set; valid: NAME, NAME/CONFIG or NAME:VERSION, of letters, digits, "
            "'_', '-' and '.'"
        )
    import tensorflow_datasets as tfds

    folder = user_path(data_dir or DEFAULT_DIR)
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=str(folder))
    except Exception as error:
        if any(folder.joinpath(name.split(":")[0]).rglob("dataset_info.json")):
            told = printable(" ".join(str(error).split()), 160)
            raise UserError(
                f"tfds:{name}: its description under {folder} cannot be read ({told}); prepare it anew"
            ) from error
        raise UserError(
            f"tfds:{name} is not prepared under {folder}. Run: python -m launch.prepare --dataset=tfds:{name} "
            f"--data_dir={folder}, or set data_dir to where it lies."
        ) from error
    if builder.info.file_format.value != "array_record":
        raise UserError(
            f"tfds:{name} under {folder} is in {builder.info.file_format.value} format, which has no random access. "
            f"Prepare it in array_record format: python -m launch.prepare --dataset=tfds:{name} --data_dir=OTHER_DIR."
        )
    _check_files(builder, name)
    return builder


def _check_files(builder: Any, name: str) -> None:
    """Raises UserError when a split, by the description that came with the data, names files outside of the data set's
    folder."""
    folder = pathlib.Path(builder.data_dir).resolve()
    for split, info in builder.info.splits.items():
        try:
            files = [pathlib.Path(file).resolve() for file in info.filepaths]
        except Exception as error:
            raise UserError(
                f"tfds:{name}: the description of split {split!r} cannot be read ({type(error).__name__}); "
                "prepare it anew"
            ) from error
        outside = [file for file in files if folder not in file.parents]
        if outside:
            raise UserError(
                f"tfds:{name}: split {split!r} names files outside of {folder}; "
                "its dataset_info.json is not to be trusted"
            )
