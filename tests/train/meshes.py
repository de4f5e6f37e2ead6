"""Trains the tiny recipe for three updates on 8 simulated devices under several meshes; prints losses and layouts as
JSON.

Run as a process of its own: `python -m tests.train.meshes OUT_FOLDER DEVICES MESH [MESH ...]` with MESH such as
data=2,fsdp=4. A>B is stopped by SIGTERM after an update on mesh A and continues from its checkpoint on mesh B; a mesh
with "sequence:" before it is for the tiny hybrid sequence model, with "bf16:" in bfloat16, with "moe:" for one with
mixtures of experts, with "spread:" one that trains two networks at the same time. The final parameters are written to
OUT_FOLDER/NAME.npz.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from research.process import set_xla_flags


def main(out: str, meshes: list[str]) -> None:
    from launch import config as recipe
    from research.train import loop

    class Quiet:
        def __init__(self, stop: bool = False):
            self.stop = stop

        def say(self, line):
            pass

        def progress(self, done, total, text):
            if self.stop:
                os.kill(os.getpid(), signal.SIGTERM)

    def configured(overrides, mesh):
        sizes = {f"mesh.{k}": v for k, _, v in (part.partition("=") for part in mesh.split(","))}
        return recipe.load(text, {**overrides, **sizes})

    results = {}
    for name in meshes:
        kind, _, mesh = name.rpartition(":")
        text = f"tests/tiny_lm.py:{'moe' if kind == 'moe' else 'probe'}" if kind else "tests/tiny.py:all"
        overrides = {
            "train.duration": "3",
            "eval.every": "0",
            "mesh.data": "1",
            "mesh.min_size": "1",
            "data.batch_size": "32",
            "eval.batch_size": "64" if kind else "120",
            "optim.name": "adamw",
            "optim.warmup": "0",
            "optim.lr": "1e-2",
            # a bias before a norm has the gradient zero, and rounding of it is not to be divided by itself
            "optim.eps": "1e-2",
        }
        if kind == "bf16":
            overrides["train.precision"] = "bfloat16"
        if kind == "spread":
            overrides |= {
                "methods": "sorted",
                "method.sorted.count": "2",
                "nested.execution": "parallel" if jax.device_count() > 1 else "sliced",
                "seed": "9",
            }
        *before, last = mesh.split(">")
        folder = f"{out}/{kind}{mesh.replace('>', '_')}"
        for first in before:
            with contextlib.suppress(loop.Preempted):
                loop.Run(configured(overrides, first), folder, Quiet(stop=True)).run()
        run = loop.Run(configured(overrides, last), folder, Quiet())
        report = run.run()
        np.savez(f"{folder}.npz", **{k: np.asarray(v) for k, v in run.state.params.items()})
        lines = [json.loads(line) for line in Path(f"{folder}/metrics.jsonl").read_text().splitlines()]
        results[name] = {
            "losses": [v for line in lines for k, v in sorted(line.items()) if k.startswith("loss/")],
            "params": f"{folder}.npz",
            "resumed_at": run.first,
            "values": [n["value"] for n in report["subnets"]],
            "layout": json.loads(Path(f"{folder}/layout.json").read_text()),
            "split": {
                name: len({str(s.index) for s in array.addressable_shards})
                for name, array in {
                    **run.state.params,
                    **{f"mu:{k}": v for k, v in _mu(run.state.opt_state).items()},
                }.items()
            },
        }
    print(json.dumps(results))


def _mu(opt_state):
    return next(s.mu for s in jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))


if __name__ == "__main__":
    set_xla_flags()  # as the commands do
    jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
    main(sys.argv[1], sys.argv[3:])
