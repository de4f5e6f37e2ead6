"""Accidents of every kind on runs of seconds, and what became of them; `make faults` writes the report.

    python -m tests.faults.campaign --kills=50 --out=results/faults

A run is well when it ends with the same parameters and the same metrics.jsonl, bit for bit, as one that nothing happened to. An accident must
lose nothing older than the last completed save, end in one or two lines, never in a traceback or a hang.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.train.manifests import MANIFEST
from tests.train.test_processes import processes_with

LIMIT_S = 240
FLAGS = ["--config=tests/tiny.py", "--config.train.duration=300", "--config.train.log_every=10", "--config.checkpoint.every=10"]
FLAGS += ["--config.eval.every=100"]


@dataclass
class Outcome:
    """What became of an accident: how often it was made, whether all was well each time, and what was said."""

    accident: str
    times: int
    well: int
    said: str

    def row(self) -> dict[str, str | int]:
        return {"accident": self.accident, "times": self.times, "well": self.well, "what was said": self.said}


class Failed(AssertionError):
    """An accident did harm."""


def require(condition: bool, text: str) -> None:
    if not condition:
        raise Failed(text)


class Campaign:
    """Runs in one scratch folder, with the compiled programs kept between them."""

    def __init__(self, root: Path, seed: int = 0):
        self.root, self.random = root, random.Random(seed)
        self.environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(root / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.reference = root / "reference"
        done = self.train(self.reference)
        require(done.returncode == 0, f"the reference run failed: {done.stderr[-500:]}")
        self.start_s = 0.0
        begun = time.time()
        done = self.train(root / "again")
        self.whole_s = time.time() - begun
        self.check_same(root / "again")

    # -- running --------------------------------------------------------------------------------------------------

    def words(self, workdir: Path, *more: str, module: tuple[str, ...] = ("launch.train",)) -> list[str]:
        return [sys.executable, "-m", *module, *FLAGS, f"--workdir={workdir}", *more]

    def train(self, workdir: Path, *more: str, module: tuple[str, ...] = ("launch.train",), **options) -> subprocess.CompletedProcess:
        try:
            words = self.words(workdir, *more, module=module)
            done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, env=self.environment, **options)
        except subprocess.TimeoutExpired:
            raise Failed(f"{workdir.name} hung for {LIMIT_S} s") from None
        require("Traceback" not in done.stdout + done.stderr, f"{workdir.name} ended in a traceback: {done.stderr[-800:]}")
        return done

    def begin(self, workdir: Path, *more: str, module: tuple[str, ...] = ("launch.train",)) -> subprocess.Popen:
        words = self.words(workdir, *more, module=module)
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment)

    def wait_for(self, process: subprocess.Popen, workdir: Path, step: int) -> None:
        """Waits until a checkpoint of at least this step is whole."""
        until = time.time() + LIMIT_S
        while max(whole_steps(workdir), default=0) < step:
            require(process.poll() is None and time.time() < until, f"{workdir.name} did not come to step {step}")
            time.sleep(0.005)

    def error(self, done: subprocess.CompletedProcess, code: int = 2) -> str:
        """Returns the one line of a run that ended with a mistake or an accident."""
        lines = done.stderr.strip().splitlines()
        require(done.returncode == code, f"exit code {done.returncode}, not {code}: {done.stdout[-300:]} {done.stderr[-300:]}")
        require(1 <= len(lines) <= 2 and "error: " in lines[-1], f"not one or two lines: {done.stderr[-800:]}")
        return lines[-1].replace(str(self.root), "RUNS")

    # -- judging --------------------------------------------------------------------------------------------------

    def check_same(self, workdir: Path, reference: Path | None = None) -> None:
        """Raises Failed unless a run ended with the bits of the reference."""
        reference = reference or self.reference
        same = (workdir / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
        require(same, f"{workdir.name}: metrics.jsonl differs")
        ours, theirs = final_arrays(workdir), final_arrays(reference)
        require(ours.keys() == theirs.keys(), f"{workdir.name}: other arrays")
        for name in theirs:
            require(np.array_equal(ours[name], theirs[name]), f"{workdir.name}: {name} differs")

    def go_on(self, workdir: Path, expected: int | None = None, *more: str) -> str:
        """Starts the same run again to its end and judges it; returns what it said of where it went on."""
        done = self.train(workdir, *more)
        require(done.returncode == 0, f"{workdir.name} did not go on: {done.stderr[-500:]}")
        said = [line for line in done.stdout.splitlines() if line.startswith(("resumed", "checkpoint"))]
        if expected is not None:
            require(f"resumed from step {expected}" in said, f"{workdir.name}: {said}, not from {expected}")
        self.check_same(workdir)
        return "; ".join(said)


def whole_steps(workdir: Path) -> list[int]:
    """Returns the steps whose checkpoint has its manifest."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / MANIFEST).exists()) if folder.exists() else []


