"""Mutated configs, weight files and files of runs: every one is accepted, or refused in one or two lines.

    python -m tests.faults.fuzz --configs=500 --weights=200 --hostile=200 --run_files=100

A config counts as accepted when its run could start: recipe, data, model, task, optimizer and mesh are made. A weight
file counts as accepted when its arrays can be read, a file of a run when all that commands read of the run can be.
Files made to fill memory or to hang (`tests/faults/hostile.py`) are read in a process whose memory and time are
limited.
"""

import argparse
import json
import random
import struct
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from launch import config as recipe
from research.errors import UserError
from tests.faults.fuzz_runs import fuzz_runs

RECIPES = (
    "tests/tiny.py:all",
    "tests/tiny.py:sorted",
    "tests/tiny_lm.py:probe",
    "tests/tiny_robust.py:advmoe",
    "configs/quickstart.py",
)
VALUES = (
    "-1",
    "0",
    "1",
    "3",
    "7",
    "64",
    "1000000007",
    "-0.5",
    "0.3",
    "1e30",
    "nan",
    "inf",
    "''",
    "x",
    "x" * 300,
    "[1, 2]",
    "[]",
    "{}",
)
VALUES += (
    "{'a': 1}",
    "None",
    "True",
    "10%",
    "-5%",
    "0ep",
    "3ep",
    "1e",
    "1:2",
    "../../etc/passwd",
    "\x00",
    "é",
    "__import__('os')",
    "lambda: 1",
)


HARM: list[str] = []
"""What was neither accepted nor refused well."""


def judge(what: str, attempt: Callable[[], Any]) -> str:
    """Returns "accepted", "refused" (a UserError of one or two lines) or "harm", which is told and kept in HARM."""
    try:
        attempt()
        return "accepted"
    except UserError as error:
        if 1 <= len(str(error).splitlines()) <= 2:
            return "refused"
        HARM.append(f"{what}: refused in {len(str(error).splitlines())} lines: {str(error)[:300]}")
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        HARM.append(f"{what}: {type(error).__name__}: {str(error)[:300]} ({Path(place.filename).name}:{place.lineno})")
    print(f"HARM {HARM[-1]}", file=sys.stderr, flush=True)
    return "harm"


# -- configs ----------------------------------------------------------------------------------------------------------


