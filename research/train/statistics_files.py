"""Statistics of a run's networks, each its own, as files beside the checkpoints: `statistics/STEP/NAME.npz`, bound by a
manifest."""

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from research.files import make_folder, replace_file
from research.modules.state import Abstract, Arrays
from research.train import processes
from research.train.manifests import MANIFEST, fault, write_manifest

FOLDER = "statistics"


def save_statistics(workdir: str | os.PathLike[str], step: int, statistics: Mapping[str, Arrays]) -> None:
    """Writes each network's own statistics of a step; of several processes the first one.

    Raises:
      UserError: they cannot be written.
    """
    if not processes.is_first():
        return
    folder = make_folder(make_folder(Path(workdir) / FOLDER) / str(step))
    (folder / MANIFEST).unlink(missing_ok=True)
    for name, stats in statistics.items():

        def write(temp: str, stats: Arrays = stats) -> None:
            with open(temp, "wb") as file:
                arrays: dict[str, Any] = {k: np.asarray(v) for k, v in stats.items()}  # Any: the stub sees a flag
                np.savez(file, **arrays)

        replace_file(folder / f"{name}.npz", write)
    write_manifest(folder, step)


def load_statistics(
    workdir: str | os.PathLike[str], step: int, name: str, network: Abstract
) -> tuple[dict[str, np.ndarray] | None, str]:
    """Returns (a network's statistics, "") where every byte is as it was written, else (None, why not; "" where none
    were saved).

    Args:
      network: of that name; its sums over an update are zero, whatever the file holds.
    """
    folder = Path(workdir) / FOLDER / str(step)
    path = folder / f"{name}.npz"
    if not network.stats:
        return {}, ""
    if not path.is_file():
        return None, ""
    if not (folder / MANIFEST).is_file():
        return None, f"{path} has no checksum (an earlier version wrote it)"
    if (problem := fault(folder, step, path.name)) is not None:
        return None, f"{folder}: {problem}"
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as data:
            arrays = {k: data[k] for k in data.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        return None, f"{path} cannot be read ({error})"
    held = network.kept_stats()
    if any(k not in network.stats for k in arrays) or any(
        k not in arrays or arrays[k].shape != v.shape for k, v in held.items()
    ):
        return None, f"{path} does not fit this network"
    return {k: arrays[k] if k in held else np.zeros(v.shape, v.dtype) for k, v in network.stats.items()}, ""
