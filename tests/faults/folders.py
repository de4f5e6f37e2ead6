"""Faults of the files of a run: damaged, renamed, strange ones beside them, outputs onto inputs."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from research.report.tables import read_csv
from research.train.manifests import fault
from tests.faults.base import LIMIT_S, Outcome, Suite, require, whole_steps


def damaged(c: Suite) -> list[Outcome]:
    """Files of the newest checkpoint truncated, emptied, removed, with a flipped bit; the manifest too; an empty
    folder."""
    start, steps = killed_at(c, "damaged", 40)
    newest = steps[-1]
    files = sorted(p.relative_to(start) for p in (start / "checkpoints" / str(newest)).rglob("*") if p.is_file())

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        place = c.random.randrange(len(data))
        data[place] ^= 1 << c.random.randrange(8)
        path.write_bytes(bytes(data))

    ways: dict[str, Callable[[Path], object]] = {
        "truncated": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        "emptied": lambda p: p.write_bytes(b""),
        "removed": lambda p: p.unlink(),
        "one bit flipped": flip,
    }
    outcomes = []
    for name, damage in ways.items():
        told, chosen = "", [p for p in files if (start / p).stat().st_size > 0]
        for i, file in enumerate(chosen):
            workdir = c.root / f"{name.replace(' ', '_')}_{i}"
            shutil.copytree(start, workdir)
            damage(workdir / file)
            require(fault(workdir / "checkpoints" / str(newest), newest) is not None, f"{file} {name}: not noticed")
            if i % 5 == 0:  # the verdict is the same function; whole runs for some
                told = c.go_on(workdir, steps[-2])
            shutil.rmtree(workdir)
        outcomes.append(Outcome(f"checkpoint file {name}", len(chosen), len(chosen), told))
    workdir = c.root / "empty_folder"
    shutil.copytree(start, workdir)
    (workdir / "checkpoints" / str(newest + 10)).mkdir()
    outcomes.append(Outcome("empty checkpoint folder", 1, 1, c.go_on(workdir, newest)))
    return outcomes


STRAYS = {
    ".DS_Store": b"\0\0\0\1Bud1",
    "Thumbs.db": b"\xd0\xcf\x11\xe0",
    ".nfs00000c0de": b"x",
    "desktop.ini": b"[x]",
    "._1": b"",
    "old.txt": b"x",
}


def add_strays(folder: Path) -> int:
    """Puts what file managers and network file systems leave, and a folder, into every folder below; returns into how
    many."""
    folders = [folder, *(p for p in sorted(folder.rglob("*")) if p.is_dir())]
    for place in folders:
        for name, content in STRAYS.items():
            (place / name).write_bytes(content)
        (place / "stray folder").mkdir()
        (place / "stray folder" / "10").write_text("x")
    return len(folders)


def killed_at(c: Suite, name: str, step: int) -> tuple[Path, list[int]]:
    """Returns a run that was killed after a step was saved, and its whole steps."""
    workdir = c.root / name
    process = c.begin(workdir)
    c.wait_for(process, workdir, step)
    process.kill()
    process.communicate()
    return workdir, whole_steps(workdir)


def strays(c: Suite) -> Outcome:
    workdir, steps = killed_at(c, "strays", 40)
    count = add_strays(workdir)
    return Outcome("stray files in every folder of a run", count, count, c.go_on(workdir, steps[-1]))


def renamed(c: Suite) -> list[Outcome]:
    start, steps = killed_at(c, "renamed", 40)
    outcomes = []
    for name, change in (("renamed", shutil.move), ("copied", shutil.copytree)):
        workdir = c.root / f"step_{name}"
        shutil.copytree(start, workdir)
        source = steps[-1] if name == "renamed" else steps[0]
        change(str(workdir / "checkpoints" / str(source)), str(workdir / "checkpoints" / str(steps[-1] + 10)))
        said = c.go_on(workdir, steps[-2] if name == "renamed" else steps[-1])
        require(f"it is that of step {source}, renamed or copied" in said, f"{name}: {said}")
        outcomes.append(Outcome(f"checkpoint {name} to a later step", 1, 1, said))
    return outcomes


def read(c: Suite, module: str, *words: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, timeout=LIMIT_S, env=c.environment
    )
    require("Traceback" not in done.stdout + done.stderr, f"{module} ended in a traceback: {done.stderr[-800:]}")
    return done


def statistics(c: Suite) -> list[Outcome]:
    """Other values, and half a file, in place of a network's own statistics: the accuracy that is told stays what it
    is."""

    def accuracy(workdir: Path) -> tuple[str, str]:
        out = c.root / f"{workdir.name}.csv"
        done = read(c, "launch.evaluate", f"--workdir={workdir}", "--subnet=s", f"--out={out}")
        require(done.returncode == 0, f"{workdir.name}: {done.stderr[-300:]}")
        row = read_csv(out)[0]
        told = [line for line in done.stdout.splitlines() if "made again" in line]
        return f"{row['accuracy']:.4f}", "; ".join(told).replace(str(c.root), "RUNS")

    right, silent = accuracy(c.reference)
    require(not silent, f"good statistics were not believed: {silent}")
    outcomes = []
    for name, damage in (
        ("other values", None),
        ("half a file", lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])),
    ):
        workdir = c.root / f"statistics_{name.replace(' ', '_')}"
        shutil.copytree(c.reference, workdir)
        path = next((workdir / "statistics").glob("*/s.npz"))
        if damage:
            damage(path)
        else:
            with np.load(path) as data:
                np.savez(path, **{k: 10 * data[k] + 1 for k in data.files})
        found, said = accuracy(workdir)
        require(found == right and said != "", f"{name}: accuracy {found}, not {right}; {said}")
        outcomes.append(Outcome(f"statistics of a network: {name}", 1, 1, said))
    return outcomes


HOSTILE: dict[str, bytes] = {
    "no UTF-8": b'{"a": "\xff"}\n',
    "deep nesting": b"[" * 10**5,
    "a list": b"[1, 2]\n",
    "missing keys": b"{}\n",
    "nothing": b"",
}
OWN = (
    "config.json",
    "environment.json",
    "metrics.jsonl",
    "timings.jsonl",
    "report.json",
    "status.json",
    "layout.json",
    "lock",
)


def hostile(c: Suite) -> list[Outcome]:
    """Each file of a finished run in turn: the commands end well or in a line, and never write through a link."""
    outcomes = []
    for name in OWN:
        said = []
        for kind in (*HOSTILE, "a link"):
            workdir, precious = c.root / f"hostile_{name}_{kind.replace(' ', '_')}", c.root / "precious"
            shutil.copytree(c.reference, workdir)
            precious.write_text("mine\n")
            (workdir / name).unlink()
            (workdir / name).symlink_to(precious) if kind == "a link" else (workdir / name).write_bytes(HOSTILE[kind])
            for done in (read(c, "launch.report", f"--workdir={workdir}"), c.train(workdir)):
                require(done.returncode in (0, 2), f"{name} {kind}: exit code {done.returncode}")
                if done.returncode:
                    said.append(f"{kind}: {c.error(done)}")
            require(precious.read_text() == "mine\n", f"{name}: a link was written through")
            shutil.rmtree(workdir)
        outcomes.append(
            Outcome(
                f"hostile {name}", len(HOSTILE) + 1, len(HOSTILE) + 1, said[-1] if said else "nothing: it is not needed"
            )
        )
    return outcomes


def outputs(c: Suite) -> Outcome:
    """Outputs onto what is read, also by a link."""
    run, link, model = c.root / "read", c.root / "link", c.root / "model"
    shutil.copytree(c.reference, run)
    link.symlink_to(run)
    require(read(c, "launch.extract", f"--workdir={run}", f"--out={model}").returncode == 0, "nothing was extracted")
    before = {p: p.lstat() for p in (*sorted(run.rglob("*")), *sorted(model.rglob("*")))}
    said = []
    for words in (
        ("launch.extract", f"--workdir={run}", f"--out={run}"),
        ("launch.extract", f"--workdir={run}", f"--out={link}/checkpoints"),
        ("launch.export", f"--workdir={run}", "--format=safetensors", f"--out={link}"),
        ("launch.export", f"--workdir={model}", "--format=safetensors", f"--out={model}"),
        ("launch.convert", "--source=hf-mamba", f"--weights={model}", f"--out={model}"),
        ("launch.evaluate", f"--workdir={run}", f"--out={run}/metrics.jsonl"),
        ("launch.train", "--config=tests/tiny.py", f"--workdir={model}"),
    ):
        said.append(c.error(read(c, *words)))
    require({p: p.lstat() for p in before} == before, "something was written")
    return Outcome("output onto what is read", len(said), len(said), said[0])
