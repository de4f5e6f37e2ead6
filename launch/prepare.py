"""Puts a data set in the place where training finds it.

    python -m launch.prepare --dataset=fashion_mnist --from=DIR        # copy a folder of IDX files into place
    python -m launch.prepare --dataset=tfds:fashion_mnist --from=DIR   # the same files as a TFDS data set, offline
    python -m launch.prepare --dataset=tfds:cifar10                    # download by TensorFlow Datasets
    python -m launch.prepare --dataset=tfds:cifar10 --from=DIR         # from archives already downloaded to DIR

TFDS data sets are written in array_record format, into ~/tensorflow_datasets or --data_dir. Copied folders go to
$NESTAX_DATA/NAME, or ~/.cache/nestax/NAME, or --data_dir. Data sets that are made on demand, or read where they
lie, need no preparation.
"""

from absl import flags

from launch import common, outputs
from research.errors import UserError
from research.files import user_path

_DATASET = flags.DEFINE_string(
    "dataset", None, "What to prepare, such as fashion_mnist, or tfds:NAME for any data set of TFDS."
)
_FROM = flags.DEFINE_string(
    "from", None, "Folder with files that are already on disk; nothing is downloaded that lies there."
)
_DATA_DIR = outputs.output_flag("data_dir", outputs.Place.FOLDER, "Where to put the result instead of the usual place.")


def prepare(dataset: str | None, source: str | None, data_dir: str | None) -> str:
    """Prepares the data set and returns a sentence that says where it lies.

    Raises:
      UserError: no such data set or folder, or files that cannot be used.
    """
    from research.data import registry

    names = registry.prepared()
    valid = ", ".join(f"{name}NAME" if name.endswith(":") else name for name in names)
    if not dataset:
        raise UserError(f"--dataset is missing. Valid: {valid}.")
    folder = user_path(source) if source else None
    if folder is not None and not folder.is_dir():
        raise UserError(f"--from={source} is not a folder.")
    try:
        found, rest = registry.find(dataset)
    except UserError:
        collections = " or ".join(f"{name}{dataset}" for name in names if name.endswith(":"))
        raise UserError(f"Unknown --dataset={dataset}. Valid: {valid} (did you mean {collections}?).") from None
    if found.prepare is None:
        return f"{dataset} needs no preparation."
    return found.prepare(rest[0] if rest else dataset, folder, data_dir)


def main() -> int:
    print(prepare(_DATASET.value, _FROM.value, _DATA_DIR.value))
    return 0


if __name__ == "__main__":
    common.run(main)
