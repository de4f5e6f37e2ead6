"""The fault-injection suite: faults of every kind on runs of seconds, and what became of them; `make faults` writes the
report.

    python -m tests.faults.suite --kills=50 --readers_s=120 --out=results/faults

A run is well when it ends with the same parameters and the same metrics.jsonl, bit for bit, as one that nothing
happened to. An injected fault must lose nothing older than the last completed save, end in one or two lines, never in a
traceback or a hang.
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import folders, processes, readers, surroundings
from tests.faults.base import Failed, Outcome, Suite

FAULTS: dict[str, Callable[[Suite], Outcome | list[Outcome]]] = {
    "sigterm": processes.sigterm,
    "damaged": folders.damaged,
    "strays": folders.strays,
    "renamed": folders.renamed,
    "statistics": folders.statistics,
    "hostile": folders.hostile,
    "outputs": folders.outputs,
    "read_only_run": readers.read_only_run,
    "full_disk": surroundings.full_disk,
    "read_only": surroundings.read_only,
    "clock": surroundings.clock,
    "bad_data": surroundings.bad_data,
    "two_at_once": processes.two_at_once,
    "changed_config": processes.changed_config,
    "lost_process": processes.lost_process,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--readers_s", type=int, default=120, help="how long runs are read while they train, about")
    parser.add_argument("--only", default="", help="names of kinds of faults, separated by commas")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else list(FAULTS)
    begun, outcomes, failures = time.time(), [], []
    with tempfile.TemporaryDirectory(prefix="nestax_faults_") as folder:
        c = Suite(Path(folder))
        steps: list[tuple[str, Callable]] = [(name, lambda name=name: FAULTS[name](c)) for name in wanted]
        if options.readers_s:
            steps.append(("readers", lambda: readers.beside(c, 25 * options.readers_s)))
        if options.kills:
            steps.append(("kills", lambda: processes.kills(c, options.kills)))
        for name, inject in steps:
            try:
                found = inject()
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
        "# Injected faults",
        "",
        "Made by `make faults`. Well: the run ended, at once or after the same command again, "
        "with the bits of one that",
        "",
    ]
    lines[2] += " nothing happened to, and what it said stood in one or two lines."
    lines += ["| fault | times | well | what was said |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {r['fault']} | {r['times']} | {r['well']} | {r['what was said']} |" for r in rows]
    lines += [
        "",
        f"{seconds:.0f} s; {machine['date']}, {json.dumps(machine['packages'].get('jax'))}, "
        f"{machine['threads']} threads.",
    ]
    (folder / "faults.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
