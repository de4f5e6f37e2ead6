"""Faults of what a run stands on: disks, the clock, data."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.faults.base import Outcome, Suite, require, whole_steps


def on_its_own_disk(name: str, folder: Path, options: str, inject: Callable[[], str]) -> Outcome:
    """Injects a fault while a file system in memory is mounted at a folder; where that is not allowed, none is
    injected."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        return Outcome(name, 0, 0, f"not injected here: {done.stderr.strip()[:80]}")
    try:
        return Outcome(name, 1, 1, inject())
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def full_disk(c: Suite) -> Outcome:
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


def read_only(c: Suite) -> Outcome:
    workdir = c.root / "read_only"
    return on_its_own_disk("read-only workdir", workdir, "ro", lambda: c.error(c.train(workdir)))


def clock(c: Suite) -> Outcome:
    workdir = c.root / "clock"
    done = c.train(workdir, module=("tests.faults.run", "clock", "0"))
    require(done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-300:]}")
    c.check_same(workdir, c.reference)
    return Outcome("clock jumps by days", 1, 1, "the run ended as if nothing had happened")


def bad_data(c: Suite) -> list[Outcome]:
    outcomes = []
    for kind, name in (("raises", "data source raises"), ("stalls", "data source stalls"), ("nan", "batch of NaN")):
        workdir = c.root / kind
        module = ("tests.faults.run", kind, "155")
        said = c.error(c.train(workdir, "--config.data.stall_s=5", module=module))
        kept = max(whole_steps(workdir))
        require(kept >= 150, f"{kind}: only step {kept} is safe")
        c.go_on(workdir, kept)
        outcomes.append(Outcome(name, 1, 1, said))
    return outcomes
