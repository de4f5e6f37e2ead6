"""Updates whose networks are trained on different devices, beside those one after the other; prints what differs as
JSON.

Run as a process of its own: `python -m tests.train.parallel_updates` on 4 simulated devices, two for each of two
networks.
"""

import json

import jax
import numpy as np

from research.process import set_xla_flags


def language(model, **overrides):
    """The update of a language model with labels that differ from device to device: of both ways the steps, the logged
    line, the bias."""
    from tests.train.test_update import language as recipe
    from tests.train.test_update import updates

    def unequal(batch):
        labels = np.array(batch["tokens"], np.int32)
        labels[1::2, 2:], labels[6:, 1:] = -1, -1
        return {**batch, "labels": labels}

    out = []
    for spread in (True, False):
        execution = "parallel" if spread else "sliced"
        config = recipe("sorted", model, **overrides, method__sorted__count=2, nested__execution=execution)
        config["mesh"] = {**config["mesh"], "data": 4}
        before, after, (line,), _ = updates(config, change=unequal)
        out.append(({k: after.params[k] - before.params[k] for k in after.params}, line, after.stats))
    (spread, its_line, its_stats), (turn, line, stats) = out
    return {
        "step": max(float(np.abs(spread[k] - turn[k]).max() / max(np.abs(turn[k]).max(), 1e-2)) for k in turn),
        "line": {k: [its_line[k], v] for k, v in line.items() if k.startswith(("loss", "accuracy"))},
        "logged": [sorted(k for k in one if k.count("/") > 1) for one in (its_line, line)],
        "bias": {
            k: [np.asarray(its_stats[k]).tolist(), v.tolist()]
            for k, v in stats.items()
            if k.endswith(("/bias", "/chosen"))
        },
    }


def alternating():
    """Losses of two rounds of alternation, the networks on different devices."""
    from launch import config as recipe
    from tests.train.test_update import updates

    fields = {"methods": "advmoe,sorted", "method.sorted.count": "2", "nested.points.s": "width=0.75"}
    config = recipe.load("tests/tiny_robust.py:advmoe", {**fields, "nested.execution": "parallel"})
    before, after, lines, _ = updates(config, 4, change=lambda batch: batch)
    moved = [any(not np.array_equal(before.stats[k], after.stats[k]) for k in before.stats if k.endswith("/mean"))]
    return {
        "losses": [line["loss"] for line in lines],
        "names": [sorted(k for k in line if k.startswith("loss")) for line in lines],
        "moved": moved,
    }


def main() -> None:
    from tests.train.test_update import LM, MOE

    seed = 9  # draws the full network and the small one
    print(
        json.dumps(
            {
                "language": language(LM, seed=seed),
                "moe": language({**LM, "ffn": "moe", "moe": MOE}, seed=seed),
                "alternating": alternating(),
            }
        )
    )


if __name__ == "__main__":
    set_xla_flags()
    jax.config.update("jax_num_cpu_devices", 4)
    main()
