"""Hybrids: two layers of linear time to one of sliding-window attention, against pure stacks of either.

    make hybrid
    python -m launch.train --config=configs/hybrid.py --workdir=runs/hybrid

Hardware: two CPU cores, three to five minutes a run. Data: the text of Python's standard library, bytes.
Other patterns: --config.model.pattern="mamba2 mamba2 attention".
"""

from research.train.config import base_config


def get_config(arg: str = ""):
    del arg
    config = base_config()
    config.model = {
        "name": "hybrid_small",
        "dim": 128,
        "depth": 3,
        "pattern": "mamba2 mamba2 window",
        "ffn": "glu",
        "unroll": True,
        "window": {"heads": 4},
    }
    config.data.update({"name": "stdlib_text", "batch_size": 16})
    config.data.options = {"length": 128, "tokenizer": "bytes", "max_bytes": 2_000_000}
    config.task.metric = "bits_per_byte"
    config.optim.update({"name": "muon", "lr": 0.01, "momentum": 0.95, "weight_decay": 0.05, "schedule": "linear", "warmup": "5%"})
    config.train.update({"duration": "600", "log_every": "10%"})
    config.eval.update({"every": "0", "batch_size": 64})
    config.checkpoint.update({"every": "0"})
    config.report.latency_batches = (1,)
    return config
