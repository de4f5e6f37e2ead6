"""Other people's files made to do harm: every one is read or refused in a line, within a memory and a time that are
held to.

    python -m tests.faults.hostile --first=0 --count=100

A trial is a function of its number: a foreign config.json with sizes and types that cannot be beside weights of a
kilobyte, a pickle that makes objects without end, a gzip file that swells, a header of safetensors that lies. One
process makes all; `make fuzz` starts it.
"""

import argparse
import dataclasses
import gzip
import json
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MEMORY, SECONDS = 2 * 2**30, 20
"""What all trials together may map beside what is mapped before the first, and what each may take."""
VALUES: tuple[Any, ...] = (10**9, 10**30, 2**24, -1, 0, 1, 3, 2.5, -1e-5, 1e300, float("nan"), float("inf"), "x", "7",
                           "auto", True, None, [], {}, [1], {"a": 1}, {"__float__": "x"}, "\x1b[2J\0", "x" * 10**6,
                           list(range(1000)))  # fmt: skip


# -- configs of language models ----------------------------------------------------------------------------------------


def small_models() -> dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Source -> (content of config.json, state dict) of a model of two layers."""
    from research.interop import mamba_names, moe_names
    from research.models.sequence import SequenceConfig
    from research.modules.mixers.attention import Attention
    from research.modules.mixers.mamba import Mamba
    from research.modules.mixers.mamba2 import Mamba2
    from research.modules.moe_options import FAMILIES
    from research.modules.state import abstract

    shared = dict(vocab_size=32, length=16, dim=8, depth=2)
    mamba = SequenceConfig(**shared, pattern="mamba", mamba=Mamba(d_state=4))
    mamba2 = SequenceConfig(
        **shared, pattern="mamba2", mamba2=Mamba2(d_state=4, head_dim=4, ngroups=1), tie_embeddings=False
    )
    experts = {name: dict(num_experts=3, num_experts_per_tok=2, ffn_dim=8) for name in ("mixtral", "qwen3")}
    moes = {}
    for name, norm in (("mixtral", False), ("qwen3", True)):
        moe = dataclasses.replace(FAMILIES[name], **experts[name])
        mixer = Attention(num_heads=2, qk_norm=norm, qk_norm_eps=1e-5)
        moes[name] = SequenceConfig(
            **shared, pattern="attention", attention=mixer, ffn="moe", ffn_dim=8, moe=moe, tie_embeddings=False
        )
    out = {}
    for source, config, names in (
        ("hf-mamba", mamba, mamba_names),
        ("hf-mamba2", mamba2, mamba_names),
        ("mamba-ssm", mamba, mamba_names),
        ("mamba-ssm", mamba2, mamba_names),
        ("hf-mixtral", moes["mixtral"], moe_names),
        ("hf-qwen3-moe", moes["qwen3"], moe_names),
    ):
        shapes = {name: s.shape for name, s in abstract(config).params.items()}
        params = {
            name: np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        out[source if source not in out else f"{source} 2"] = names.to_foreign(source, config, params)
    return out


def hostile_config(rng: random.Random, data: dict[str, Any]) -> dict[str, Any]:
    """Returns a config.json with one or two fields of other values, also of the group within."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.choice((1, 1, 2))):
        group = data["ssm_cfg"] if isinstance(data.get("ssm_cfg"), dict) and rng.random() < 0.5 else data
        extra = [
            "head_dim",
            "time_step_limit",
            "mlp_only_layers",
            "rope_parameters",
            "rope_scaling",
            "sliding_window",
            "dt_limit",
        ]
        group[rng.choice([*group, *extra])] = rng.choice(VALUES)
    return data


def foreign_config(rng: random.Random, folder: Path, models: dict) -> tuple[str, Callable[[], Any]]:
    from research.interop import from_folder
    from research.interop.safetensors_io import save_safetensors

    name = rng.choice(sorted(models))
    data, state = models[name]
    changed = hostile_config(rng, data)
    (folder / "config.json").write_text(json.dumps(changed))
    save_safetensors(folder / "model.safetensors", hostile_values(rng, state))
    difference = {key: repr(value)[:60] for key, value in changed.items() if data.get(key) != value}
    return f"{name} {difference}", lambda: from_folder(name.split()[0], str(folder))


