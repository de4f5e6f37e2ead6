"""Trains the same small runs at another commit and here, and compares what comes out bit for bit: a change of structure
must change nothing.

    python -m tests.same_bits --base=COMMIT                     # make same-bits BASE=COMMIT
    python -m tests.same_bits --base=COMMIT --cases=moe,sharded --renames=renames.json --rtol=1e-6

Compared are parameters and running statistics as `launch.extract` writes them, all numbers of metrics.jsonl, and those
of the report that do not depend on the clock. Both commits run in the same environment. --renames is a JSON object of
regular expressions of old names -> new names.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from research.interop.safetensors_io import load_safetensors

ROOT = Path(__file__).resolve().parents[1]

_BASE = flags.DEFINE_string("base", None, "Commit to compare with.", required=True)
_CASES = flags.DEFINE_list("cases", [], "Only these; none: all.")
_RENAMES = flags.DEFINE_string("renames", None, "JSON file: regular expression of an old name -> its new name.")
_RTOL = flags.DEFINE_float("rtol", 0.0, "Largest difference, relative to an array's largest entry; 0: equal bits.")


@dataclass(frozen=True)
class Case:
    """One run: its recipe, `--config.FIELD=VALUE`, and how many devices are simulated."""

    recipe: str
    fields: Mapping[str, str]
    devices: int = 1
    former: tuple[str, Mapping[str, str]] = ("", {})
    """The recipe and the fields at commits that have no research/methods yet, where they differ."""


QUIET = {"report.latency": "False"}
CASES = {
    "quickstart": Case("configs/quickstart.py", {"train.duration": "100", **QUIET}),
    "lm": Case("configs/lm_quickstart.py", {"train.duration": "60", "report.sample": "", **QUIET}),
    "moe": Case("configs/moe_lm.py:moe", {"train.duration": "40", **QUIET}),
    "advmoe": Case(
        "tests/tiny_robust.py:advmoe",
        {"train.duration": "24"},
        former=("tests/tiny_robust.py:alternate", {"train.duration": "24"}),
    ),
    "sandwich": Case(
        "tests/tiny.py:sandwich",
        {
            "methods": "sandwich,ema",
            "method.sandwich.count": "2",
            "method.ema.decay": "0.9",
            "train.precision": "bfloat16",
            "train.accumulate": "2",
        },
        former=(
            "tests/tiny.py:sandwich",
            {"nested.count": "2", "train.ema": "0.9", "train.precision": "bfloat16", "train.accumulate": "2"},
        ),
    ),
    "sharded": Case(
        "tests/tiny.py:all", {"mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2", "mesh.min_size": "1"}, devices=8
    ),
}
TIMES = re.compile(
    r"wall_s|compile_s|latency|_per_s|seconds|time|memory|mfu|duration|commit|host|gflops|programs|higher_is_better"
)
"""Numbers of a report that depend on the machine and the hour."""


def train(tree: Path, case: Case, folder: Path) -> None:
    """Trains a case at the commit that lies in `tree`, and extracts its full network."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(case.devices),
    }
    recipe, given = case.recipe, case.fields
    if case.former[0] and not (tree / "research" / "methods").is_dir():
        recipe, given = case.former
    fields = [f"--config.{field}={value}" for field, value in given.items()]
    for command in (
        ["launch.train", f"--config={recipe}", f"--workdir={folder}/run", *fields],
        ["launch.extract", f"--workdir={folder}/run", "--nocheck", f"--out={folder}/model"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tree, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(
                f"error: {' '.join(command)} in {tree} ended with {done.returncode}: {done.stderr.strip()[-2000:]}"
            )


def renamed(values: Mapping[str, Any], renames: Mapping[str, str]) -> dict[str, Any]:
    """Returns the values by their new names."""

    def new(name: str) -> str:
        for old, name_now in renames.items():
            name = re.sub(old, name_now, name)
        return name

    return {new(name): value for name, value in values.items()}


def numbers(tree: Any, at: str = "") -> dict[str, float]:
    """Returns all numbers of a JSON value by their path, without those that depend on the hour."""
    if isinstance(tree, bool) or tree is None or isinstance(tree, str) or TIMES.search(at):
        return {}
    if isinstance(tree, int | float):
        return {at: float(tree)}
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    return {name: value for key, inner in items for name, value in numbers(inner, f"{at}/{key}").items()}


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns what a run left behind: kind -> name -> array or number."""
    arrays = load_safetensors(folder / "model" / "model.safetensors")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    report = json.loads((folder / "run" / "report.json").read_text())
    return {
        "arrays": dict(arrays),
        "metrics": {
            name: value for i, line in enumerate(lines) for name, value in numbers(json.loads(line), str(i)).items()
        },
        "report": numbers(report),
    }


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[float, str]:
    """Returns the largest difference, relative to the largest entry of its array, and where it is; infinite where names
    or shapes differ."""
    if old.keys() != new.keys():
        return (
            np.inf,
            f"only before: {sorted(old.keys() - new.keys())[:3]}; only after: {sorted(new.keys() - old.keys())[:3]}",
        )
    worst, where = 0.0, ""
    for name, value in old.items():
        a, b = np.asarray(value), np.asarray(new[name])
        if a.shape != b.shape or a.dtype != b.dtype:
            return np.inf, f"{name}: {a.dtype}{a.shape} before, {b.dtype}{b.shape} after"
        if a.tobytes() != b.tobytes():
            gap = float(np.abs(a.astype(np.float64) - b).max() / max(np.abs(a.astype(np.float64)).max(), 1e-30))
            if gap >= worst:
                worst, where = max(gap, 1e-30), name
    return worst, where


def main(_: list[str]) -> None:
    renames = json.loads(Path(_RENAMES.value).read_text()) if _RENAMES.value else {}
    unknown = [name for name in _CASES.value if name not in CASES]
    if unknown:
        sys.exit(f"error: --cases={unknown[0]} is unknown; valid: {', '.join(CASES)}")
    folder = Path(tempfile.mkdtemp(prefix="same_bits_"))
    base = folder / "base"
    run: Callable[..., Any] = lambda *command: subprocess.run(
        ["git", *command], cwd=ROOT, check=True, capture_output=True
    )
    run("worktree", "add", "--detach", str(base), _BASE.value)
    differs = False
    try:
        for name in _CASES.value or CASES:
            start = time.perf_counter()
            train(base, CASES[name], folder / name / "before")
            train(ROOT, CASES[name], folder / name / "after")
            before, after = results(folder / name / "before"), results(folder / name / "after")
            parts = []
            for kind, old in before.items():
                gap, where = compare(renamed(old, renames), after[kind])
                differs |= gap > _RTOL.value
                parts.append(f"{len(old)} {kind} {'equal' if not gap else f'differ by {gap:.1e} ({where})'}")
            print(f"{name}: {'; '.join(parts)} [{time.perf_counter() - start:.0f} s]", flush=True)
    finally:
        run("worktree", "remove", "--force", str(base))
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if differs else 0)


if __name__ == "__main__":
    app.run(main)
