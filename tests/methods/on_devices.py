"""Runs on eight simulated devices whose network changes its shape: whole, and killed by SIGKILL and resumed; prints
what was found as JSON. Run as a process of its own: `python -m tests.methods.on_devices FOLDER`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from research.process import set_xla_flags
from tests.models import twins


def main(folder: str, name: str = "", kill: str = "") -> None:
    if name:
        train(folder, name, bool(kill))
        return
    found = {}
    for method in ("halve", "widen"):
        own = Path(folder) / method
        again = [sys.executable, "-m", "tests.methods.on_devices"]
        subprocess.run([*again, f"{own}/whole", method], check=True, capture_output=True)
        killed = subprocess.run([*again, f"{own}/killed", method, "kill"], capture_output=True).returncode
        from research.train.restore import whole_steps

        left = max(whole_steps(own / "killed" / "checkpoints"))
        subprocess.run([*again, f"{own}/killed", method], check=True, capture_output=True)
        ours, theirs = np.load(f"{own}/killed.npz"), np.load(f"{own}/whole.npz")
        equal = set(ours.files) == set(theirs.files) and all(np.array_equal(ours[k], theirs[k]) for k in theirs.files)
        up = next(k for k in theirs.files if k.endswith("mlp/up/kernel"))
        found[method] = {"killed": killed, "resumed": left, "equal": equal, "units": theirs[up].shape[-1]}
    print(json.dumps(found))


def train(folder: str, name: str, kill: bool) -> None:
    from launch import config as recipe
    from research.train import loop
    from tests.methods import cases  # noqa: F401  (registers the methods)
    from tests.train.reporter import Lines

    fields = {"mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2", "mesh.min_size": "1", "methods": f"{name},ema"}
    run = loop.Run(recipe.load("tests/methods/tiny.py", fields), folder, Lines())
    if kill:
        tick = run._tick_step

        def killed():
            tick()
            if run.step == 7:
                run.checkpoints.wait()
                os.kill(os.getpid(), signal.SIGKILL)

        run._tick_step = killed
    run.run()
    np.savez(f"{folder}.npz", **{k: np.asarray(v) for k, v in run.state.params.items()})


if __name__ == "__main__":
    set_xla_flags()
    os.environ["XLA_FLAGS"] += " " + " ".join(f"--{k}={str(v).lower()}" for k, v in twins.FAST.items())
    main(*sys.argv[1:])
