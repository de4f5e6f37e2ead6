"""nanoGPT's own CPU recipe, run from a checkout of the user's: its training script as it is, its wall time, its loss.

The script estimates its validation loss from 20 random batches. For a comparison the saved model is evaluated over the
whole validation text, in windows that do not overlap, each from its first token on (github.com/karpathy/nanoGPT,
README).
"""

import importlib.util
import math
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from research.errors import UserError

RECIPE = {
    "device": "cpu", "compile": False, "eval_iters": 20, "log_interval": 100, "block_size": 64, "batch_size": 12,
    "n_layer": 4, "n_head": 4, "n_embd": 128, "max_iters": 2000, "lr_decay_iters": 2000, "dropout": 0.0,
}  # fmt: skip
"""The arguments that the README gives for a CPU; logging is rarer, which only saves time."""


def check(checkout: str) -> Path:
    """Returns the folder of a checkout.

    Raises:
      UserError: no nanoGPT there, or no PyTorch to run it with.
    """
    folder = Path(checkout)
    if not (folder / "train.py").is_file() or not (folder / "config" / "train_shakespeare_char.py").is_file():
        raise UserError(
            f"{checkout} is no checkout of nanoGPT (train.py, config/train_shakespeare_char.py); "
            "clone github.com/karpathy/nanoGPT"
        )
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "nanoGPT needs PyTorch, which is not installed here; run this in the environment of the peers (make versus)"
        )
    return folder.resolve()


def train(checkout: str, source: dict[str, Any], out: Path, **overrides: Any) -> dict[str, float]:
    """Trains by the CPU recipe and returns {"params", "wall_s", "loss" (whole validation text), "own_estimate"}.

    Args:
      checkout: folder of nanoGPT.
      source: its splits "train" and "validation", character tokens.
      out: a folder for its files.
      overrides: changed arguments of the script.

    Raises:
      UserError: as `check`, or the script failed.
    """
    folder, out = check(checkout), out.resolve()
    data = out / "data" / "shakespeare_char"
    data.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "train.bin"), ("validation", "val.bin")):
        np.asarray(source[split].tokens, np.uint16).tofile(data / name)
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": source["train"].vocab_size}))
    # The script finds data/ beside its working directory, and its modules and configs beside itself.
    for name in ("configurator.py", "config", "model.py"):
        if not (out / name).exists():
            os.symlink(folder / name, out / name)
    arguments = [f"--{key}={value}" for key, value in {**RECIPE, **overrides}.items()]
    command = [sys.executable, str(folder / "train.py"), "config/train_shakespeare_char.py", *arguments]
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=out, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(out)}, check=False
    )
    wall = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"nanoGPT's training failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    estimates = re.findall(r"val loss ([\d.]+)", done.stdout)
    loss, params = full_loss(
        folder, out / "out-shakespeare-char" / "ckpt.pt", np.asarray(source["validation"].tokens, np.int64)
    )
    return {
        "params": params,
        "wall_s": wall,
        "loss": loss,
        "own_estimate": float(estimates[-1]) if estimates else math.nan,
    }


def full_loss(checkout: Path, checkpoint: Path, tokens: np.ndarray) -> tuple[float, int]:
    """Returns (mean loss in nats over all tokens but the first, number of parameters) of a saved model."""
    import torch

    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    saved = torch.load(checkpoint, map_location="cpu", weights_only=False)
    model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    size, total = saved["model_args"]["block_size"], 0.0
    whole = (len(tokens) - 1) // size * size
    with torch.no_grad():
        x = torch.from_numpy(tokens[:whole].reshape(-1, size))
        y = torch.from_numpy(tokens[1 : whole + 1].reshape(-1, size))
        for i in range(0, len(x), 256):
            total += float(model(x[i : i + 256], y[i : i + 256])[1]) * y[i : i + 256].numel()
        if whole < len(tokens) - 1:
            x, y = torch.from_numpy(tokens[whole:-1])[None], torch.from_numpy(tokens[whole + 1 :])[None]
            total += float(model(x, y)[1]) * y.numel()
    return total / (len(tokens) - 1), sum(p.numel() for p in model.parameters())
