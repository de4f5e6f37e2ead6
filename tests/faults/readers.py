"""Runs that are read while they are trained, and on a disk that cannot be written."""

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.faults.base import LIMIT_S, Outcome, Runs, Suite, require
from tests.faults.surroundings import on_its_own_disk

NOT_YET = ("no whole step is in", "holds no report.json", "vanished while it was read", "holds no run")
"""What a reader may say of a run that has just begun, in one line."""
OFTEN = [
    "--config.checkpoint.every=5",
    "--config.checkpoint.keep_last=1",
    "--config.eval.every=0",
    "--config.train.log_every=10",
]


def image_readers(runs: Runs, workdir: Path) -> dict[str, list[str]]:
    """Returns name -> the words of each command that reads a run of images."""
    out = runs.root / f"{workdir.name}_out"
    return {
        "evaluate": ["launch.evaluate", f"--workdir={workdir}", "--subnet=s", "--split=validation", f"--out={out}.csv"],
        "extract": ["launch.extract", f"--workdir={workdir}", "--subnet=s", f"--out={out}/extracted"],
        "export": ["launch.export", f"--workdir={workdir}", "--format=safetensors", f"--out={out}/exported"],
        "select": ["launch.select", f"--workdir={workdir}", "--max_params=1e9"],
        "report": ["launch.report", f"--workdir={workdir}", f"--out={out}/report"],
        "train.init_from": [
            *(
                "launch.train",
                "--config=tests/tiny.py",
                f"--config.train.init_from={workdir}",
                "--config.train.duration=2",
            ),
            f"--workdir={out}/from_{{count}}",
        ],
    }


def text_readers(runs: Runs, workdir: Path) -> dict[str, list[str]]:
    """Returns name -> the words of each command that reads a run of text."""
    return {
        "generate": ["launch.generate", f"--workdir={workdir}", "--prompt=the", "--num_tokens=8"],
        "evaluate": ["launch.evaluate", f"--workdir={workdir}", "--split=validation"],
    }


def read_beside(
    runs: Runs, name: str, config: list[str], readers: Callable[[Runs, Path], dict[str, list[str]]]
) -> dict[str, list[int]]:
    """Trains a run alone, then again while it is read over and over, and judges that both end alike.

    Returns: reader -> [readings, how many of them were told that no step is there yet].
    """
    module = ("launch.train",)
    alone, read = runs.root / f"{name}_alone", runs.root / f"{name}_read"
    done = runs.train(alone, *config, module=module)
    require(done.returncode == 0, f"{name} does not train alone: {done.stderr[-500:]}")
    process = runs.begin(read, *config, module=module)
    counts: dict[str, list[int]] = {}
    for count, (reader, words) in enumerate(itertools.cycle(readers(runs, read).items())):
        if process.poll() is not None:
            break
        told = counts.setdefault(reader, [0, 0])
        told[1] += read_once(runs, reader, [word.format(count=count) for word in words])
        told[0] += 1
    output = process.communicate(timeout=LIMIT_S)[0]
    require(
        process.returncode == 0,
        f"{name}: the training ended with {process.returncode} while it was read: {output[-800:]}",
    )
    require("not used" not in output and "Traceback" not in output, f"{name}: {output[-800:]}")
    require(not (read / "checkpoints" / "rejected").exists(), f"{name}: a step was rejected")
    runs.check_same(read, alone)
    return counts


def read_once(runs: Runs, reader: str, words: list[str]) -> bool:
    """Runs a reader; returns whether it was told that there is nothing to read yet. Anything else but success is
    harm."""
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, timeout=LIMIT_S, env=runs.environment
    )
    require("Traceback" not in done.stdout + done.stderr, f"{reader} ended in a traceback: {done.stderr[-800:]}")
    if done.returncode == 0:
        return False
    said = runs.error(done)
    require(any(words in said for words in NOT_YET), f"{reader}: {said}")
    return True


def language_text(folder: Path) -> Path:
    """Writes a text that the language run is trained on."""
    path = folder / "text.txt"
    path.write_text("the cat sat on the mat and the dog ran to the door; " * 200)
    return path


def beside(c: Suite, updates: int) -> list[Outcome]:
    """Every reading command, over and over, beside a run of images and one of text that save every few updates."""
    text = [f"--config.data.dir={language_text(c.root)}", "--config=tests/tiny_lm.py:full"]
    kinds = {
        "image": (image_readers, [f"--config.train.duration={updates}"]),
        "text": (text_readers, [f"--config.train.duration={updates}"]),
    }
    outcomes = []
    for name, (readers, more) in kinds.items():
        found = read_beside(c, name, [*(text if name == "text" else []), *OFTEN, *more], readers)
        require(
            found.keys() == readers(c, c.root).keys(),
            f"{name}: the run ended before it was read by all: {sorted(found)}",
        )
        said = ", ".join(
            f"{reader} {all_of}" + (f" ({early} too early)" if early else "")
            for reader, (all_of, early) in found.items()
        )
        outcomes.append(
            Outcome(
                f"{name} run read while it trains",
                sum(n for n, _ in found.values()),
                sum(n for n, _ in found.values()),
                said,
            )
        )
    return outcomes


def read_only_run(c: Suite) -> Outcome:
    """A finished run on a file system that is mounted read-only."""
    folder = c.root / "archive"

    def read() -> str:
        shutil.copytree(c.reference, folder / "run")
        done = subprocess.run(["mount", "-o", "remount,ro", str(folder)], capture_output=True, text=True)
        require(done.returncode == 0, f"cannot be mounted read-only: {done.stderr}")
        readers = image_readers(c, folder / "run")
        early = [
            name
            for name, words in readers.items()
            if read_once(c, name, [word.format(count="archive") for word in words])
        ]
        require(not early, f"{early} found nothing to read")
        return f"{', '.join(readers)} read it"

    return on_its_own_disk("run on a read-only disk is read", folder, "size=64m", read)