def half_saved(workdir: Path) -> bool:
    """Whether a checkpoint is being written: no whole step, but something of one."""
    folder = workdir / "checkpoints"
    names = [p for p in folder.iterdir() if p.name != "rejected"] if folder.exists() else []
    return any(not (p / MANIFEST).exists() for p in names if p.is_dir())


def final_arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Returns the parameters, statistics and optimizer state of the newest checkpoint."""
    import jax

    from research.train.extraction import Trained

    trained = Trained(workdir)
    leaves = jax.tree_util.tree_flatten_with_path(trained.state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


# -- accidents --------------------------------------------------------------------------------------------------------


def kills(c: Campaign, count: int) -> Outcome:
    """kill -9 at random moments, half of them in a save; every run that comes to its end is judged, then a new one starts."""
    made = in_saves = ended = 0
    number = 0
    while made < count:
        workdir = c.root / f"killed{number}"
        process, hunt = c.begin(workdir), c.random.random() < 0.6
        until = time.time() + c.random.uniform(0, c.whole_s)
        while process.poll() is None and (time.time() < until or (hunt and not half_saved(workdir))):
            time.sleep(0.001)
        if process.poll() is None:
            time.sleep(c.random.uniform(0, 0.02) if hunt else 0)
            process.kill()
        output = process.communicate()[0]
        require("Traceback" not in output, f"killed{number}: {output[-500:]}")
        if process.returncode == -signal.SIGKILL:
            made += 1
            in_saves += half_saved(workdir)
            print(
                f"kill {made}/{count}: {max(whole_steps(workdir), default=0)} steps are safe{', in a save' if half_saved(workdir) else ''}",
                flush=True,
            )
        else:
            require(process.returncode == 0, f"killed{number} ended with {process.returncode}: {output[-500:]}")
            c.check_same(workdir)
            ended, number = ended + 1, number + 1
    if (c.root / f"killed{number}").exists():
        c.go_on(c.root / f"killed{number}")
        ended += 1
    return Outcome("kill -9", count, count, f"{in_saves} of them in a save; {ended} runs came to their end, all bit-identical")


def sigterm(c: Campaign) -> Outcome:
    workdir = c.root / "sigterm"
    process = c.begin(workdir)
    c.wait_for(process, workdir, 20)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    require(process.returncode == 75 and "Traceback" not in output, f"exit code {process.returncode}: {output[-300:]}")
    said = output.strip().splitlines()[-1]
    c.go_on(workdir, max(whole_steps(workdir)))
    return Outcome("SIGTERM", 1, 1, said)


def damaged(c: Campaign) -> list[Outcome]:
    """Files of the newest checkpoint truncated, emptied, removed, with a flipped bit; the manifest too; an empty folder."""
    start = c.root / "damaged"
    process = c.begin(start)
    c.wait_for(process, start, 40)
    process.kill()
    process.communicate()
    steps = whole_steps(start)
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
            from research.train.manifests import fault

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


def on_its_own_disk(name: str, folder: Path, options: str, accident: Callable[[], str]) -> Outcome:
    """Makes an accident while a file system in memory is mounted at a folder; where that is not allowed, it is not made."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        return Outcome(name, 0, 0, f"not made here: {done.stderr.strip()[:80]}")
    try:
        return Outcome(name, 1, 1, accident())
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def full_disk(c: Campaign) -> Outcome:
    """A file system of less than 2 MB that fills up in the middle of the run."""
    workdir, kept = c.root / "small_disk" / "run", "--config.checkpoint.keep_every=10"

    def fill() -> str:
        said = c.error(c.train(workdir, kept))
        shutil.copytree(workdir, c.root / "more_room")
        return said

    outcome = on_its_own_disk("full disk", workdir.parent, "size=1600k", fill)
    if outcome.times:
        c.go_on(c.root / "more_room", max(whole_steps(c.root / "more_room"), default=None), kept)
    return outcome


def read_only(c: Campaign) -> Outcome:
    workdir = c.root / "read_only"
    return on_its_own_disk("read-only workdir", workdir, "ro", lambda: c.error(c.train(workdir)))


def clock(c: Campaign) -> Outcome:
    workdir = c.root / "clock"
    done = c.train(workdir, module=("tests.faults.run", "clock", "0"))
    require(done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-300:]}")
    c.check_same(workdir)
    return Outcome("clock jumps by days", 1, 1, "the run ended as if nothing had happened")


def bad_data(c: Campaign) -> list[Outcome]:
    outcomes = []
    for accident, name in (("raises", "data source raises"), ("stalls", "data source stalls"), ("nan", "batch of NaN")):
        workdir = c.root / accident
        module = ("tests.faults.run", accident, "155")
        said = c.error(c.train(workdir, "--config.data.stall_s=5", module=module))
        kept = max(whole_steps(workdir))
        require(kept >= 150, f"{accident}: only step {kept} is safe")
        c.go_on(workdir, kept)
        outcomes.append(Outcome(name, 1, 1, said))
    return outcomes