def hostile_values(rng: random.Random, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns weights that are now and then of another type, NaN or infinite."""
    state = {name: np.array(w) for name, w in state.items()}
    name = rng.choice(sorted(state))
    if rng.random() < 0.2:
        state[name] = rng.choice(
            (state[name].astype(np.int8), state[name] * np.float32("nan"), state[name] + np.float32("inf"))
        )
    return state


# -- files that swell --------------------------------------------------------------------------------------------------


def pickle_bomb(rng: random.Random, folder: Path) -> tuple[str, Callable[[], Any]]:
    from research.interop.pth import read_pth

    count = rng.choice((10**4, 3 * 10**6, 3 * 10**7))
    step = rng.choice(
        (pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.NONE + pickle.MEMOIZE, pickle.MARK, b"K\x01" + pickle.TUPLE1)
    )
    path = folder / "bomb.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.PROTO + b"\x04" + pickle.EMPTY_DICT + step * count + pickle.STOP)
        archive.writestr("a/byteorder", "little")
    return f"pickle of {count} x {step!r}", lambda: read_pth(path)


def gzip_bomb(rng: random.Random, folder: Path) -> tuple[str, Callable[[], Any]]:
    from research.data.idx import read_idx

    path, claimed = folder / "bomb.gz", rng.choice((10, 10**4, 10**9, 2**32 - 1))
    real = rng.choice((10, 2**28))
    head = bytes((0, 0, rng.choice((8, 13, 14)), rng.choice((1, 3, 4, 9))))
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head + struct.pack(">4I", claimed, rng.choice((1, 28, 2**31)), 28, 1))
        for _ in range(max(1, real // 2**24)):
            file.write(bytes(min(real, 2**24)))
    return f"gzip of {real} bytes that claims {claimed}", lambda: read_idx(path)


def lying_header(rng: random.Random, folder: Path) -> tuple[str, Callable[[], Any]]:
    from research.interop.safetensors_io import load_safetensors

    name = rng.choice(("a", "a\0b", "\x1b]0;x\x07", "n" * 10**6, "../../x", ""))
    shape = rng.choice(([1] * 65, [1] * 33, [2**62, 0], [2**62, 4], [0] * 20, [1, 2], [-1], [1.5], "x"))
    kind = rng.choice(("F32", "F64", "BF16", "I8", "F8_E4M3", "C64", 3, "\x1b[2J"))
    header = {
        name: {
            "dtype": kind,
            "shape": shape,
            "data_offsets": rng.choice(([0, 4], [0, 8], [0, 0], [0, 2**62], [4, 0], [-4, 0])),
        }
    }
    if rng.random() < 0.2:
        header["__metadata__"] = {"model": "[" * rng.choice((1, 10**5))}
    text = json.dumps(header).encode()
    path = folder / "bomb.safetensors"
    path.write_bytes(struct.pack("<Q", rng.choice((len(text), len(text), len(text), 2**40))) + text + bytes(8))
    return f"header of {kind} {shape}", lambda: {k: np.asarray(w).sum() for k, w in load_safetensors(path).items()}


def trial(number: int, folder: Path, models: dict) -> tuple[str, Callable[[], Any]]:
    """Returns (what it is, a function that reads it)."""
    rng = random.Random(number)
    kind = rng.choice(("config", "config", "config", "pickle", "gzip", "header", "header"))
    if kind == "config":
        return foreign_config(rng, folder, models)
    return {"pickle": pickle_bomb, "gzip": gzip_bomb, "header": lying_header}[kind](rng, folder)


def mapped() -> int:
    """Bytes of memory that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> int:
    from tests.faults.fuzz import HARM, judge

    def late(*_):
        raise TimeoutError(f"takes more than {SECONDS} s")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    options = parser.parse_args()
    models, out = small_models(), Counter()
    resource.setrlimit(resource.RLIMIT_AS, (mapped() + MEMORY,) * 2)
    signal.signal(signal.SIGALRM, late)
    for number in range(options.first, options.first + options.count):
        with tempfile.TemporaryDirectory() as name:
            what, read = trial(number, Path(name), models)
            print(f"{number} {what[:200]!r}", file=sys.stderr, flush=True)
            signal.alarm(SECONDS)
            out[judge(f"hostile file {number}, {what[:300]}", read)] += 1
            signal.alarm(0)
    print(f"{options.count} hostile files: {dict(out)}")
    return 1 if HARM else 0


if __name__ == "__main__":
    sys.exit(main())
