"""Mutated files of a run's folder: what reads them accepts or refuses in one or two lines, and what is trained never
changes silently."""

import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = "tests/tiny.py:full"
VALUES = (None, True, -1, 10**30, 1e308, "", "x", "\x00", [], [1, [2]], {}, {"a": 1}, "../../x")


def trained_run(folder: Path) -> Path:
    """Trains a run of seconds; returns its directory."""
    from launch import config as recipe
    from launch.terminal import Silent
    from research.data.tokenizer_files import save_tokenizer
    from research.data.tokenizers import CharTokenizer
    from research.train.loop import train

    fields = {"train.duration": "4", "checkpoint.every": "2", "eval.every": "0"}
    train(recipe.load(RECIPE, fields), str(folder / "run"), Silent())
    save_tokenizer(CharTokenizer.of_texts(["abc "]), folder / "run")
    return folder / "run"


def mutated_json(rng: random.Random, data: bytes) -> bytes:
    """Returns JSON, of one value or one a line, in which a value somewhere is another one, missing, or lies deep."""
    lines = data.decode().splitlines()
    whole = len(lines) > 1 and lines[0].startswith("{") and lines[0].endswith("}")
    at = rng.randrange(len(lines)) if whole else 0
    value = json.loads(lines[at] if whole else data)
    node, parent, key = value, None, None
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.7):
        parent, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = parent[key]
    if parent is None:
        value = rng.choice(VALUES)
    elif rng.random() < 0.3:
        del parent[key]
    else:
        parent[key] = rng.choice(VALUES)
    text = json.dumps(value)
    return ("\n".join([*lines[:at], text, *lines[at + 1 :]]) + "\n" if whole else text).encode()


def mutate(rng: random.Random, run: Path, precious: Path) -> str:
    """Changes one file of a run; returns what was done."""
    from tests.faults.fuzz import mutated_bytes

    files = sorted(p for p in run.rglob("*") if p.is_file() and p.stat().st_size and "tensorboard" not in p.parts)
    path = rng.choice([p for p in files if p.parent == run] if rng.random() < 0.6 else files)
    kinds: dict[str, Callable[[], Any]] = {
        "bytes": lambda: path.write_bytes(mutated_bytes(rng, path.read_bytes())),
        "nesting": lambda: path.write_bytes(rng.choice((b"[", b'{"a":')) * 10**5),
        "list": lambda: path.write_bytes(b"[1, 2]\n"),
        "gone": path.unlink,
        "link": lambda: (path.unlink(), path.symlink_to(precious)),
        "dangling link": lambda: (path.unlink(), path.symlink_to(precious.with_name("nobody"))),
        "folder": lambda: (path.unlink(), path.mkdir()),
        "renamed step": lambda: shutil.move(
            run / "checkpoints" / "4", run / "checkpoints" / rng.choice(("6", "04", "3", "x"))
        ),
    }
    if path.suffix in (".json", ".jsonl"):
        kinds["values"] = lambda: path.write_bytes(mutated_json(rng, path.read_bytes()))
    kind = rng.choice([*kinds, *(["values"] * 6 if "values" in kinds else [])])
    kinds[kind]()
    return f"{path.relative_to(run)}: {kind}"


def read_all(run: Path) -> None:
    """Reads all that commands read of a run.

    Raises:
      UserError: something is damaged; what comes after it is then read no more.
      AssertionError: arrays that are not those of a step were believed.
    """
    from research.data.tokenizer_files import load_tokenizer
    from research.report import run_card
    from research.train.extraction import Trained

    run_card.read_report(run)
    load_tokenizer(run, required=False)
    run_card.load_metrics(run)
    trained = Trained(run)
    assert trained.run["step"] == trained.step
    trained.statistics("full")
    trained.programs.close()
    run_card.compare([run])


def open_to_write(run: Path, config: dict[str, Any]) -> None:
    """Does to a run's folder what a start of its training does, before the first update."""
    from research.report import run_card
    from research.train.checkpoint import Checkpoints
    from research.train.rundir import RunDir

    rundir = RunDir(run, config, {})
    try:
        checkpoints = Checkpoints(run / "checkpoints", keep_last=3, keep_best=False)
        step = max(checkpoints.steps(), default=0)
        checkpoints.close()
        rundir.cut_back(step)
        rundir.metrics(step + 1, {"loss": 1.0})
        rundir.timings(step + 1, {"wall_s": 1.0})
        rundir.status({"state": "training"})
        run_card.write_report(run, {"metric": "accuracy", "subnets": [{"name": "full", "value": 0.5, "flops": 3}]})
    finally:
        rundir.close()


def fuzz_runs(count: int, seed: int, judge: Callable[[str, Callable[[], Any]], str], harm: list[str]) -> Counter:
    """Mutates a file of a run so many times; returns how often reading and writing were accepted and refused."""
    from research.train.rundir import read_config

    rng, out = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        good, precious = trained_run(root), root / "precious"
        config, arrays = read_config(good), final_arrays(good)
        if judge("the unchanged run", lambda: read_all(good)) != "accepted":
            harm.append("the unchanged run is refused")
        for i in range(count):
            run = root / "mutated"
            shutil.copytree(good, run)
            precious.write_text("mine\n")
            done = f"run file {i} of seed {seed}: {mutate(rng, run, precious)}"
            verdict = judge(done, partial(read_all, run))
            out[f"reading {verdict}"] += 1
            out[f"writing {judge(done, partial(open_to_write, run, config))}"] += 1
            if precious.read_text() != "mine\n" or precious.with_name("nobody").exists():
                harm.append(f"{done}: written through a link")
            if verdict == "accepted" and any(not np.array_equal(arrays[k], v) for k, v in final_arrays(good).items()):
                harm.append(f"{done}: the good run has changed")
            shutil.rmtree(run)
    return out


def final_arrays(run: Path) -> dict[str, np.ndarray]:
    """Returns the bytes of the checkpoints of a run."""
    return {
        str(p.relative_to(run)): np.fromfile(p, np.uint8)
        for p in sorted((run / "checkpoints").rglob("*"))
        if p.is_file()
    }