def leaves(config: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns the dotted names of all fields."""
    out = []
    for key, value in config.items():
        out += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]
    return out


def mutated_config(rng: random.Random) -> tuple[str, dict[str, str]]:
    """Returns a recipe and fields to set: one to three of its own, sometimes misspelt, to values that may not fit."""
    text = rng.choice(RECIPES)
    fields = leaves(recipe.load(text, {}))
    overrides = {}
    for field in rng.sample(fields, rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.05:
            place = rng.randrange(len(field))
            field = field[:place] + rng.choice("xyz._") + field[place + 1 :]
        overrides[field] = rng.choice(VALUES)
    return text, overrides


def start(text: str, overrides: dict[str, str]) -> None:
    """Makes all that a run is made of, up to the first compilation."""
    from research.train.build import make_programs
    from research.train.setup import make_setup
    from research.train.watch import Profile

    config = recipe.load(text, overrides)
    setup = make_setup(config)
    Profile(setup.config.train.profile, Path("unused"))
    setup.steps(setup.config.eval.every, "eval.every")
    setup.steps(setup.config.checkpoint.every, "checkpoint.every")
    setup.steps(setup.config.train.log_every, "train.log_every")
    make_programs(setup).close()


def fuzz_configs(count: int, seed: int = 0) -> Counter:
    rng, out = random.Random(seed), Counter()
    for _ in range(count):
        text, overrides = mutated_config(rng)
        shown = " ".join(f"--config.{k}={v!r}" for k, v in overrides.items())
        out[judge(f"--config={text} {shown}", partial(start, text, overrides))] += 1
    return out


# -- weight files -----------------------------------------------------------------------------------------------------


def valid_safetensors(path: Path) -> None:
    from research.interop.safetensors_io import save_safetensors

    arrays = {
        "a/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.ones(5, np.int8),
        "c": np.zeros((2, 2), np.float16),
    }
    save_safetensors(path, arrays)


def valid_pth(path: Path) -> None:
    """A state dict as torch.save writes it."""
    from tests.interop.test_pth import SIX, storage, tensor, write

    write(
        path,
        {
            "layer.weight": tensor(storage("0", 6), 0, (2, 3), (3, 1)),
            "layer.bias": tensor(storage("0", 6), 0, (2,), (1,)),
        },
        {"0": SIX},
    )


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Returns bytes that were cut, flipped, overwritten, repeated or lengthened."""
    raw = bytearray(data)
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(raw[: rng.randrange(len(raw))])
    for _ in range(rng.choice((1, 1, 4, 16))):
        place = rng.randrange(len(raw))
        raw[place] = raw[place] ^ (1 << rng.randrange(8)) if kind < 3 else rng.randrange(256)
    if kind == 4:
        place = rng.randrange(len(raw))
        raw[place:place] = raw[: rng.randrange(64)]
    if kind == 5:
        raw += bytes(rng.randrange(256) for _ in range(rng.randrange(1, 64)))
    return bytes(raw)


def mutated_header(rng: random.Random, data: bytes) -> bytes:
    """Returns a safetensors file whose header tells something else: sizes, overlaps, types, names, lengths."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = rng.choice(sorted(header))
    entry = header[name]
    kind = rng.randrange(8)
    if kind == 0:
        entry["shape"] = rng.choice(([10**12, 10**12], [-3, 4], [0], [3.5], "x", [3, 4, 1], None))
    elif kind == 1:
        entry["data_offsets"] = rng.choice(([0, 10**15], [-4, 4], [8, 0], [0, 48], [1], "x", [0, 1]))
    elif kind == 2:
        entry["dtype"] = rng.choice(("F8_E4M3", "X", 3, None, "F64"))
    elif kind == 3:
        header["../../escape"] = header.pop(name)
    elif kind == 4:
        header[name] = rng.choice(([], 3, None, {}))
    elif kind == 5:
        entry["more"] = {"deep": [[[[[]]]]]}
    elif kind == 6:
        header["__metadata__"] = rng.choice(({"a": 3}, [], "x", {"a": "b" * 10000}))
    text = json.dumps(header).encode()
    wrong = rng.choice((0, 2**63, len(data) * 2, 1)) if kind == 7 else len(text)
    return struct.pack("<Q", wrong) + text + data[8 + length :]


def fuzz_weights(count: int, seed: int = 0) -> Counter:
    from research.interop.pth import read_pth
    from research.interop.safetensors_io import load_safetensors

    rng, out = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        valid_safetensors(folder / "good.safetensors")
        valid_pth(folder / "good.pth")
        read = {
            "safetensors": lambda p: {k: np.asarray(v).sum() for k, v in load_safetensors(p).items()},
            "pth": lambda p: read_pth(p),
        }
        for kind in read:
            if judge(f"good.{kind}", partial(read[kind], folder / f"good.{kind}")) != "accepted":
                HARM.append(f"the unchanged {kind} file is refused")
        for i in range(count):
            kind = rng.choice(("safetensors", "safetensors", "pth"))
            data = (folder / f"good.{kind}").read_bytes()
            changed = (
                mutated_header(rng, data) if kind == "safetensors" and rng.random() < 0.5 else mutated_bytes(rng, data)
            )
            path = folder / f"bad.{kind}"
            path.write_bytes(changed)
            out[f"{kind} {judge(f'{kind} file {i} of seed {seed}', partial(read[kind], path))}"] += 1
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", type=int, default=500)
    parser.add_argument("--weights", type=int, default=200)
    parser.add_argument("--hostile", type=int, default=200)
    parser.add_argument("--run_files", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{options.configs} mutated configs: {dict(fuzz_configs(options.configs, options.seed))}")
    print(f"{options.weights} mutated weight files: {dict(fuzz_weights(options.weights, options.seed))}")
    hostile = [sys.executable, "-m", "tests.faults.hostile", f"--first={options.seed}", f"--count={options.hostile}"]
    if options.hostile and (
        code := subprocess.run(hostile, timeout=60 + 20 * options.hostile).returncode
    ):  # with limits of its own
        HARM.append(f"{' '.join(hostile[1:])} ended with exit code {code}")
    if options.run_files:
        print(
            f"{options.run_files} mutated files of a run: "
            f"{dict(fuzz_runs(options.run_files, options.seed, judge, HARM))}"
        )
    return 1 if HARM else 0


if __name__ == "__main__":
    sys.exit(main())