def two_at_once(c: Campaign) -> Outcome:
    workdir = c.root / "shared"
    first = c.begin(workdir)
    c.wait_for(first, workdir, 10)
    said = c.error(c.train(workdir))
    output = first.communicate(timeout=LIMIT_S)[0]
    require(first.returncode == 0, f"the first run was harmed: {output[-300:]}")
    c.check_same(workdir)
    return Outcome("two runs on one workdir", 1, 1, said)


def changed_config(c: Campaign) -> Outcome:
    workdir = c.root / "changed"
    process = c.begin(workdir)
    c.wait_for(process, workdir, 20)
    process.kill()
    process.communicate()
    said = c.error(c.train(workdir, "--config.optim.lr=0.5"))
    c.go_on(workdir, max(whole_steps(workdir)))
    return Outcome("config changed between runs", 1, 1, said)


def lost_process(c: Campaign) -> list[Outcome]:
    """Two processes of one run: one is killed, both are told to stop."""
    module = ("launch.local", "--processes=2")
    reference = c.root / "two_processes"
    require(c.train(reference, module=module).returncode == 0, "two processes did not train")
    outcomes = []
    for name, number in (("SIGKILL of one of two processes", signal.SIGKILL), ("SIGTERM to two processes", signal.SIGTERM)):
        workdir = c.root / f"two_{number.name}"
        parent = c.begin(workdir, module=module)
        c.wait_for(parent, workdir, 20)
        if number == signal.SIGKILL:
            os.kill(next(pid for pid, words in processes_with(f"--workdir={workdir}") if "--process=1" in words), number)
        else:
            parent.send_signal(number)
        begun = time.time()
        output = parent.communicate(timeout=LIMIT_S)[0]
        seconds = time.time() - begun
        require(seconds < 60 and "Traceback" not in output, f"{name}: {seconds:.0f} s, {output[-500:]}")
        require(parent.returncode == (1 if number == signal.SIGKILL else 75), f"{name}: exit code {parent.returncode}: {output[-500:]}")
        said = output.strip().splitlines()[-1].replace(str(c.root), "RUNS")
        done = c.train(workdir, module=module)
        require(done.returncode == 0 and "resumed from step" in done.stdout, f"{name}: did not go on: {done.stderr[-300:]}")
        c.check_same(workdir, reference)
        outcomes.append(Outcome(name, 1, 1, f"after {seconds:.1f} s: {said}"))
    return outcomes


ACCIDENTS: dict[str, Callable[[Campaign], Outcome | list[Outcome]]] = {
    "sigterm": sigterm,
    "damaged": damaged,
    "full_disk": full_disk,
    "read_only": read_only,
    "clock": clock,
    "bad_data": bad_data,
    "two_at_once": two_at_once,
    "changed_config": changed_config,
    "lost_process": lost_process,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--only", default="", help="names of accidents, separated by commas")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else list(ACCIDENTS)
    begun, outcomes, failures = time.time(), [], []
    with tempfile.TemporaryDirectory(prefix="nestax_faults_") as folder:
        c = Campaign(Path(folder))
        steps: list[tuple[str, Callable]] = [(name, lambda name=name: ACCIDENTS[name](c)) for name in wanted]
        if options.kills:
            steps.append(("kills", lambda: kills(c, options.kills)))
        for name, accident in steps:
            try:
                found = accident()
                outcomes += found if isinstance(found, list) else [found]
            except Failed as failure:
                failures.append(f"{name}: {failure}")
                outcomes.append(Outcome(name, 1, 0, str(failure).splitlines()[0][:200]))
            print(f"{name}: {'; '.join(f'{o.well} of {o.times} well, {o.said}' for o in outcomes[-1:])}", flush=True)
    if options.out:
        write(Path(options.out), outcomes, time.time() - begun)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def write(folder: Path, outcomes: list[Outcome], seconds: float) -> None:
    """Writes faults.csv and faults.md."""
    from research.report.machine import environment

    folder.mkdir(parents=True, exist_ok=True)
    rows = [o.row() for o in outcomes]
    with (folder / "faults.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    machine = environment()
    lines = [
        "# Accidents",
        "",
        "Made by `make faults`. Well: the run ended, at once or after the same command again, with the bits of one that",
        "",
    ]
    lines[2] += " nothing happened to, and what it said stood in one or two lines."
    lines += ["| accident | times | well | what was said |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {r['accident']} | {r['times']} | {r['well']} | {r['what was said']} |" for r in rows]
    lines += ["", f"{seconds:.0f} s; {machine['date']}, {json.dumps(machine['packages'].get('jax'))}, {machine['threads']} threads."]
    (folder / "faults.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
