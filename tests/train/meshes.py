"""Trains the tiny recipe for three updates on 8 simulated devices under several meshes; prints losses and layouts as JSON.

Run as a process of its own: `python -m tests.train.meshes OUT_FOLDER MESH [MESH ...]` with MESH such as data=2,fsdp=4.
"""

import json
import sys

import jax


def main(out: str, meshes: list[str]) -> None:
    from launch import config as recipe
    from research.train import loop

    class Quiet:
        def say(self, line):
            pass

        def progress(self, done, total, text):
            pass

    results = {}
    for mesh in meshes:
        overrides = {
            "train.duration": "3",
            "eval.every": "0",
            "mesh.data": "1",
            "mesh.min_size": "1",
            "data.batch_size": "32",
            "eval.batch_size": "120",
            "optim.name": "adamw",
            "optim.warmup": "0",
            "optim.lr": "1e-3",
        }
        overrides |= {f"mesh.{k}": v for k, _, v in (part.partition("=") for part in mesh.split(","))}
        config = recipe.load("tests/tiny.py:all", overrides)
        run = loop.Run(config, f"{out}/{mesh}", Quiet())
        report = run.run()
        lines = [json.loads(line) for line in open(f"{out}/{mesh}/metrics.jsonl")]
        results[mesh] = {
            "losses": [v for line in lines for k, v in sorted(line.items()) if k.startswith("loss/")],
            "values": [n["value"] for n in report["subnets"]],
            "layout": json.load(open(f"{out}/{mesh}/layout.json")),
            "split": {
                name: len({str(s.index) for s in array.addressable_shards})
                for name, array in {**run.state.params, **{f"mu:{k}": v for k, v in _mu(run.state.opt_state).items()}}.items()
            },
        }
    print(json.dumps(results))


def _mu(opt_state):
    return next(s.mu for s in jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
    main(sys.argv[1], sys.argv[3:])
